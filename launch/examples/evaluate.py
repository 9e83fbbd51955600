"""Evaluates few-shot captioning on your own images, with a control that shows how much the
images contribute.

    python -m launch.examples.evaluate my_photos --model=runs/quickstart/flamingo/export

The folder has a `captions.jsonl` (see captions.py). The metric is the share of images whose
caption is generated word for word; in the control, each prompt has the image of another query.
`launch.evaluate` has benchmarks, RICES and a report.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from typing import Any

import flamingo_jax as fj
from launch.examples.captions import Captioned, read_captions


def prompt(shots: Sequence[Captioned], image: fj.Image, words: str) -> list[Any]:
    """Makes a few-shot prompt: examples with their captions, then the query image (paper
    3.1).
    """
    parts: list[Any] = []
    for shot in shots:
        parts += [shot.image, f"{words} {shot.caption.strip()}"]
    return [*parts, image, words]


def plain(text: str) -> str:
    """Normalises a caption for comparison: lower case, no final period, single spaces."""
    return " ".join(text.lower().strip(" .").split())


def exact_match_rate(
    model: fj.Model, prompts: list[list[Any]], queries: Sequence[Captioned]
) -> float:
    """Returns the share of queries whose caption is generated word for word, 0 to 1."""
    answers = model.generate(prompts)
    pairs = zip(answers, queries, strict=True)
    return sum(plain(a.text) == plain(query.caption) for a, query in pairs) / len(queries)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="images and captions.jsonl")
    parser.add_argument("--model", default="runs/quickstart/flamingo/export")
    parser.add_argument("--prompt", default="Output:", help="what stands behind an image")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--queries", type=int, default=100, help="images asked about, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    records = read_captions(options.folder)
    draw = random.Random(options.seed)
    draw.shuffle(records)
    most = max(options.shots)
    if len(records) < most + 2:
        raise fj.UserError(
            f"{options.folder} has {len(records)} captions, but {most} shots and 2 queries are"
            " needed: write more, or ask for fewer --shots"
        )
    count = min(options.queries, len(records) - most)
    queries, support = records[:count], records[count:]
    # The control: query i gets the image of query i + 1.
    others = [*queries[1:], queries[0]]
    model = fj.load(options.model)
    print("shots  right  with another's image")
    for shots in options.shots:
        drawn = [draw.sample(support, shots) for _ in queries]
        figures = [
            exact_match_rate(
                model,
                [
                    prompt(some, one.image, options.prompt)
                    for some, one in zip(drawn, shown, strict=True)
                ],
                queries,
            )
            for shown in (queries, others)
        ]
        print(f"{shots:5d}  {figures[0]:5.1%}  {figures[1]:5.1%}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except fj.UserError as error:
        sys.exit(f"error: {error}")
