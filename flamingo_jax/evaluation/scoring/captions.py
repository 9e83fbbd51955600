"""Scores captions in COCO's forms, as pycocoevalcap does."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.metrics.bleu import bleu, bleu_statistics
from flamingo_jax.evaluation.metrics.cider import cider, cider_d
from flamingo_jax.evaluation.metrics.meteor import meteor
from flamingo_jax.evaluation.metrics.ngrams import ORDERS
from flamingo_jax.evaluation.metrics.rouge_l import rouge_l
from flamingo_jax.evaluation.ptb.tokenizer import tokenize
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.scoring.report import ScoreReport, match
from flamingo_jax.evaluation.statistics import (
    RESAMPLES,
    Estimate,
    Statistic,
    bootstrap_estimate,
    mean_estimate,
)


def score_caption_files(
    references: str, predictions: str, *, with_meteor: bool = False, skip_incomplete: bool = False
) -> ScoreReport:
    """Scores a file of predicted captions.

    Args:
      references: COCO's annotation form, {"images": [{"id"}], "annotations": [{"image_id",
        "caption"}]}.
      predictions: COCO's result form, [{"image_id", "caption"}], one an image.
      with_meteor: whether to compute METEOR, which needs Java.
      skip_incomplete: whether to go on with the images that have a prediction and references.

    Raises: UserError for a malformed file, and for missing or surplus predictions.
    """
    truths = read_references(references)
    found = files.by_id(
        (
            (
                files.field(entry, "image_id", f"{predictions}, entry {place},", int, str),
                files.field(entry, "caption", f"{predictions}, entry {place},", str),
            )
            for place, entry in enumerate(files.as_list(files.read_json(predictions), predictions))
        ),
        predictions,
    )
    matched = match(truths, found, "image", skip_incomplete)
    about = {
        "tokenizer": "Penn Treebank, as pycocoevalcap's",
        "references": sum(len(truths[image]) for image in matched.scored),
        "references_sha256": files.digest(references),
    }
    metrics, items = score_captions(
        [found[image] for image in matched.scored],
        [truths[image] for image in matched.scored],
        with_meteor=with_meteor,
    )
    items = [{"id": image, **item} for image, item in zip(matched.scored, items, strict=True)]
    return ScoreReport(metrics, items, about, matched.missing, matched.surplus)


def score_captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    with_meteor: bool = False,
    resamples: int = RESAMPLES,
    clusters: Sequence[object] | None = None,
    types: Sequence[str] = (),
) -> tuple[dict[str, Estimate], list[dict[str, Any]]]:
    """Scores captions, untokenized.

    Args:
      predictions: one an image.
      references: one or more an image.
      with_meteor: whether to compute METEOR.
      resamples: of the images, for BLEU's errors. The errors of CIDEr are those of a mean: the
        images' weights of n-grams are taken as given.
      clusters: what each image belongs to, such as its video, for errors; by default each is
        alone.
      types: of each image; the CIDEr-D of each type is added, whose weights of n-grams are those
        of the type's own references, as NoCaps' domains are scored.

    Returns: {metric: score of the set with its error}, and {metric: score} of each image.
    """
    truths = tokenize_groups(references)
    found = tokenize(predictions)
    statistics = bleu_statistics(found, truths)
    per_image = {
        "CIDEr-D": cider_d(found, truths),
        "CIDEr-plain": cider(found, truths),
        **{f"BLEU-{n + 1}": scores for n, scores in enumerate(bleu(statistics).T)},
        "ROUGE-L": np.array([rouge_l(*pair) for pair in zip(found, truths, strict=True)]),
    }
    metrics = {name: mean_estimate(scores, clusters) for name, scores in per_image.items()}
    for n in range(ORDERS):
        metrics[f"BLEU-{n + 1}"] = bootstrap_estimate(
            _corpus_bleu(statistics, n), len(found), clusters, resamples=resamples
        )
    for name in sorted(set(types)):
        some = [place for place, one in enumerate(types) if one == name]
        alone = cider_d([found[place] for place in some], [truths[place] for place in some])
        own = [clusters[place] for place in some] if clusters is not None else None
        metrics[f"CIDEr-D, {name}"] = mean_estimate(alone, own)
    if with_meteor:
        score, scores = meteor(found, truths)
        per_image["METEOR"] = np.array(scores)
        # The set's score is made of all images' matches; its error is taken as that of the mean.
        mean = mean_estimate(scores, clusters)
        shift = score - mean.score
        metrics["METEOR"] = Estimate(
            score, mean.standard_error, mean.low + shift, mean.high + shift
        )
    rows = zip(*(scores.tolist() for scores in per_image.values()), strict=True)
    return metrics, [dict(zip(per_image, row, strict=True)) for row in rows]


def _corpus_bleu(statistics: np.ndarray, n: int) -> Statistic:
    """Returns BLEU-(n + 1) of images drawn so many times each."""
    return lambda counts: float(bleu(counts @ statistics)[n])


def tokenize_groups(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Tokenizes the captions of all images as one text, as pycocoevalcap does."""
    tokens = iter(tokenize([caption for group in groups for caption in group]))
    return [[next(tokens) for _ in group] for group in groups]


def read_references(place: str) -> dict[Any, list[str]]:
    """Reads COCO's annotation form: {image id: captions} in the order of the file's images.

    Raises: UserError for a malformed file, and for an image without a caption.
    """
    content = files.as_dict(files.read_json(place), place)
    captions: dict[Any, list[str]] = {}
    for number, entry in enumerate(files.field(content, "images", place, list)):
        captions[files.field(entry, "id", f"{place}, image {number},", int, str)] = []
    for number, entry in enumerate(files.field(content, "annotations", place, list)):
        where = f"{place}, annotation {number},"
        image = files.field(entry, "image_id", where, int, str)
        if image not in captions:
            raise UserError(f"{where} is of image {image}, which is not among the file's images")
        captions[image].append(files.field(entry, "caption", where, str))
    without = [image for image, found in captions.items() if not found]
    if without:
        raise UserError(
            f"{place} has {len(without):,} images without a caption, such as {without[0]}: each"
            " needs a reference"
        )
    return captions
