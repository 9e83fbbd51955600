"""Writes samples.html, a page with a dataset's statistics and some of its records, to look at
before training.
"""

import hashlib
import heapq
import html
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.build.source import SplitRecord
from data_pipelines.features import TRAIN
from flamingo_jax.processing import images
from flamingo_jax.web_page import FRAMES, Table, page, strip, table

COUNT = 24
HEIGHT = 150
"""Height of an image on the page, in pixels."""
MAX_IMAGES = 6
"""The most images shown of an interleaved page."""
CHARACTERS = 600
"""The most characters shown of a text."""


class RecordSampler:
    """Samples `COUNT` records of the training split, or of all splits if there is none.

    Records with the smallest hashes of their ids are taken: a uniform sample in one pass, the
    same in every build.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[bool, int, int, SplitRecord]] = []
        self._met = 0

    def offer(self, example: SplitRecord) -> None:
        """Adds a record, and drops the one with the largest hash if there are too many."""
        place = int.from_bytes(
            hashlib.blake2b(f"drawn {example.fields['id']}".encode(), digest_size=8).digest()
        )
        self._met += 1
        item = (example.split == TRAIN, -place, -self._met, example)
        if len(self._heap) < COUNT:
            heapq.heappush(self._heap, item)
        else:
            heapq.heappushpop(self._heap, item)

    def examples(self) -> list[SplitRecord]:
        """Returns the sampled records."""
        sampled = [item[3] for item in sorted(self._heap, key=lambda item: item[:3], reverse=True)]
        trained = [example for example in sampled if example.split == TRAIN]
        return trained or sampled


def samples_page(
    name: str, about: str, statistics: Mapping[str, Any], examples: Sequence[SplitRecord]
) -> str:
    """Writes the HTML document: record counts by split, reasons for drops with some names, and
    example records.
    """
    dropped, named = statistics["dropped"], statistics.get("dropped_names", {})
    tables = [
        Table(
            "Records",
            ["", "records"],
            [
                ["read", statistics["records_read"]],
                *statistics["splits"].items(),
                ["dropped", sum(dropped.values())],
            ],
        )
    ]
    if dropped:
        rows = [
            [reason, count, ", ".join(named.get(reason, []))] for reason, count in dropped.items()
        ]
        tables.append(Table("Where dropped records went", ["reason", "records", "such as"], rows))
    if "images" in statistics:
        counts = statistics["images"]
        lost = [[f"dropped: {reason}", count] for reason, count in counts["dropped"].items()]
        tables.append(Table("Images", ["", "images"], [["used", counts["used"]], *lost]))
    if "texts" in statistics:
        texts = statistics["texts"]
        lost = [[f"dropped: {reason}", count] for reason, count in texts["dropped"].items()]
        tables.append(Table("Texts of records", ["", "texts"], [["used", texts["used"]], *lost]))
    cards = "".join(map(_card, examples))
    heading = (
        f"<h2>{len(examples)} records of {html.escape(examples[0].split)}</h2>" if examples else ""
    )
    return page(
        name,
        [
            f"<p>{html.escape(about)}</p>",
            *map(table, tables),
            heading,
            f'<div class="samples">{cards}</div>',
        ],
    )


def _card(example: SplitRecord) -> str:
    """Writes the HTML of one record."""
    fields = example.fields
    parts = [f'<div class="prompt">{_text(fields["id"])}</div>']
    if "texts" in fields:
        for place, text in enumerate(fields["texts"]):
            if 0 < place <= MAX_IMAGES:
                parts.append(_images(fields["images"][place - 1 : place]))
            parts.append(f"<div>{_text(text)}</div>" if place <= MAX_IMAGES else "")
        if len(fields["images"]) > MAX_IMAGES:
            parts.append(
                f'<div class="prompt">and {len(fields["images"]) - MAX_IMAGES} more images</div>'
            )
        return _framed(parts)
    parts.append(_images([fields["image"]] if "image" in fields else fields.get("frames", ())))
    if "question" in fields:
        answers = " | ".join(dict.fromkeys(fields["answers"]))
        parts.append(f"<div>{_text(fields['question'])}</div><div><b>{_text(answers)}</b></div>")
    parts += [f"<div>{_text(caption)}</div>" for caption in fields.get("captions", ())]
    if "text" in fields:
        parts.append(f"<div>{_text(fields['text'])}</div>")
    return _framed(parts)


def _framed(parts: Sequence[str]) -> str:
    return f'<div class="sample right">{"".join(parts)}</div>'


def _text(text: str) -> str:
    return html.escape(text if len(text) <= CHARACTERS else text[:CHARACTERS] + " …").replace(
        "\n", "<br>"
    )


def _images(encoded: Sequence[bytes]) -> str:
    """Writes encoded images as one strip, some of the frames of a long video."""
    if not encoded:
        return ""
    shown = (
        [encoded[place * (len(encoded) - 1) // max(1, FRAMES - 1)] for place in range(FRAMES)]
        if len(encoded) > FRAMES
        else encoded
    )
    try:
        frames = [images.decode(data, 2 * HEIGHT) for data in shown]
    except images.ImageError:
        return '<div class="prompt">(an image that cannot be read)</div>'
    return f'<img src="{strip(frames, HEIGHT, "JPEG")}" alt="">'
