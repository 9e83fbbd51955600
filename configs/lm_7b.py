"""Trains the language model of Flamingo-9B: 32 layers of width 4096, 7.11 B parameters.

`--config=configs/lm_7b.py`, or with `:form=FORM,root=FOLDER`, where the form is `tiny` or a
machine of `MACHINES`. The paper gives no training settings for this size. Learning rate and
batch size (2 M tokens) are those of Gopher's 7.1 B model (Rae et al. 2021, table 1), over 300
B tokens. Parameters and moments (85 GB in float32) are sharded over 16 devices.
"""

import ml_collections

from configs import base
from flamingo_jax.configuring import to_config
from flamingo_jax.experiment import MeshConfig

# MeshConfig(data, fsdp, model)
MACHINES = {
    "v4_4x4x4": base.Machine(MeshConfig(1, 64, 1)),
    "v5p_8x8x4": base.Machine(MeshConfig(1, 64, 4)),
    "h200_8": base.Machine(MeshConfig(1, 8, 1), microbatches=4),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of the argument `form,root`."""
    experiment = base.language_modelling(
        "lm 7B", base.LM_7B, rate=1.2e-4, rows=1024, steps=143_000, mesh=MeshConfig(fsdp=16)
    )
    return to_config(base.apply_form(experiment, arg, "lm_7b", MACHINES))
