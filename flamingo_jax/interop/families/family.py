"""Defines `Family`: how the config and the tensors of a family of published models are read.

The other files of this folder are one family each.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from flamingo_jax.checkpointing.stored_tensors import Term
from flamingo_jax.interop.documents import Document

ModelPart = Literal["language_model", "vision_encoder"]
TensorTable = dict[str, tuple[Term, ...]]
"""{stacked name of a parameter here: the tensors it is the sum of}; {} in a tensor's name is
the index of the layer.
"""


@dataclasses.dataclass(frozen=True)
class Family:
    """Describes the models of one `model_type` of Hugging Face's transformers.

    To add a family, write a file beside this one with its FAMILY, add a row to
    `families.FAMILIES` and a small case to tests/interop/cases.py, and run
    `python -m tests.interop.make_fixtures CASE`, which writes the outputs of transformers'
    module.
    """

    model_type: str
    part: ModelPart
    parse: Callable[[Document, Document], Any]
    """(config.json, preprocessor_config.json or an empty document) -> LanguageModelConfig or
    VisionConfig. Raises UserError for a setting that the model here does not support.
    """
    table: Callable[[Any], TensorTable]
    """Config -> table of tensors. The table may list parameters that the model does not
    have.
    """
    prefix: str
    """Prefix of all tensor names, which is absent if the model was saved without its head."""
    unread: tuple[str, ...] = ()
    """Regular expressions of tensors that are not needed, as the config implies their
    content.
    """
    also_unread: Callable[[Any], tuple[str, ...]] = lambda config: ()
    """Further expressions of this kind, which depend on the config."""
    embedding: str = ""
    head: str = ""
    """Tensor names of a language model's input embedding and output head, which may be
    tied.
    """


def norm(ours: str, theirs: str) -> TensorTable:
    """Returns the table of a LayerNorm with scale and bias, named `ours` here."""
    return {
        f"{ours}/scale": (Term(f"{theirs}.weight"),),
        f"{ours}/bias": (Term(f"{theirs}.bias"),),
    }


def attention(ours: str, theirs: str) -> TensorTable:
    """Returns the table of a projection to heads (query, key or value) and its bias.

    torch stores weights as [out, in] with out = heads x head width; here they are [width,
    heads, head width].
    """
    return {
        f"layers/attention/{ours}": (Term(f"{theirs}.weight", "(h d) w -> w h d"),),
        f"layers/attention/{ours}_bias": (Term(f"{theirs}.bias", "(h d) -> h d"),),
    }
