"""Trains Flamingo-3B: a gated block before each of the 24 layers of the 1.4B language model
(paper table 5, B.1.1).

`--config=configs/flamingo_3b.py`, or with `:form=FORM,root=FOLDER`, where the form is `tiny`
or a machine of `MACHINES`. The batch sizes are those of the ablation study (M3W 256, ALIGN
512, LTIP 512, VTP 64). The paper uses no model sharding at this size.
"""

from typing import TYPE_CHECKING

from configs import base
from flamingo_jax.configuring import to_config
from flamingo_jax.experiment import Experiment, MeshConfig

if TYPE_CHECKING:
    import ml_collections

# MeshConfig(data, fsdp, model)
MACHINES = {
    "v4_2x2x4": base.Machine(MeshConfig(1, 16, 1)),
    "v5e_8x8": base.Machine(MeshConfig(1, 64, 1)),
    "v5p_8x8x4": base.Machine(MeshConfig(4, 16, 4)),
    "h200_1": base.Machine(MeshConfig(1, 1, 1), microbatches=4),
    "h200_8": base.Machine(MeshConfig(1, 8, 1)),
}


def get_config(arg: str = "") -> "ml_collections.ConfigDict":
    """Returns the config of the argument `form,root`."""
    return to_config(experiment(arg))


def experiment(arg: str = "") -> Experiment:
    """Makes the experiment of the argument `form,root`, without ml_collections."""
    made = base.flamingo("flamingo 3B", base.LM_1B4, every=1, lm_export="lm_1b4")
    return base.apply_form(made, arg, "flamingo_3b", MACHINES)
