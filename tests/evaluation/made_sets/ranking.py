"""Made benchmarks, in the layout of the official files, whose candidates are ranked."""

import csv
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from tests.evaluation.made_sets import media

SUPPORT, QUERIES = 44, 6


def write_csv(place: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    with place.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def nextqa_mc(folder: pathlib.Path) -> None:
    """Videos of the test set are in VidOR's folders, with two questions each."""
    mapping = {}
    for split, count in (("test", QUERIES), ("train", SUPPORT)):
        rows = []
        for number in range(count):
            video = f"{400 if split == 'test' else 900}{number // (2 if split == 'test' else 1)}"
            named = f"1164/{video}" if split == "test" else video
            mapping[video] = named
            path = folder / "NExTVideo" / f"{named}.mp4"
            if not path.exists():
                media.video(path, number)
            rows.append(
                {
                    "video": video,
                    "frame_count": 20,
                    "width": 16,
                    "height": 16,
                    "question": f"why did the boy smile {number}",
                    "answer": number % 5,
                    "qid": number,
                    "type": ("CW", "TP", "DO")[number % 3],
                }
                | {f"a{option}": f"reason {option}" for option in range(5)}
            )
        write_csv(folder / f"{split}.csv", rows)
    (folder / "map_vid_vidorID.json").write_text(json.dumps(mapping))


def star(folder: pathlib.Path) -> None:
    """Two questions to each video of val; types in turn."""
    kinds = ("Interaction", "Sequence", "Prediction", "Feasibility")
    things = ["The door.", "The book.", "The bag.", "The shoe."]
    for split, count in (("val", 8), ("train", SUPPORT)):
        questions = []
        for number in range(count):
            video = f"{split.upper()[:1]}{number // 2 if split == 'val' else number:03d}"
            media.video(folder / "Charades_v1_480" / f"{video}.mp4", number)
            questions.append(
                {
                    "question_id": f"{kinds[number % 4]}_T1_{number}",
                    "video_id": video,
                    "start": 1.5,
                    "end": 7.0,
                    "question": f"Which object was taken by the person {number}?",
                    "answer": things[number % 4],
                    "choices": [
                        {"choice_id": place, "choice": thing, "choice_program": []}
                        for place, thing in enumerate(things)
                    ],
                    "question_program": [],
                    "situations": {"000001": {"answer": things[number % 4]}},
                }
            )
        (folder / f"STAR_{split}.json").write_text(json.dumps(questions))


def rareact(folder: pathlib.Path) -> None:
    """Four actions on four videos of three rows each, some of them negatives."""
    actions = [("hammer", "phone"), ("hammer", "egg"), ("wash", "phone"), ("dry", "carrots")]
    rows = []
    for number in range(12):
        verb, noun = actions[number % 4]
        video = f"vid-{number // 3}"
        media.video(folder / "videos" / f"{video}.mp4", number)
        rows.append(
            {
                "id": number,
                "video_id": video,
                "start": number % 3,
                "end": number % 3 + 5,
                "class_id": number % 4,
                "verb": verb,
                "noun": noun,
                "annotation": (1, 1, 1, 1, 0, 2, 3, 4, 1, 0, 1, 1)[number],
            }
        )
    write_csv(folder / "rareact.csv", rows)


def visdial(folder: pathlib.Path) -> None:
    """Dialogues of three rounds with five candidates, two of which are equal texts."""
    questions = ["is it a photo", "what colour is it", "any people"]
    answers = ["yes", "no", "red", "blue", "no", "2 people"]
    for split, count in (("val", QUERIES), ("train", SUPPORT)):
        dialogues = []
        for number in range(count):
            image = 10 + number
            name = {
                "val": f"VisualDialog_val2018/VisualDialog_val2018_{image:012d}.jpg",
                "train": f"train2014/COCO_train2014_{image:012d}.jpg",
            }[split]
            if split == "train" and number % 2:
                name = f"val2014/COCO_val2014_{image:012d}.jpg"
            media.image(folder / name, number * 5)
            turns = [
                {
                    "question": turn,
                    "answer": (number + turn) % 4,
                    "answer_options": [0, 1, 2, 3, 4],
                    "gt_index": (number + turn) % 4,
                }
                for turn in range(3)
            ]
            dialogues.append({"image_id": image, "caption": f"a thing {number}", "dialog": turns})
        data = {"questions": questions, "answers": answers, "dialogs": dialogues}
        content = {"version": "1.0", "split": split, "data": data}
        (folder / f"visdial_1.0_{split}.json").write_text(json.dumps(content))
    dense = [
        {
            "image_id": 10 + number,
            "round_id": 1 + number % 3,
            "gt_relevance": [0.0, 1.0, 0.0, 0.4, 1.0],
        }
        for number in range(QUERIES)
    ]
    (folder / "visdial_1.0_val_dense_annotations.json").write_text(json.dumps(dense))


def hatefulmemes(folder: pathlib.Path) -> None:
    """Every third meme is hateful."""
    for split, count, first in (("test_seen", QUERIES, 1), ("train", SUPPORT, 100)):
        lines = []
        for number in range(first, first + count):
            media.image(folder / "img" / f"{number:05d}.png", number)
            lines.append(
                {
                    "id": number,
                    "img": f"img/{number:05d}.png",
                    "label": int(number % 3 == 0),
                    "text": f'when "you" see {number}',
                }
            )
        text = "\n".join(json.dumps(line) for line in lines)
        (folder / f"{split}.jsonl").write_text(text + "\n")


WNIDS = {"n01440764": "tench", "n01443537": "goldfish", "n02012849": "crane bird"}


def imagenet(folder: pathlib.Path) -> None:
    """Three classes, in folders."""
    (folder / "classnames.txt").parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{wnid} {name}\n" for wnid, name in WNIDS.items())
    (folder / "classnames.txt").write_text(lines)
    for place, wnid in enumerate(WNIDS):
        for number in range(2):
            name = f"ILSVRC2012_val_{3 * number + place + 1:08d}.JPEG"
            media.image(folder / "val" / wnid / name, 60 * place + number)
        for number in range(14):
            media.image(folder / "train" / wnid / f"{wnid}_{number}.JPEG", 60 * place + number)


def kinetics700(folder: pathlib.Path) -> None:
    """Three labels: clips of val in one folder, those of train in one for each label."""
    labels = ("abseiling", "waxing (back)", "zumba")
    for split, count in (("val", QUERIES), ("train", SUPPORT)):
        rows = []
        for number in range(count):
            label, name = labels[number % 3], f"{split[0]}_-{number:03d}"
            parent = folder / split / (label if split == "train" else "")
            media.video(parent / f"{name}_{number:06d}_{number + 10:06d}.mp4", number)
            rows.append(
                {
                    "label": label,
                    "youtube_id": name,
                    "time_start": number,
                    "time_end": number + 10,
                    "split": split,
                }
            )
        write_csv(folder / f"{split}.csv", rows)


def open_mini_imagenet(folder: pathlib.Path, shots: int, ways: int) -> None:
    """Frozen's files of so many shots and ways."""
    words = ["dax", "blicket", "wug", "fep", "toma"][:ways]
    name = f"open_ended_mi_shots_{shots}_ways_{ways}"
    questions = []
    for number in range(1, QUERIES + 1):
        entry: dict[str, Any] = {"question_id": number, "question": "This is a"}
        for place in range(1, shots * ways + 1):
            file = f"{name}_id_{number}_image_{place}.jpg"
            media.image(folder / file, 40 * (place % ways) + number)
            entry[f"image_{place}"] = file
            entry[f"caption_{place}"] = f"This is a {words[place % ways]}"
        entry["question_image"] = f"{name}_id_{number}_question.jpg"
        media.image(folder / entry["question_image"], 40 * (number % ways) + 20)
        questions.append({**entry, "answer": words[number % ways]})
    (folder / f"{name}_all_questions.json").write_text(json.dumps(questions))


def vl_icl_open_mi(folder: pathlib.Path) -> None:
    """Five classes with five images each."""
    words = ["dax", "blicket", "wug", "fep", "toma"]
    queries = []
    for number in range(QUERIES):
        media.image(folder / "query" / f"{number}.jpg", number)
        support = {}
        for place, word in enumerate(words):
            names = [f"{number}_{place}_{at}.jpg" for at in range(5)]
            for at, name in enumerate(names):
                media.image(folder / "support" / name, 50 * place + at)
            paths = [f"open_mi/support/{name}" for name in names]
            support[word] = {"images": paths, "caption": f"This is a {word}"}
        queries.append(
            {
                "id": number,
                "image": [f"open_mi/query/{number}.jpg"],
                "question": "This is a",
                "answer": words[number % 5],
                "classes": words,
                "support": support,
            }
        )
    (folder / "query.json").write_text(json.dumps(queries))


def vl_icl_clevr(folder: pathlib.Path) -> None:
    for split, count in (("query", QUERIES), ("support", SUPPORT)):
        entries = []
        for number in range(count):
            media.image(folder / split / f"CLEVR_{number:06d}.png", number)
            entries.append(
                {
                    "id": number,
                    "image": [f"clevr/{split}/CLEVR_{number:06d}.png"],
                    "question": ("size: large", "shape: cube", "color: red")[number % 3],
                    "answer": number % 4,
                }
            )
        (folder / f"{split}.json").write_text(json.dumps(entries))


def _frozen(shots: int, ways: int) -> Any:
    return lambda folder: open_mini_imagenet(folder, shots, ways)


MADE = {
    "nextqa_mc": nextqa_mc,
    "star": star,
    "rareact": rareact,
    "visdial": visdial,
    "hatefulmemes": hatefulmemes,
    "imagenet": imagenet,
    "kinetics700": kinetics700,
    "vl_icl_open_mi": vl_icl_open_mi,
    "vl_icl_clevr": vl_icl_clevr,
    **{
        f"open_mini_imagenet_shots_{shots}_ways_{ways}": _frozen(shots, ways)
        for ways in (2, 5)
        for shots in (1, 3, 5)
    },
}
"""{benchmark: writes its files to a folder}."""
