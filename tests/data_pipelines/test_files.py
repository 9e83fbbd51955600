"""Files are found however their names are written, and nothing outside the folders given is."""

import json
import os
import pathlib
import unicodedata

import pytest

from data_pipelines.build import files
from data_pipelines.build.coco import Coco
from data_pipelines.build.html_pages import HtmlPages
from data_pipelines.build.image_folder import ImageFolder
from data_pipelines.build.mmc4 import Mmc4
from data_pipelines.build.obelics import Obelics
from data_pipelines.build.plain_text import PlainText
from data_pipelines.build.questions_folder import QuestionsFolder
from data_pipelines.build.source import Source
from data_pipelines.build.video_folder import VideoFolder
from data_pipelines.build.webdataset import WebDataset
from flamingo_jax.errors import UserError
from tests.data_pipelines.raw import ALL_TRAIN, accounted, colourful, film, lines, save, strings

NFC, NFD = (unicodedata.normalize(form, "Zoë/Müller né.png") for form in ("NFC", "NFD"))
WAYS = [(NFC, NFD), (NFD, NFC), ("sub/a b.png", "sub\\a b.png"), (NFD, NFC.replace("/", "\\"))]
"""Names of a file on disk and in the data."""


@pytest.fixture
def hub(tmp_path: pathlib.Path) -> pathlib.Path:
    """A snapshot as Hugging Face's hub caches one, with links to everywhere; the files it
    names.
    """
    repository = tmp_path / "hub" / "datasets--me--photos"
    snapshot = repository / "snapshots" / "0123abcd"
    save(tmp_path / "secret.png", colourful())
    save(tmp_path / "hub" / "datasets--me--other" / "blobs" / "beef", colourful(), format="PNG")
    save(repository / "blobs" / "cafe", colourful(), format="PNG")
    (snapshot / "deep").mkdir(parents=True)
    os.symlink("../../blobs/cafe", snapshot / "a.png")
    os.symlink("../../../blobs/cafe", snapshot / "deep" / "b.png")
    os.symlink("../../blobs/gone", snapshot / "gone.png")
    os.symlink("../../../datasets--me--other/blobs/beef", snapshot / "other.png")
    os.symlink("../../../../secret.png", snapshot / "secret.png")
    return snapshot


HUB = {"missing": 1, files.LINKED: 2}
"""What is dropped of it: gone.png, other.png and secret.png."""


def of_images(root: pathlib.Path, names: list[str], kind: type) -> Source:
    """A source of each kind that names images below `root`, one record a name."""
    folders = (str(root),)
    if kind is ImageFolder:
        lines(root / "captions.jsonl", *({"image": name, "caption": "x"} for name in names))
    elif kind is QuestionsFolder:
        asked = ({"image": name, "question": "x", "answer": "x"} for name in names)
        lines(root / "qa.jsonl", *asked)
    elif kind is HtmlPages:
        for number, name in enumerate(names):
            (root / f"{number}.html").write_text(f'<meta charset=utf-8>x<img src="{name}">')
    elif kind is Mmc4:
        about = [{"image_name": name, "matched_text_index": 0, "matched_sim": 1} for name in names]
        lines(root / "x.jsonl", *({"text_list": ["x"], "image_info": [one]} for one in about))
    else:
        images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
        told = [{"image_id": number, "caption": "x"} for number in range(len(names))]
        (root / "coco.json").write_text(json.dumps({"images": images, "annotations": told}))
    return kind(folders, shares=ALL_TRAIN)


KINDS = [ImageFolder, QuestionsFolder, HtmlPages, Mmc4, Coco]
NO_IMAGE = "page without an image that is fit"


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_is_found_in_each_of_its_spellings(kind: type, tmp_path: pathlib.Path) -> None:
    for number, (on_disk, _) in enumerate(WAYS):
        save(tmp_path / "raw" / str(number) / on_disk, colourful(seed=number))
    names = [f"{number}/{written}" for number, (_, written) in enumerate(WAYS)]
    records = accounted(tmp_path / "out", of_images(tmp_path / "raw", names, kind), {})
    assert len(records) == len(WAYS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_of_the_hub_is_read_and_no_other_link(
    kind: type, hub: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    names = ["a.png", "deep/b.png", "gone.png", "other.png", "secret.png"]
    source = of_images(hub, names, kind)
    if kind in (HtmlPages, Mmc4):
        records = accounted(tmp_path / "out", source, {NO_IMAGE: 3}, HUB)
    else:
        records = accounted(tmp_path / "out", source, HUB)
    assert len(records) == 2


def test_all_that_is_said_of_a_file_comes_together(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "photos"
    save(root / NFD, colourful())
    film(root / NFD.replace("png", "film"), 2, form="avi")  # An ending that the walk does not list.
    for name in (NFC, NFC.replace("png", "film")):
        ways = [
            name,
            unicodedata.normalize("NFD", name),
            name.replace("/", "\\"),
            str(root / name),
        ]
        kind, key = (ImageFolder, "image") if name == NFC else (VideoFolder, "video")
        told = ({key: way, "caption": str(number)} for number, way in enumerate(ways))
        lines(root / "captions.jsonl", *told)
        source = kind((str(root),), ALL_TRAIN)
        records = accounted(tmp_path / key, source, {})
        assert [strings(record["captions"]) for record in records.values()] == [list("0123")]


def test_a_backslash_in_a_name_is_taken_as_it_stands_first(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "a\\b.png", colourful(seed=1))
    save(tmp_path / "a" / "b.png", colourful(seed=2))
    assert files.find([tmp_path], "a\\b.png") == tmp_path / "a\\b.png"
    assert files.find([tmp_path], "a/b.png") == tmp_path / "a" / "b.png"


@pytest.mark.parametrize(
    "name, reason",
    [
        ("../secret.png", files.OUTSIDE),
        ("..\\secret.png", files.OUTSIDE),
        ("/etc/passwd", files.OUTSIDE),
        ("C:\\secret.png", files.MISSING),
        ("sub/../../secret.png", files.OUTSIDE),
        ("link.png", files.LINKED),
        ("linked/secret.png", files.LINKED),
        ("sub", files.NOT_A_FILE),
        ("pipe.png", files.NOT_A_FILE),
        ("a\0.png", files.MISSING),
        ("", files.MISSING),
        ("x" * 300, files.MISSING),
        ("é" * 300, files.MISSING),
        ("circle.png", files.MISSING),
        ("a.png/b.png", files.MISSING),
    ],
)
def test_why_a_file_is_not_read(name: str, reason: str, tmp_path: pathlib.Path) -> None:
    root = tmp_path / "raw"
    save(root / "a.png", colourful())
    save(tmp_path / "secret.png", colourful())
    (root / "sub").mkdir()
    os.symlink("../secret.png", root / "link.png")
    os.symlink("..", root / "linked")
    os.symlink("circle.png", root / "circle.png")
    os.mkfifo(root / "pipe.png")
    with pytest.raises(files.FileRefused, match=f"^{reason}$"):
        files.find([root], name)


def test_a_link_leads_to_any_of_the_folders_given(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "b" / "x.png", colourful())
    (tmp_path / "a").mkdir()
    os.symlink("../b/x.png", tmp_path / "a" / "y.png")
    with pytest.raises(files.FileRefused, match=files.LINKED):
        files.find([tmp_path / "a"], "y.png")
    assert files.find([tmp_path / "a", tmp_path / "b"], "y.png").samefile(tmp_path / "b" / "x.png")
    assert files.walk(tmp_path / "a", given=[str(tmp_path / "b")]).names == ("y.png",)


def test_folders_that_only_look_like_the_hub_s_open_no_others(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "backups" / "snapshots" / "monday"
    root.mkdir(parents=True)
    save(tmp_path / "backups" / "blobs" / "x.png", colourful())
    os.symlink("../../blobs/x.png", root / "x.png")
    with pytest.raises(files.FileRefused, match=files.LINKED):
        files.find([root], "x.png")


def test_a_walk_lists_each_folder_once_and_says_what_it_refuses(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "raw"
    for name in (
        "b/x.txt",
        "B.TXT",
        "b/c/y.txt",
        ".hidden/z.txt",
        "b/.z.txt",
        "__MACOSX/b/z.txt",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "z.txt").write_text("x")
    for name, target in {
        "a": "b",  # Its files have names of their own.
        "b/c/up": "../..",
        "b/far": "../../far",
        "kept": ".hidden",  # No other name leads there.
        "l.txt": "../far/z.txt",
        "m.txt": "b/x.txt",
        "n.txt": "gone",
        "note.md": "../far/z.txt",
    }.items():
        os.symlink(target, root / name)
    os.mkfifo(root / "p.txt")
    found = files.walk(root, (".txt",))
    assert found.names == ("B.TXT", "b/c/y.txt", "b/x.txt", "kept/z.txt", "m.txt")
    assert [met[:2] for met in found.refused] == [
        ("b/far", files.LINKED_FOLDER),
        ("l.txt", files.LINKED),
        ("n.txt", files.MISSING),
        ("p.txt", files.NOT_A_FILE),
    ]


@pytest.mark.parametrize("kind, ending", [(HtmlPages, "html"), (PlainText, "txt")])
def test_what_a_walk_refuses_is_counted(kind: type, ending: str, tmp_path: pathlib.Path) -> None:
    save(tmp_path / "raw" / "a.png", colourful())
    for name in (f"raw/x.{ending}", f"far/y.{ending}", f"raw/UPPER.{ending.upper()}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('some text <img src="a.png">')
    os.symlink("../far", tmp_path / "raw" / "linked")
    os.symlink(f"../far/y.{ending}", tmp_path / "raw" / f"y.{ending}")
    source = kind((str(tmp_path / "raw"),), ALL_TRAIN)
    dropped = {files.LINKED: 1, files.LINKED_FOLDER: 1}
    assert len(accounted(tmp_path / "out", source, dropped)) == 2


@pytest.mark.parametrize(
    "kind, ending", [(WebDataset, "tar"), (Coco, "json"), (Obelics, "parquet")]
)
def test_a_shard_that_is_not_read_stops_the_build(
    kind: type, ending: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / f"0.{ending}").write_text("x")
    os.symlink(f"../0.{ending}", tmp_path / "raw" / f"1.{ending}")
    with pytest.raises(UserError, match=rf"raw/1.{ending} is not read \({files.LINKED}\)"):
        kind((str(tmp_path / "raw"),)).entries()


def test_a_file_too_large_says_so(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "a.png").open("wb") as sparse:
        sparse.truncate(files.MAX_BYTES + 1)
    with pytest.raises(files.FileRefused, match="^larger than 256 MiB$"):
        files.read(tmp_path / "a.png")


def test_a_caption_file_that_is_a_link_to_elsewhere_is_not_read(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "raw" / "a.png", colourful())
    lines(tmp_path / "captions.jsonl", {"image": "a.png", "caption": "x"})
    os.symlink("../captions.jsonl", tmp_path / "raw" / "captions.jsonl")
    with pytest.raises(UserError, match=rf"captions.jsonl is a {files.LINKED}: .*--captions"):
        ImageFolder((str(tmp_path / "raw"),)).entries()
    named = ImageFolder((str(tmp_path / "raw"),), captions=str(tmp_path / "captions.jsonl"))
    assert len(named.entries()) == 1


def test_every_image_named_is_used_or_counted(hub: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A line for each way of naming a file, right and wrong; the key says what becomes of it."""
    for number, (on_disk, _) in enumerate(WAYS):
        save(hub / str(number) / on_disk, colourful(seed=number))
    for name in ("unlisted.png", "UNLISTED.PNG", ".hidden.png", "._a.png", ".cache/b.png"):
        save(hub / name, colourful())
    save(hub / "folder.png" / "kept.png", colourful())
    (tmp_path / "far").mkdir()
    save(tmp_path / "far" / "c.png", colourful())
    os.symlink(tmp_path / "far", hub / "linked")
    os.symlink(tmp_path / "far" / "c.png", hub / "unlisted_link.png")
    used = ["a.png", "./deep/../a.png", "deep\\b.png", str(hub / "folder.png" / "kept.png")]
    used += [f"{number}/{written}" for number, (_, written) in enumerate(WAYS)]
    lost = {
        "gone.png": files.MISSING,
        "gone\\too.png": files.MISSING,
        "nul\0.png": files.MISSING,
        "other.png": files.LINKED,
        "secret.png": files.LINKED,
        "linked/c.png": files.LINKED,
        "../0123abcd/../../../secret.png": files.OUTSIDE,
        "..\\secret.png": files.OUTSIDE,
        str(tmp_path / "secret.png"): files.OUTSIDE,
        "folder.png": files.NOT_A_FILE,
    }
    told = [{"image": name, "caption": name} for name in (*used, *lost)]
    lines(hub / "captions.jsonl", *told, {"image": 3, "caption": "x"})
    dropped = {
        "no caption": 2,  # Those that no line names.
        "caption line that is not JSON with a name and captions": 1,
        files.LINKED_FOLDER: 1,
    }
    for reason in (*lost.values(), files.LINKED):
        dropped[reason] = dropped.get(reason, 0) + 1
    source = ImageFolder((str(hub),), ALL_TRAIN)
    records = accounted(tmp_path / "out", source, dropped)
    said = {caption for record in records.values() for caption in strings(record["captions"])}
    assert said == set(used) and len(records) == len(used) - 1
