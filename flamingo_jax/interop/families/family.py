"""What a family of published models is to the code that reads folders."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from flamingo_jax.checkpointing.stored_tensors import Term
from flamingo_jax.interop.documents import Document

ModelPart = Literal["language_model", "vision_encoder"]
TensorTable = dict[str, tuple[Term, ...]]
"""Our stacked names -> the tensors whose sum they are; {} stands for the layer's number."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one `model_type` of transformers.

    To add a family: a file beside this one with its FAMILY, its row in `families.FAMILIES`, a
    small case in tests/interop/cases.py, and `python -m tests.interop.make_fixtures CASE`, which
    writes what transformers' own module gives.
    """

    model_type: str
    part: ModelPart
    parse: Callable[[Document, Document], Any]
    """(config.json, preprocessor_config.json, empty where there is none) -> LanguageModelConfig
    or VisionConfig. Raises UserError for what the model here cannot do.
    """
    table: Callable[[Any], TensorTable]
    """Where the parameters of a model of this config come from; more names than it has do no
    harm.
    """
    prefix: str
    """Is missing from all names where the model was saved without its head."""
    unread: tuple[str, ...] = ()
    """Regular expressions for tensors that say nothing that the config does not."""
    also_unread: Callable[[Any], tuple[str, ...]] = lambda config: ()
    """More of these, by the config."""
    embedding: str = ""
    head: str = ""
    """Of a language model: the tensors of the tokens in and out, which may be the same."""


def norm(ours: str, theirs: str) -> TensorTable:
    """The rows of a LayerNorm with scale and bias."""
    return {
        f"{ours}/scale": (Term(f"{theirs}.weight"),),
        f"{ours}/bias": (Term(f"{theirs}.bias"),),
    }


def attention(ours: str, theirs: str) -> TensorTable:
    """The rows of a layer's map to heads (query, key or value) and its bias."""
    return {
        f"layers/attention/{ours}": (Term(f"{theirs}.weight", "(h d) w -> w h d"),),
        f"layers/attention/{ours}_bias": (Term(f"{theirs}.bias", "(h d) -> h d"),),
    }
