"""Trains the vision encoder: an NFNet-F6 and a BERT, both from scratch, with a contrastive
loss on ALIGN and LTIP (paper B.1.3).

`--config=configs/contrastive_nfnet_f6.py`, or with `:form=FORM,root=FOLDER`, where the form is
`tiny` or a machine of `MACHINES`.

From the paper: 288 px, joint width 1376, label smoothing 0.1, one gradient of 16,384 pairs per
dataset and update, Adam without weight decay, a learning rate that falls linearly from 1e-3 to
0 over 1.2 M updates, adaptive gradient clipping of 1e-2 on the NFNet and a global norm of 10
on the rest. Not in the paper, taken from ALIGN (Jia et al. 2021): BERT-Large, 64 tokens, an
initial temperature of 1, 10,000 updates of warm-up. Both datasets have the same weight.
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

# MeshConfig(data, fsdp, model)
MACHINES = {
    "v4_8x8x8": base.Machine(MeshConfig(-1, 1, 1), microbatches=2),
    "v5p_8x8x4": base.Machine(MeshConfig(-1, 1, 1), microbatches=4),
    "h200_8": base.Machine(MeshConfig(-1, 1, 1), microbatches=64),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of the argument `form,root`."""
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
    return to_config(base.apply_form(experiment, arg, "contrastive_nfnet_f6", MACHINES))
