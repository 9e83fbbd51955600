"""The sizes of a device check: the paper's smallest model for an accelerator, and a tiny one that
runs on a laptop's CPU in seconds.
"""

import dataclasses

from flamingo_jax.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Arrays of attention: queries [rows, length, heads, width], keys [rows, keys, kv_heads,
    width].

    mask: packed, two segments and padding in each row; visuals, each query sees one of the
    blocks of `block` keys, the first queries none; cache, the first keys of each row.
    """

    name: str
    mask: str
    rows: int
    length: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    block: int = 64


@dataclasses.dataclass(frozen=True)
class DeviceCheckSize:
    """What the sections work on.

    train: the experiment whose step is timed. microbatches: of its datasets, tried in this order.
    resume: the experiment that is stopped and resumed.
    new_tokens: that are generated for each prompt. batches: how many prompts at a time. runs: of
    each, of which the median counts.
    photos: made JPEGs; photo: their width and height. steps: of the training step, at most.
    """

    train: Experiment
    resume: Experiment
    attention: tuple[AttentionCase, ...]
    microbatches: tuple[int, ...]
    new_tokens: int
    batches: tuple[int, ...]
    runs: int
    photos: int
    photo: tuple[int, int]
    steps: int
    needs_accelerator: bool


FULL_ATTENTION = (
    AttentionCase("packed rows", "packed", 16, 256, 256, 16, 16, 128),
    AttentionCase("grouped queries", "packed", 4, 512, 512, 32, 8, 128),
    AttentionCase("cross-attention", "visuals", 16, 256, 320, 16, 16, 128),
    AttentionCase("a prompt's prefill", "cache", 8, 512, 576, 16, 16, 128),
    AttentionCase("a decoded token", "cache", 64, 1, 1056, 16, 16, 128),
)
TINY_ATTENTION = (
    AttentionCase("packed rows", "packed", 2, 16, 16, 4, 2, 8),
    AttentionCase("cross-attention", "visuals", 2, 16, 24, 2, 2, 8, block=8),
    AttentionCase("a decoded token", "cache", 2, 1, 24, 2, 2, 8),
)


def full_size(train: Experiment, resume: Experiment) -> DeviceCheckSize:
    """Makes the size for a GPU or a TPU host."""
    return DeviceCheckSize(
        train,
        resume,
        FULL_ATTENTION,
        # First the number of the config's form for one GPU of 141 GB, then larger parts, which
        # are faster if they fit, then smaller ones for smaller memories.
        microbatches=(4, 2, 8, 16),
        new_tokens=32,
        batches=(1, 64),
        runs=3,
        photos=256,
        photo=(640, 480),
        steps=4,
        needs_accelerator=True,
    )


def tiny_size(train: Experiment, resume: Experiment) -> DeviceCheckSize:
    """Makes the size for the tests, and for a first look on a CPU."""
    return DeviceCheckSize(
        train,
        resume,
        TINY_ATTENTION,
        microbatches=(1,),
        new_tokens=4,
        batches=(1,),
        runs=1,
        photos=4,
        photo=(96, 64),
        steps=2,
        needs_accelerator=False,
    )
