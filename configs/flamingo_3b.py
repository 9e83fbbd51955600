"""Flamingo-3B: a gated block before every one of 24 layers of the 1.4B language model (paper table 5, B.1.1).

`--config=configs/flamingo_3b.py` or `:tiny`. Batches are the ablation's (M3W 256, ALIGN 512, LTIP 512, VTP 64). The paper needs no model
sharding at this size.
"""

import ml_collections

from configs import base
from flamingo_jax.configuring import to_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config, or with "tiny" its laptop form."""
    experiment = base.flamingo("flamingo 3B", base.LM_1B4, every=1, lm_export="lm_1b4")
    return to_config(base.tiny(experiment) if base.tiny_or_full(arg, "flamingo_3b") else experiment)
