"""The vision encoder: NFNet-F6 beside a BERT, both from scratch, on ALIGN and LTIP (paper
B.1.3).

`--config=configs/contrastive_nfnet_f6.py`, or with `:form=FORM,root=FOLDER`: the form is `tiny`
or a machine of `MACHINES`. From the paper: 288 px, joint width 1376, label smoothing 0.1, one
gradient of 16,384 pairs per dataset and update, Adam without decay, rate 1e-3 falling linearly
to 0 over 1.2 M updates, adaptive clipping 1e-2 on the NFNet and a global norm of 10 on the
rest. Not in the paper, from ALIGN (Jia et al. 2021): BERT-Large, 64 tokens, temperature 1 at
the start, 10,000 updates of warm-up. The two datasets weigh the same.
"""

import ml_collections

from configs import base
from flamingo_jax.configuring import to_config
from flamingo_jax.experiment import (
    ContrastiveConfig,
    DatasetConfig,
    Experiment,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
)

MACHINES = {
    "v4_8x8x8": base.Machine(MeshConfig(-1, 1, 1), microbatches=2),
    "v5p_8x8x4": base.Machine(MeshConfig(-1, 1, 1), microbatches=4),
    "h200_8": base.Machine(MeshConfig(-1, 1, 1), microbatches=64),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config as the argument `form,root` asks for it."""
    data = {
        name: DatasetConfig(
            "pairs",
            f"{base.DATA}/{name}",
            batch_size=16_384,
            max_length=64,
            flip=True,
            colour=base.COLOUR,
        )
        for name in ("align", "ltip")
    }
    experiment = Experiment(
        name="contrastive NFNet-F6",
        task="contrastive",
        contrastive=ContrastiveConfig(),
        tokenizer=f"{base.DATA}/tokenizer",
        data=data,
        held_out=base.held_out(data),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup_steps=10_000,
            schedule="linear",
            weight_decay=0.0,
            weight_decay_exclude=(),
            clip_norm=10.0,
            adaptive_clip=1e-2,
        ),
        training=TrainingConfig(steps=1_200_000),
    )
    return to_config(base.form_of(experiment, arg, "contrastive_nfnet_f6", MACHINES))
