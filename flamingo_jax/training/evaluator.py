"""Measures what the training losses do not say, by name and with periods of its own."""

from collections.abc import Mapping
from typing import Protocol

import jax

from flamingo_jax.training.state import Parameters


class Evaluator(Protocol):
    """Measures the model as it is: held-out losses, few-shot scores, retrieval, ...

    All processes call it at the same steps, with the run's mesh set.

    every: it is called when so many steps have been trained since the last time, and when the
      run ends. At least 1.
    """

    every: int

    def compile(
        self, trainable: Parameters, frozen: Parameters
    ) -> Mapping[str, jax.stages.Compiled]:
        """Compiles what it will run, before the first step: what does not fit in memory is known
        then. Returns the programs by name, whose memory is shown; may return none.
        """

    def __call__(self, trainable: Parameters, frozen: Parameters) -> Mapping[str, float]:
        """Measures: {metric: value}, which is recorded as <evaluator's name>/<metric>."""


def due(evaluators: Mapping[str, Evaluator], step: int) -> dict[str, Evaluator]:
    """Returns those evaluators whose turn comes after this many steps."""
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
