"""The schema of `config.evaluators`, and its form on the command line."""

import dataclasses
import typing
from typing import Any, Literal

from flamingo_jax.configuring import did_you_mean, from_config
from flamingo_jax.errors import UserError
from flamingo_jax.ranges import Count, Positive


@dataclasses.dataclass(frozen=True)
class EvaluatorConfig:
    """Config of one evaluator: a metric besides the losses, measured periodically in training
    (flamingo_jax/evaluation/evaluators).
    """

    kind: Literal["retrieval", "zero_shot_classification", "few_shot"] = "retrieval"
    """retrieval, zero_shot_classification: of a contrastive encoder. few_shot: of a Flamingo.
    """
    path: str = ""
    """Folder of a prepared TFDS dataset."""
    split: str = "validation"
    """The split that is evaluated on."""
    every: Count = 0
    """Steps from one measurement to the next; 0 for config.training.evaluate_every. It is
    always measured at the end of a run too.
    """
    limit: Count = 1000
    """The most records, drawn at random by config.seed; 0 for all."""
    batch_size: Positive = 64
    """The most images, texts or prompts in a batch."""
    classes: tuple[str, ...] = ()
    """Class names of a classification; () for all classes in the split."""
    templates: tuple[str, ...] = ("{}", "a photo of a {}.")
    """zero_shot_classification: prompts with the class name at {}; the embeddings of several
    are averaged (prompt ensembling, as with CLIP's 80 templates).
    """
    benchmark: Literal["captioning", "vqa", "classification"] = "captioning"
    """few_shot: the task, which also determines the metric."""
    shots: tuple[Count, ...] = (0, 4)
    """few_shot: numbers of support examples before the query."""
    support_split: str = "train"
    """few_shot: the split that support examples are drawn from."""
    support_limit: Count = 256
    """few_shot: the most support examples, drawn at random by config.seed; 0 for all."""
    max_tokens: Positive = 24
    """few_shot: the most tokens of a generated answer."""
    beam_size: Positive = 3
    """few_shot: number of beams (paper: 3); 1 is greedy decoding."""


def parse_evaluator(text: str) -> EvaluatorConfig:
    """Parses the flag --evaluator, such as `kind=retrieval,path=data/photos,limit=500`;
    several values of one field are joined by +.

    Raises: UserError for an unknown field or a value of the wrong type.
    """
    kinds = typing.get_type_hints(EvaluatorConfig)
    given: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or key not in kinds:
            raise UserError(
                f"--evaluator={text}: {part!r} is no KEY=VALUE of its fields"
                f"{did_you_mean(key, kinds) or ': ' + ', '.join(kinds)}"
            )
        several = typing.get_origin(kinds[key]) is tuple
        item = typing.get_args(kinds[key])[0] if several else kinds[key]
        values = value.split("+") if several else [value]
        if item is int:
            try:
                values = [int(one) for one in values]  # type: ignore[misc]
            except ValueError:
                raise UserError(
                    f"--evaluator={text}: {key} is {value!r}, but must be an int"
                ) from None
        given[key] = tuple(values) if several else values[0]
    return from_config(EvaluatorConfig, given, "--evaluator")
