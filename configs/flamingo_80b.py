"""Flamingo-80B: a gated block before every 7th layer of the 70B language model, 12 of them (paper table 5, B.1.1).

`--config=configs/flamingo_80b.py` or `:tiny`. The mesh is the paper's (B.1.2): 16-way Megatron for language model and gated blocks, the
rest replicas; on its 1,536 chips these are 96. The batch of this size is not published: nine times the ablation's (M3W 2,304, ALIGN and
LTIP 4,608, VTP 576) divides into 96 replicas and keeps every chip busy.
"""

import ml_collections

from configs import base
from flamingo_jax.configuring import to_config
from flamingo_jax.experiment import MeshConfig


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config, or with "tiny" its laptop form."""
    experiment = base.flamingo("flamingo 80B", base.LM_70B, every=7, lm_export="lm_70b", multiple=9, mesh=MeshConfig(model=16))
    return to_config(base.tiny(experiment) if base.tiny_or_full(arg, "flamingo_80b") else experiment)
