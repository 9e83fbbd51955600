"""Trains the language model of Flamingo-3B: 24 layers of width 2048, 1.37 B parameters (paper
table 4).

`--config=configs/lm_1b4.py`, or with `:form=FORM,root=FOLDER`, where the form is `tiny` or a
machine of `MACHINES`. The paper gives no training settings for this size. Learning rate and
batch size (0.26 M tokens) are those of Gopher's 1.4 B model (Rae et al. 2021, table 1), over
300 B tokens.
"""

import ml_collections

from configs import base
from flamingo_jax.configuring import to_config
from flamingo_jax.experiment import MeshConfig

# MeshConfig(data, fsdp, model)
MACHINES = {
    "v4_2x2x4": base.Machine(MeshConfig(1, 16, 1)),
    "v5e_8x8": base.Machine(MeshConfig(1, 64, 1)),
    "h200_8": base.Machine(MeshConfig(1, 8, 1)),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of the argument `form,root`."""
    experiment = base.language_modelling(
        "lm 1.4B", base.LM_1B4, rate=2e-4, rows=128, steps=1_144_000, mesh=MeshConfig()
    )
    return to_config(base.apply_form(experiment, arg, "lm_1b4", MACHINES))
