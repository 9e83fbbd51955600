"""Trains Flamingo-9B: a gated block before every 4th layer of the 7.1B language model (paper
table 5, B.1.1).

`--config=configs/flamingo_9b.py`, or with `:form=FORM,root=FOLDER`, where the form is `tiny`
or a machine of `MACHINES`. The paper's table of sizes says 40 layers with 10 gated blocks, but
its parameter counts (7.1B and 1.6B) are those of 32 layers with 8 blocks, which this config
has. The batch sizes are those of the ablation study, the only published ones.
"""

import ml_collections

from configs import base
from flamingo_jax.configuring import to_config
from flamingo_jax.experiment import MeshConfig

# MeshConfig(data, fsdp, model)
MACHINES = {
    "v4_4x4x4": base.Machine(MeshConfig(1, 32, 2)),
    "v5e_8x8": base.Machine(MeshConfig(1, 16, 4)),
    "v5p_8x8x4": base.Machine(MeshConfig(4, 16, 4)),
    "h200_8": base.Machine(MeshConfig(1, 8, 1)),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of the argument `form,root`."""
    experiment = base.flamingo("flamingo 9B", base.LM_7B, every=4, lm_export="lm_7b")
    return to_config(base.apply_form(experiment, arg, "flamingo_9b", MACHINES))
