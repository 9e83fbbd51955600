"""Trains Flamingo-80B: a gated block before every 7th layer of the 70B language model, 12
blocks in all (paper table 5, B.1.1).

`--config=configs/flamingo_80b.py`, or with `:form=FORM,root=FOLDER`, where the form is `tiny`
or a machine of `MACHINES`.

The mesh is the paper's (B.1.2): 16-way Megatron sharding of language model, resampler and
gated blocks, and data parallelism over the rest. On the paper's 1,536 chips (v4_8x12x16;
Google Cloud calls it v4-3072, since it counts cores) these are 96 replicas. The paper shards
the optimizer's state over all 96; here 32 of them share trained parameters, gradients and
moments (fsdp), since no parameter has an axis that 96 divides.

The batch sizes of this model are not published. Nine times the ablation's M3W (2,304) and VTP
(576) and 8.25 times its ALIGN and LTIP (4,224) give each replica 256 frames, 16 for each of
its chips, and 10,752 tokens, which 16 divides too.
"""

import ml_collections

from configs import base
from flamingo_jax.configuring import to_config
from flamingo_jax.experiment import MeshConfig

# MeshConfig(data, fsdp, model)
MACHINES = {
    "v4_8x12x16": base.Machine(MeshConfig(3, 32, 16)),
    "v4_8x12x16_wide": base.Machine(MeshConfig(3, 64, 8)),
    "v5p_8x8x4": base.Machine(MeshConfig(1, 16, 16), microbatches=6),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of the argument `form,root`."""
    data = base.mixture(m3w=2304, align=4224, ltip=4224, vtp=576)
    experiment = base.flamingo(
        "flamingo 80B",
        base.LM_70B,
        every=7,
        lm_export="lm_70b",
        data=data,
        mesh=MeshConfig(model=16),
    )
    return to_config(base.apply_form(experiment, arg, "flamingo_80b", MACHINES))
