"""Published few-shot scores, to stand beside one's own: CIDEr times 100, all else in per cent.

Protocols differ between papers (support sets, prompts, the sizes of evaluated subsets, which
data was trained on): the figures are marks to look at, not a ranking.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

Shots = Mapping[int, float]
"""{number of shots: score}."""


class PublishedModel(NamedTuple):
    """A model's published scores.

    scores: {benchmark: {shots: score}}.
    selection: how its shots were chosen.
    source: where the figures are printed.
    """

    scores: Mapping[str, Shots]
    selection: str
    source: str


def published_scores(benchmark: str, selection: str | None = None) -> dict[str, Shots]:
    """Returns {model: {shots: score}} of a benchmark, {} where nothing is known.

    Args:
      benchmark: its name; case, hyphens and underscores do not matter.
      selection: only models whose shots were chosen in this way, "random" or "rices".
    """
    wanted = _plain(benchmark)
    return {
        name: shots
        for name, model in PUBLISHED.items()
        for known, shots in model.scores.items()
        if _plain(known) == wanted and selection in (None, model.selection)
    }


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _columns(benchmarks: str, rows: Mapping[int, str]) -> dict[str, dict[int, float]]:
    """Reads {shots: a row of scores}, one a benchmark and "-" where there is none."""
    names = benchmarks.split()
    scores: dict[str, dict[int, float]] = {name: {} for name in names}
    for shots, row in rows.items():
        for name, text in zip(names, row.split(), strict=True):
            if text != "-":
                scores[name][shots] = float(text)
    return scores


def _rows(shots: tuple[int, ...], benchmarks: Mapping[str, str]) -> dict[str, dict[int, float]]:
    """Reads {benchmark: a row of scores}, one a number of shots and "-" where there is none."""
    return {
        name: {n: float(text) for n, text in zip(shots, row.split(), strict=True) if text != "-"}
        for name, row in benchmarks.items()
    }


_FLAMINGO = "Alayrac et al. 2022, arXiv 2204.14198, table 1 and appendix: random shots"
_FLAMINGO_CLASSES = (
    "Alayrac et al. 2022, arXiv 2204.14198, classification: prompts of 8 with one example a class"
    " to choose from, of 16 with five"
)
# RareAct is zero-shot only.
_FLAMINGO_SETS = (
    "okvqa vqav2 coco msvd_qa vatex vizwiz flickr30k msrvtt_qa ivqa youcook2 star visdial textvqa"
    " nextqa hateful_memes"
)
_OPEN_FLAMINGO = "Awadalla et al. 2023, arXiv 2308.01390, table 11: mean of 3 seeds, random shots"
_OPEN_FLAMINGO_RICES = "Awadalla et al. 2023, arXiv 2308.01390, table 12: RICES"
_IDEFICS = (
    "model card of HuggingFaceM4/idefics-80b: random shots; trained on data that contains COCO"
)
_MM1 = "McKinzie et al. 2024, arXiv 2403.09611: pre-trained MM1-3B"
_BLIP3 = "Xue et al. 2024, arXiv 2408.08872: pre-trained xGen-MM of 4B"

_ALL = (0, 4, 8, 16, 32)
_IDEFICS_SETS = "vqav2 okvqa textvqa vizwiz textcaps coco nocaps flickr30k visdial hateful_memes"

PUBLISHED: dict[str, PublishedModel] = {
    "Flamingo-3B": PublishedModel(
        _columns(
            _FLAMINGO_SETS,
            {
                0: "41.2 49.2 73.0 27.5 40.1 28.9 60.6 11.0 32.7 55.8 39.6 46.1 30.1 21.3 53.7",
                4: "43.3 53.2 85.0 33.0 50.0 34.0 72.0 14.9 35.7 64.6 41.3 47.3 32.7 22.4 53.6",
                8: "44.6 55.4 90.6 37.0 54.5 38.4 71.7 19.6 36.8 68.0 40.6 47.6 32.4 23.9 54.7",
                16: "45.6 56.7 95.4 40.2 57.1 43.3 73.4 23.4 37.4 73.2 40.1 47.5 31.8 25.2 55.3",
                32: "45.9 57.1 99.0 42.6 59.2 45.5 71.2 25.6 37.7 76.7 41.6 - 30.6 26.1 56.3",
            },
        )
        | {"rareact": {0: 58.4}},
        "random",
        _FLAMINGO,
    ),
    "Flamingo-9B": PublishedModel(
        _columns(
            _FLAMINGO_SETS,
            {
                0: "44.7 51.8 79.4 30.2 39.5 28.8 61.5 13.7 35.2 55.0 41.8 48.0 31.8 23.0 57.0",
                4: "49.3 56.3 93.1 36.2 51.7 34.9 72.6 18.2 37.7 70.8 42.8 50.4 33.6 24.7 62.7",
                8: "50.0 58.0 99.0 40.8 55.2 39.4 73.4 23.9 40.0 75.0 43.4 51.2 33.6 25.8 63.9",
                16: "50.8 59.4 102.2 44.5 58.5 43.0 72.7 27.6 41.5 77.2 42.4 51.3 33.5 27.6 64.5",
                32: "51.0 60.4 106.3 47.2 57.4 44.0 72.8 29.4 40.7 77.3 41.2 - 32.6 28.4 63.5",
            },
        )
        | {"rareact": {0: 57.9}},
        "random",
        _FLAMINGO,
    ),
    "Flamingo-80B": PublishedModel(
        _columns(
            _FLAMINGO_SETS,
            {
                0: "50.6 56.3 84.3 35.6 46.7 31.6 67.2 17.4 40.7 60.1 39.7 52.0 35.0 26.7 46.4",
                4: "57.4 63.1 103.2 41.7 56.0 39.6 75.1 23.9 44.1 74.5 42.4 55.6 36.5 30.8 68.6",
                8: "57.5 65.6 108.8 45.5 60.6 44.8 78.2 27.6 44.8 80.7 42.3 56.4 37.3 32.3 70.0",
                16: "57.8 66.8 110.5 48.4 62.8 48.4 78.9 30.0 45.2 84.2 41.1 56.8 37.6 32.9 70.0",
                32: "57.8 67.6 113.8 52.3 65.1 49.8 75.4 31.0 45.3 86.8 42.2 - 37.9 33.5 70.0",
            },
        )
        | {"rareact": {0: 60.8}, "imagenet": {16: 66.4}, "kinetics700": {16: 51.2}},
        "random",
        _FLAMINGO,
    ),
    "Flamingo-3B, RICES": PublishedModel(
        _rows((8, 16), {"imagenet": "70.9 72.7", "kinetics700": "55.9 58.3"}),
        "rices",
        _FLAMINGO_CLASSES,
    ),
    "Flamingo-9B, RICES": PublishedModel(
        _rows((8, 16), {"imagenet": "71.2 75.2", "kinetics700": "58.0 60.9"}),
        "rices",
        _FLAMINGO_CLASSES,
    ),
    "Flamingo-80B, RICES": PublishedModel(
        _rows((8, 16), {"imagenet": "71.9 76.0", "kinetics700": "60.4 63.5"}),
        "rices",
        _FLAMINGO_CLASSES,
    ),
    "Flamingo-80B, RICES, 6 orders": PublishedModel(
        {"imagenet": {16: 77.3}, "kinetics700": {16: 64.2}}, "rices", _FLAMINGO_CLASSES
    ),
    "OpenFlamingo-3B": PublishedModel(
        _rows(
            _ALL,
            {
                "coco": "74.9 77.3 85.9 89.8 93.0",
                "flickr30k": "52.3 57.2 58.6 59.2 61.1",
                "vqav2": "44.6 45.8 46.2 46.6 47.0",
                "okvqa": "28.2 30.3 31.1 30.9 31.0",
                "textvqa": "24.2 27.0 27.7 28.0 28.3",
                "vizwiz": "23.7 27.0 32.1 36.1 39.8",
                "hateful_memes": "51.2 50.6 52.0 48.5 50.2",
            },
        ),
        "random",
        _OPEN_FLAMINGO,
    ),
    "OpenFlamingo-4B": PublishedModel(
        _rows(
            _ALL,
            {
                "coco": "76.7 81.8 90.7 93.9 95.1",
                "flickr30k": "53.6 60.7 55.9 56.8 56.9",
                "vqav2": "45.1 49.0 48.3 45.5 43.0",
                "okvqa": "30.7 35.1 33.9 28.5 26.4",
                "textvqa": "21.0 25.9 21.3 18.2 14.1",
                "vizwiz": "18.8 26.6 28.8 24.6 23.1",
                "hateful_memes": "52.3 51.5 55.2 54.5 52.2",
            },
        ),
        "random",
        _OPEN_FLAMINGO,
    ),
    "OpenFlamingo-9B": PublishedModel(
        _rows(
            _ALL,
            {
                "coco": "79.5 89.0 96.3 98.8 99.5",
                "flickr30k": "59.5 65.8 62.9 62.8 61.3",
                "vqav2": "52.7 54.8 54.8 54.3 53.3",
                "okvqa": "37.8 40.1 41.1 42.7 42.4",
                "textvqa": "24.2 28.2 29.1 27.3 23.8",
                "vizwiz": "27.5 34.1 38.5 42.5 44.0",
                "hateful_memes": "51.6 54.0 54.7 53.9 53.8",
            },
        ),
        "random",
        _OPEN_FLAMINGO,
    ),
    "OpenFlamingo-3B, RICES": PublishedModel(
        _rows(
            _ALL,
            {
                "coco": "81.6 91.3 97.4 102.2 105.5",
                "flickr30k": "46.0 54.0 58.6 62.0 65.5",
                "vqav2": "44.5 45.9 47.0 48.0 49.1",
                "okvqa": "28.6 31.0 32.6 33.8 35.1",
                "textvqa": "24.5 27.2 28.0 27.5 29.2",
                "vizwiz": "32.1 37.3 41.7 44.8 45.8",
                "hateful_memes": "63.9 66.1 67.2 68.1 68.2",
            },
        ),
        "rices",
        _OPEN_FLAMINGO_RICES,
    ),
    "OpenFlamingo-4B, RICES": PublishedModel(
        _rows(
            _ALL,
            {
                "coco": "75.9 89.0 96.6 102.4 105.1",
                "flickr30k": "36.3 48.9 51.3 56.5 56.2",
                "vqav2": "44.9 49.0 48.5 46.6 44.5",
                "okvqa": "31.0 34.8 33.3 29.2 28.7",
                "textvqa": "22.8 26.7 22.7 19.5 17.93",
                "vizwiz": "28.0 37.4 35.7 31.5 27.3",
                "hateful_memes": "64.8 65.4 67.8 67.5 64.4",
            },
        ),
        "rices",
        _OPEN_FLAMINGO_RICES,
    ),
    "OpenFlamingo-9B, RICES": PublishedModel(
        _rows(
            _ALL,
            {
                "coco": "76.8 93.1 99.8 105.6 109.0",
                "flickr30k": "39.2 52.2 58.7 60.6 63.0",
                "vqav2": "53.0 55.1 56.0 56.6 56.8",
                "okvqa": "38.3 42.0 44.1 45.1 46.3",
                "textvqa": "28.3 34.2 34.8 33.4 31.1",
                "vizwiz": "34.6 41.0 45.0 46.2 46.4",
                "hateful_memes": "67.1 70.1 71.2 73.2 73.6",
            },
        ),
        "rices",
        _OPEN_FLAMINGO_RICES,
    ),
    "IDEFICS-9B": PublishedModel(
        _columns(
            _IDEFICS_SETS,
            {
                0: "50.9 38.4 25.9 35.5 25.4 46.0 36.8 27.3 48.7 51.7",
                4: "55.4 45.5 27.6 36.9 60.0 93.0 81.3 59.7 47.9 50.7",
                8: "56.4 47.7 27.5 40.4 63.2 97.0 86.8 61.9 47.6 51.0",
                16: "57.0 48.4 27.9 42.6 67.4 99.7 89.4 64.5 - 50.9",
                32: "57.9 49.6 28.3 43.7 68.1 98.0 90.5 64.4 - 49.8",
            },
        )
        | {"imagenet": {16: 53.5}},
        "random",
        _IDEFICS,
    ),
    "IDEFICS-80B": PublishedModel(
        _columns(
            _IDEFICS_SETS,
            {
                0: "60.0 45.2 30.9 36.0 56.8 91.8 65.0 53.7 48.8 60.6",
                4: "63.6 52.4 34.4 40.4 72.7 110.3 99.6 73.7 48.4 57.8",
                8: "64.8 55.1 35.7 46.1 77.6 114.3 105.7 76.6 47.9 58.2",
                16: "65.4 56.8 36.3 48.3 81.4 116.6 107.0 80.1 - 55.8",
                32: "65.9 57.8 36.7 50.0 82.7 116.6 107.5 81.1 - 52.5",
            },
        )
        | {"imagenet": {16: 65.4}},
        "random",
        _IDEFICS,
    ),
    "IDEFICS-9B, RICES": PublishedModel({"imagenet": {16: 64.5}}, "rices", _IDEFICS),
    "IDEFICS-80B, RICES": PublishedModel({"imagenet": {16: 72.9}}, "rices", _IDEFICS),
    "MM1-3B": PublishedModel(
        _columns(
            "coco nocaps textcaps okvqa textvqa vizwiz vqav2",
            {
                0: "73.5 55.6 63.3 26.1 29.4 15.6 46.2",
                4: "112.3 99.7 84.1 48.6 45.3 38.0 57.9",
                8: "114.6 104.7 88.8 48.4 44.6 46.4 63.6",
            },
        ),
        "random",
        _MM1,
    ),
    "BLIP-3 4B": PublishedModel(
        _columns(
            "coco nocaps textcaps okvqa textvqa vizwiz vqav2",
            {
                0: "81.7 80.2 60.7 26.5 36.0 21.2 48.1",
                4: "110.5 101.7 84.6 49.2 46.1 38.4 63.9",
                8: "112.1 104.4 87.7 49.1 46.4 44.3 63.8",
            },
        ),
        "random",
        _BLIP3,
    ),
}
