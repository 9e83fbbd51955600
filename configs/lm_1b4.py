"""The language model of Flamingo-3B: 24 layers of width 2048, 1.37 B parameters (paper table 4).

`--config=configs/lm_1b4.py` or `:tiny`. The paper gives no training settings for this size; rate and batch (0.26 M tokens) are Gopher's for
its model of 1.4 B (Rae et al. 2021, table 1), over 300 B tokens.
"""

import ml_collections

from configs import base
from flamingo_jax.configuring import to_config
from flamingo_jax.experiment import MeshConfig


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config, or with "tiny" its laptop form."""
    experiment = base.language_modelling("lm 1.4B", base.LM_1B4, rate=2e-4, rows=128, steps=1_144_000, mesh=MeshConfig())
    return to_config(base.tiny(experiment) if base.tiny_or_full(arg, "lm_1b4") else experiment)
