"""Trains the language model of Flamingo-80B, Chinchilla: 80 layers of width 8192, 70.06 B
parameters (Hoffmann et al. 2022, table 4).

`--config=configs/lm_70b.py`, or with `:form=FORM,root=FOLDER`, where the form is `tiny` or a
machine of `MACHINES`. The learning rate of 1e-4 and the 1.4 T tokens are Chinchilla's. Its
batch of 1.5 M tokens doubles midway; here it is 3.1 M tokens from the start. Parameters and
moments (841 GB in float32) are sharded over 16 x 16 devices.
"""

import ml_collections

from configs import base
from flamingo_jax.configuring import to_config
from flamingo_jax.experiment import MeshConfig

# MeshConfig(data, fsdp, model)
MACHINES = {
    "v4_8x12x16": base.Machine(MeshConfig(3, 32, 16), microbatches=4),
    "v5p_8x8x4": base.Machine(MeshConfig(1, 16, 16), microbatches=12),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of the argument `form,root`."""
    mesh = MeshConfig(fsdp=16, model=16)
    experiment = base.language_modelling(
        "lm 70B", base.LM_70B, rate=1e-4, rows=1536, steps=445_000, mesh=mesh
    )
    return to_config(base.apply_form(experiment, arg, "lm_70b", MACHINES))
