"""Checks the content of language model tensors that have no parameter here: whether such a
tensor can be ignored depends on its values, not on its name.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping

import numpy as np

from flamingo_jax.checkpointing.stored_tensors import StoredTensor, read_whole, same_bytes
from flamingo_jax.experiment import LanguageModelConfig
from flamingo_jax.interop.families.family import Family
from flamingo_jax.interop.families.llama import FREQUENCIES
from flamingo_jax.models.positions import rotary_frequencies

log = logging.getLogger(__name__)


def with_own_head(
    config: LanguageModelConfig, family: Family, stored: Mapping[str, StoredTensor]
) -> LanguageModelConfig:
    """Returns the config with tied_embeddings off if the files hold a head that differs from
    the embedding.

    transformers 5 do the same: if config.json says "tied" and the tensors differ, it is wrong.
    """
    embedding, head = (
        stored.get(name, stored.get(name.removeprefix(family.prefix)))
        for name in (family.embedding, family.head)
    )
    if not config.tied_embeddings or embedding is None or head is None:
        return config
    if same_bytes(head, embedding):
        return config
    log.warning(
        "%s ties its head to the embedding in config.json, but %s is another tensor, which is"
        " read as the head: set tie_word_embeddings to false there",
        head.file.parent,
        family.head,
    )
    return dataclasses.replace(config, tied_embeddings=False)


def differing(config: LanguageModelConfig, stored: Mapping[str, StoredTensor]) -> list[str]:
    """Returns a clause for each stored tensor of rotary frequencies that differs from those of
    the
    config: the model was then trained with another base or scaling.
    """
    found = []
    for name, tensor in stored.items():
        if not re.fullmatch(FREQUENCIES, name):
            continue
        given = config.positions
        pairs = int(config.attention.head_width * given.fraction) // 2
        ours = rotary_frequencies(pairs, given.base, given.scaling)
        theirs = read_whole(tensor).astype(np.float64)
        # Half a unit of bfloat16's last place, in which some are stored, is 0.4 %.
        if theirs.shape != ours.shape or not np.allclose(theirs, ours, rtol=5e-3, atol=0):
            found.append(f"{name} is not what the config's rope_theta and scaling make it")
    return found
