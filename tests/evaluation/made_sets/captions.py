"""Made captioning sets in their owners' layouts: coloured squares and clips."""

import json
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from tests.processing.films import write

COLOURS = ("red", "green", "blue", "grey", "white", "black")
THINGS = ("square", "wall", "cloth", "sheet", "door", "table", "cup")


def caption(number: int, other: int = 0) -> str:
    """Differs for 42 numbers; `other` makes an image's other captions."""
    colour, thing = COLOURS[number % 6], THINGS[number % 7]
    texts = (
        f"A {colour} {thing} number {number}.",
        f"there is a {colour} {thing} in the image ",
        f"Something {colour} that fills all of it",
        f"a photo of one {thing}, which is {colour}",
        f"The {thing} is {colour} all over.",
    )
    return texts[other % 5]


def save_image(path: pathlib.Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(number).integers(0, 256, 3).astype(np.uint8)
    Image.fromarray(np.broadcast_to(drawn, (16, 24, 3)).copy()).save(path, quality=95)


def save_clip(path: pathlib.Path, number: int, frames: int = 8) -> None:
    level = 3 * (number % 40)
    write(path, [level + 6 * n for n in range(frames)], rate=4, codec="mpeg4", size=32)


def save_json(path: pathlib.Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def sentences(number: int, count: int = 5) -> list[dict[str, Any]]:
    texts = [caption(number, other) for other in range(count)]
    return [
        {"raw": text, "tokens": text.lower().strip(" .").split(), "imgid": number, "sentid": n}
        for n, text in enumerate(texts)
    ]


def make_coco(folder: pathlib.Path) -> None:
    """6 images of test, 2 of val, 34 of train and 8 of restval."""
    images = []
    for number in range(50):
        split = "test val restval train".split()[np.searchsorted([6, 8, 16], number, "right")]
        part = "train2014" if split == "train" else "val2014"
        name = f"COCO_{part}_{number:012d}.jpg"
        save_image(folder / part / name, number)
        images.append(
            {"filepath": part, "filename": name, "cocoid": number, "imgid": number, "split": split}
            | {"sentences": sentences(number), "sentids": list(range(5))}
        )
    save_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def make_flickr30k(folder: pathlib.Path) -> None:
    images = []
    for number in range(50):
        split = "test" if number < 6 else "val" if number < 8 else "train"
        name = f"{1_000_000 + number}.jpg"
        save_image(folder / "flickr30k-images" / name, number)
        images.append(
            {"filename": name, "imgid": number, "split": split, "sentids": list(range(5))}
            | {"sentences": sentences(number)}
        )
    save_json(folder / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def make_nocaps(folder: pathlib.Path) -> None:
    make_coco(folder / "coco")
    domains = ("in-domain", "near-domain", "out-domain")
    images = []
    for number in range(9):
        name = f"{number:016x}.jpg"
        save_image(folder / "val" / name, 100 + number)
        images.append(
            {"id": number, "file_name": name, "open_images_id": name[:-4], "height": 16}
            | {"width": 24, "domain": domains[number % 3], "license": 0}
        )
    annotations = [
        {"id": 10 * image + n, "image_id": image, "caption": caption(image, n)}
        for image in range(9)
        for n in range(10)
    ]
    content = {"licenses": [], "info": {}, "images": images, "annotations": annotations}
    save_json(folder / "nocaps_val_4500_captions.json", content)
    save_image(folder / "test" / "00000000000000ff.jpg", 255)
    image = {"id": 7, "file_name": "00000000000000ff.jpg", "open_images_id": "00000000000000ff"}
    save_json(folder / "nocaps_test_image_info.json", {"images": [image]})


def make_textcaps(folder: pathlib.Path) -> None:
    for split, numbers in (("val", range(6)), ("train", range(6, 46))):
        data = []
        for number in numbers:
            image = f"{number:016x}"
            save_image(folder / "train_images" / f"{image}.jpg", number)
            texts = [caption(number, n) for n in range(5)]
            data += [
                {"image_id": image, "image_name": image, "image_path": f"train/{image}.jpg"}
                | {"caption_id": 5 * number + n, "caption_str": text, "reference_strs": texts}
                for n, text in enumerate(texts)
            ]
        content = {"dataset_type": split, "dataset_version": "0.1", "data": data}
        save_json(folder / f"TextCaps_0.1_{split}.json", content)
    save_image(folder / "test_images" / f"{99:016d}.jpg", 99)
    save_json(folder / "TextCaps_0.1_test.json", {"data": [{"image_id": f"{99:016d}"}]})


def make_vatex(folder: pathlib.Path) -> None:
    """Clips of their own, but for the last query's, which is a part of a whole video."""
    parts = {
        "public_test_english_v1.1": range(6),
        "validation_v1.0": range(6, 8),
        "training_v1.0": range(8, 50),
    }
    for name, numbers in parts.items():
        entries = []
        for number in numbers:
            youtube, start = f"yt_{number:08d}", number % 3
            clip = f"{youtube}_{start:06d}_{start + 1:06d}"
            save_clip(folder / "videos" / f"{youtube if number == 5 else clip}.mp4", number, 16)
            captions = [caption(number, n) for n in range(10)]
            entries.append({"videoID": clip, "enCap": captions, "chCap": []})
        save_json(folder / f"vatex_{name}.json", entries)


def make_youcook2(folder: pathlib.Path) -> None:
    """3 videos of 3 steps to ask about, and 40 of 2 as support."""
    database = {}
    for number in range(43):
        subset, steps = ("validation", 3) if number < 3 else ("training", 2)
        recipe = str(101 + number % 3)
        name, ending = f"cook_{number:06d}", ("mp4", "mkv")[number % 2]
        path = folder / "raw_videos" / subset / recipe / f"{name}.{ending}"
        save_clip(path, number, 16)
        database[name] = {
            "duration": 4.0,
            "subset": subset,
            "recipe_type": recipe,
            "video_url": f"https://www.youtube.com/watch?v={name}",
            "annotations": [
                {"id": n, "segment": [n, n + 2], "sentence": caption(3 * number + n, n)}
                for n in range(steps)
            ],
        }
    save_json(folder / "youcookii_annotations_trainval.json", {"database": database})


MADE = {
    "coco": make_coco,
    "flickr30k": make_flickr30k,
    "nocaps": make_nocaps,
    "textcaps": make_textcaps,
    "vatex": make_vatex,
    "youcook2": make_youcook2,
}
