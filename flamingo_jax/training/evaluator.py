"""The interface of evaluators: measurements by name that the training loop makes at periods of
their own.
"""

from collections.abc import Mapping
from typing import Protocol

import jax

from flamingo_jax.training.state import Parameters


class Evaluator(Protocol):
    """Measures the current model: held-out losses, few-shot scores, retrieval, ...

    All processes call it at the same steps, with the run's mesh set.

    every: the period in steps, at least 1; it is also called at the end of the run.
    """

    every: int

    def compile(
        self, trainable: Parameters, frozen: Parameters
    ) -> Mapping[str, jax.stages.Compiled]:
        """Compiles its programs before the first step, so that running out of memory shows
        then. Returns them by name, for the log; may return none.
        """

    def __call__(self, trainable: Parameters, frozen: Parameters) -> Mapping[str, float]:
        """Measures the model: {metric: value}, recorded as <evaluator's name>/<metric>."""


def due(evaluators: Mapping[str, Evaluator], step: int) -> dict[str, Evaluator]:
    """Returns the evaluators that run after this step."""
    return {
        name: evaluator for name, evaluator in evaluators.items() if step % evaluator.every == 0
    }


def evaluate(
    evaluators: Mapping[str, Evaluator], trainable: Parameters, frozen: Parameters
) -> dict[str, float]:
    """Runs evaluators one after the other: {<evaluator's name>/<metric>: value}."""
    return {
        f"{name}/{metric}": value
        for name, evaluator in evaluators.items()
        for metric, value in evaluator(trainable, frozen).items()
    }
