"""What generation returns."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Completion:
    """The continuation of a prompt.

    score: the log-probability of all tokens that were generated: of `text`, and where it is
      finished of the <EOC> or the stop string that ends it.
    finished: whether it ended by itself, within `max_tokens`.
    tokens: the text's ids, without <EOC>.
    alternatives: with `n_best`, the n_best - 1 next best answers of beam search, the best first.
    """

    text: str
    score: float
    finished: bool
    tokens: tuple[int, ...] = ()
    alternatives: tuple["Completion", ...] = ()
