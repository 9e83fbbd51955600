"""What `config.evaluators` declares."""

import dataclasses
import typing
from typing import Any, Literal

from flamingo_jax.configuring import did_you_mean, from_config
from flamingo_jax.errors import UserError
from flamingo_jax.ranges import Count, Positive


@dataclasses.dataclass(frozen=True)
class EvaluatorConfig:
    """A measurement beside the losses, with a period of its own
    (flamingo_jax/evaluation/evaluators).
    """

    kind: Literal["retrieval", "zero_shot_classification", "few_shot"] = "retrieval"
    """retrieval, zero_shot_classification: of a contrastive encoder. few_shot: of a Flamingo."""
    path: str = ""
    """Folder of a prepared TFDS dataset."""
    split: str = "validation"
    """The split whose records are asked about."""
    every: Count = 0
    """Steps from one measurement to the next; 0 for config.training.evaluate_every. The end of a
    run is measured in any case.
    """
    limit: Count = 1000
    """Records at most, drawn by config.seed; 0 for all."""
    batch_size: Positive = 64
    """Images, texts or prompts that go through the model together, at most."""
    classes: tuple[str, ...] = ()
    """Class names of a classification; () for every class that a record of the split has."""
    templates: tuple[str, ...] = ("{}", "a photo of a {}.")
    """zero_shot_classification: texts about a class, its name at {}; the vectors of several are
    averaged (prompt ensembles, as CLIP's 80).
    """
    benchmark: Literal["captioning", "vqa", "classification"] = "captioning"
    """few_shot: what is asked, and so how it is scored."""
    shots: tuple[Count, ...] = (0, 4)
    """few_shot: numbers of support examples before the query."""
    support_split: str = "train"
    """few_shot: the split that support examples are drawn from."""
    support_limit: Count = 256
    """few_shot: support examples at most, drawn by config.seed; 0 for all."""
    max_tokens: Positive = 24
    """few_shot: tokens of an answer at most."""
    beam_size: Positive = 3
    """few_shot: hypotheses of beam search (paper: 3); 1 is greedy."""


def parse_evaluator(text: str) -> EvaluatorConfig:
    """Reads an evaluator that is described on a command line, as
    `kind=retrieval,path=data/photos,limit=500`; several values of one field are joined by +.

    Raises: UserError for what is no field, or no value of it.
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
