"""Made sets of questions with generated answers, in the official forms. Split `train` has 40
images or videos, the others four, each with two questions, but VizWiz' images with one.
"""

import csv
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from tests.evaluation.made_sets import media

COUNTS = {"train": 40, "val": 4, "test": 4}
ASKED = ("what color is it?", "how many are there?")
WORDS = ("dog", "cat", "poodle", "toy")


def _texts(number: int, size: int) -> list[str]:
    """What people answered to a question: most say one thing, the first another."""
    said, other = WORDS[number % 4], WORDS[(number + 1) % 4]
    return [other, *[said] * (size - 2), "a " + other]


def _annotators(number: int) -> list[dict[str, Any]]:
    return [
        {"answer": text, "answer_confidence": "yes", "answer_id": n}
        for n, text in enumerate(_texts(number, 10), 1)
    ]


def _stemmed(number: int) -> list[dict[str, Any]]:
    """OK-VQA's: each of five people twice, with the stem beside the answer."""
    return [
        {"answer": text, "raw_answer": f"{text}s", "answer_confidence": "yes", "answer_id": n}
        for n, text in enumerate(_texts(number, 5), 1)
        for _ in range(2)
    ]


def _asked(first: int, count: int) -> Iterator[tuple[int, int, str]]:
    """Yields (question id, image id, question)."""
    for image in range(first, first + count):
        for place, question in enumerate(ASKED):
            yield image * 10 + place, image, question


def _vqa(folder: pathlib.Path, prefix: str, years: dict[str, int], people: Any) -> None:
    for split, first in years.items():
        count = COUNTS.get(split.removesuffix("2014"), 4)
        asked = list(_asked(first, count))
        questions = [
            {"question_id": key, "image_id": image, "question": question}
            for key, image, question in asked
        ]
        _json(
            folder / f"{prefix}OpenEnded_mscoco_{split}_questions.json",
            {"info": {}, "questions": questions},
        )
        images = split.replace("test-dev", "test")
        for image in range(first, first + count):
            media.image(folder / images / f"COCO_{images}_{image:012}.jpg", image * 5)
        if people and "2015" not in split:
            annotations = [
                {
                    "question_id": key,
                    "image_id": image,
                    "question_type": ("one", "other")[key % 2],
                    "answer_type": "other",
                    "answers": people(key),
                }
                for key, image, _ in asked
            ]
            _json(folder / f"{prefix}mscoco_{split}_annotations.json", {"annotations": annotations})


def vqav2(folder: pathlib.Path) -> None:
    """test-dev asks about some of the images of test."""
    years = {"train2014": 100, "val2014": 200, "test2015": 300, "test-dev2015": 300}
    _vqa(folder, "v2_", years, _annotators)


def okvqa(folder: pathlib.Path) -> None:
    _vqa(folder, "", {"train2014": 100, "val2014": 200}, _stemmed)


def textvqa(folder: pathlib.Path) -> None:
    for number, (split, count) in enumerate(COUNTS.items()):
        images = "test_images" if split == "test" else "train_images"
        data = []
        for key, image, question in _asked(100 * number, count):
            entry = {"question_id": key, "image_id": f"{image:016x}", "question": question}
            media.image(folder / images / f"{image:016x}.jpg", image * 5)
            data.append(entry if split == "test" else {**entry, "answers": _texts(key, 10)})
        _json(folder / f"TextVQA_0.5.1_{split}.json", {"dataset_name": "textvqa", "data": data})


def vizwiz(folder: pathlib.Path) -> None:
    for split, count in {**COUNTS, "val": 8, "test": 8}.items():
        entries = []
        for number in range(count):
            name = f"VizWiz_{split}_{number:08}.jpg"
            media.image(folder / split / name, number * 5)
            entry = {"image": name, "question": ASKED[number % 2]}
            answers = [{"answer": text, "answer_confidence": "yes"} for text in _texts(number, 10)]
            more = {"answers": answers, "answer_type": "other", "answerable": 1}
            entries.append(entry if split == "test" else {**entry, **more})
        _json(folder / "Annotations" / f"{split}.json", entries)


def _one_word(folder: pathlib.Path, name: str) -> None:
    first = 1
    for split, count in COUNTS.items():
        entries = [
            {"id": key, "video_id": video, "question": question, "answer": WORDS[video % 4]}
            for key, video, question in _asked(first, count)
        ]
        _json(folder / f"{split}_qa.json", entries)
        for video in range(first, first + count):
            media.video(folder / "video" / name.format(video), video)
        first += count


def msvdqa(folder: pathlib.Path) -> None:
    """Half of the videos have their original names."""
    _one_word(folder, "vid{}.avi")
    lines = []
    for path in sorted((folder / "video").iterdir())[::2]:
        lines.append(f"-aB_{path.stem}_5_15 {path.stem}\n")
        path.rename(path.with_stem(f"-aB_{path.stem}_5_15"))
    (folder / "youtube_mapping.txt").write_text("".join(lines))


def msrvttqa(folder: pathlib.Path) -> None:
    _one_word(folder, "video{}.mp4")


def ivqa(folder: pathlib.Path) -> None:
    """Of every other video there is the part alone."""
    for split, count in COUNTS.items():
        rows = []
        for key, image, question in _asked(0, count):
            video, start = f"{split}-{image}", key % 2
            part = "" if image % 2 else f"_{start}_{start + 8}"
            media.video(folder / "video" / f"{video}{part}.mp4", image)
            rows.append((video, start, start + 8, question, *_texts(key, 5), 1))
        answers = [f"answer{number}" for number in range(1, 6)]
        header = ("video_id", "start", "end", "question", *answers, "conf")
        _csv(folder / f"{split}.csv", header, rows)


def nextqa(folder: pathlib.Path) -> None:
    """Half of the videos are in VidOR's folders."""
    first, mapping = 4924794333, {}
    for split, count in COUNTS.items():
        rows, second = [], {}
        for key, video, question in _asked(first, count):
            mapping[str(video)] = f"1164/{video}" if video % 2 else f"0000/{video}"
            place = mapping[str(video)] if video % 2 else str(video)
            media.video(folder / "NExTVideo" / f"{place}.mp4", video)
            kind = ("TN", "DC", "TP", "CW")[key % 4]
            asked = question.rstrip("?")
            rows.append((video, 300, 640, 480, asked, WORDS[key % 4], key % 10, kind))
            if video % 2:
                second.setdefault(str(video), {})[str(key % 10)] = WORDS[(key + 1) % 4]
        header = ("video", "frame_count", "width", "height", "question", "answer", "qid", "type")
        _csv(folder / f"{split}.csv", header, rows)
        if split == "test":
            _json(folder / "add_reference_answer_test.json", second)
        first += count
    _json(folder / "map_vid_vidorID.json", mapping)


MADE = {
    "vqav2": vqav2,
    "okvqa": okvqa,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "msvdqa": msvdqa,
    "msrvttqa": msrvttqa,
    "ivqa": ivqa,
    "nextqa": nextqa,
}


def _json(path: pathlib.Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _csv(path: pathlib.Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
