"""Mean weighted average precision, the metric of RareAct (Miech et al. 2020), as its
compute_score.py computes it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flamingo_jax.evaluation.metrics.average_precision import average_precision

POSITIVE, NEGATIVE = 1, 0
"""Annotations of a segment: its class is shown; neither the verb nor the noun. The others (2, 3
and 4: the verb alone, the noun alone, both but not together) are hard negatives.
"""


class RareActSegment(NamedTuple):
    """A row of rareact.csv."""

    video: str
    class_id: int
    verb: str
    noun: str
    annotation: int


def weighted_average_precisions(
    segments: Sequence[RareActSegment], scores: np.ndarray
) -> dict[tuple[str, str], float]:
    """Computes the average precision of each action with a positive segment.

    Segments that show another action are negatives too, so all segments of a video share a weight
    of 1 among the positives, among the negatives, and among the hard negatives.

    Args:
      segments: the rows of rareact.csv, in its order.
      scores: float [rows, classes], how well each class fits each row's segment.

    Returns: {(verb, noun): 0 to 1}. mWAP is their mean.
    """
    classes = {(row.verb, row.noun): row.class_id for row in segments}
    verbs = np.array([row.verb for row in segments])
    nouns = np.array([row.noun for row in segments])
    annotations = np.array([row.annotation for row in segments])
    found = {}
    for (verb, noun), class_id in classes.items():
        shares_verb, shares_noun = verbs == verb, nouns == noun
        own = shares_verb & shares_noun
        other = (annotations == POSITIVE) & ~own
        positive = own & (annotations == POSITIVE)
        negative = own & (annotations == NEGATIVE) | other & ~shares_verb & ~shares_noun
        hard = own & ~positive & (annotations != NEGATIVE) | other & (shares_verb ^ shares_noun)
        if positive.any():
            places = [np.flatnonzero(group) for group in (positive, negative, hard)]
            weights = np.concatenate([_video_weights(segments, group) for group in places])
            labels = np.arange(len(weights)) < len(places[0])
            found[verb, noun] = average_precision(
                labels, scores[np.concatenate(places), class_id], weights
            )
    return found


def _video_weights(segments: Sequence[RareActSegment], places: np.ndarray) -> np.ndarray:
    """Returns 1 over the number of rows among `places` of the same video."""
    count = Counter(segments[place].video for place in places)
    return np.array([1.0 / count[segments[place].video] for place in places])
