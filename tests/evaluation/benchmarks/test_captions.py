"""Captioning sets in their owners' files: what is read of them, what is asked and how it scores."""

import json
import pathlib
from collections import Counter
from typing import Any

import numpy as np
import pytest

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet
from flamingo_jax.evaluation.benchmarks.coco import COCO
from flamingo_jax.evaluation.benchmarks.flickr30k import FLICKR30K
from flamingo_jax.evaluation.benchmarks.nocaps import NOCAPS
from flamingo_jax.evaluation.benchmarks.opening import open_benchmark
from flamingo_jax.evaluation.benchmarks.registry import BENCHMARKS, SUITES, find_benchmarks
from flamingo_jax.evaluation.benchmarks.textcaps import TEXTCAPS
from flamingo_jax.evaluation.benchmarks.vatex import VATEX
from flamingo_jax.evaluation.benchmarks.youcook2 import YOUCOOK2
from flamingo_jax.evaluation.media import ClipFile, Preprocessing
from flamingo_jax.evaluation.metrics.cider import cider_d
from flamingo_jax.evaluation.protocol.benchmark import EvaluationSettings, Prediction
from flamingo_jax.evaluation.ptb.tokenizer import tokenize
from flamingo_jax.evaluation.scoring.captions import score_caption_files
from flamingo_jax.evaluation.scoring.predictions import score_predictions
from flamingo_jax.evaluation.scoring.submission import submission
from flamingo_jax.evaluation.statistics import mean_estimate
from flamingo_jax.inference.prompts import END_OF_CHUNK, Prompt
from flamingo_jax.processing.visuals import Visual
from tests.evaluation.made_sets.captions import MADE, caption, save_json
from tests.evaluation.world import ScriptedEngine
from tests.inference.tiny_models import tiny_config

HOW = Preprocessing.of(tiny_config(40))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sets")
    for name, make in MADE.items():
        make(folder / name)
    return folder


def changed(source: pathlib.Path, target: pathlib.Path, file: str, change: Any) -> pathlib.Path:
    """Links a set's files to another folder, with the content of one changed."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != file:
            (target / path.name).symlink_to(path)
    content = json.loads((source / file).read_text())
    save_json(target / file, change(content) or content)
    return target


def test_coco_is_read_on_karpathys_splits(made: pathlib.Path) -> None:
    folder = made / "coco"
    content = COCO.read(folder, "test")
    first = content.examples[0]
    assert [one.id for one in content.examples] == ["0", "1", "2", "3", "4", "5"]
    assert first.media.path == folder / "val2014" / "COCO_val2014_000000000000.jpg"
    assert first.answers == (
        "A red square number 0.",
        "there is a red square in the image ",
        "Something red that fills all of it",
        "a photo of one square, which is red",
        "The square is red all over.",
    )
    assert first.media.there and content.files == [folder / "dataset_coco.json"]
    assert [one.id for one in COCO.read(folder, "val").examples] == ["6", "7"]
    train = [int(one.id) for one in COCO.read(folder, "train").examples]
    assert train == list(range(8, 50))
    assert [int(one.id) for one in COCO.read(folder, "train2014").examples] == train[8:]
    assert COCO.support == "train" and COCO.splits[0] == "test"


def test_cocos_own_references_are_taken_where_they_are(made: pathlib.Path, tmp_path) -> None:
    """In the order of that file, for what is asked; shots stay those of Karpathy's file."""
    folder = changed(made / "coco", tmp_path / "coco", "dataset_coco.json", lambda content: None)
    official = {
        "images": [{"id": number} for number in range(16)],
        "annotations": [
            {"id": 100 * n + number, "image_id": number, "caption": f"caption {n} of {number}"}
            for n in range(2)
            for number in range(16)
        ],
    }
    save_json(folder / "annotations" / "captions_val2014.json", official)
    content = COCO.read(folder, "test")
    assert content.examples[3].answers == ("caption 0 of 3", "caption 1 of 3")
    assert [path.name for path in content.files] == ["dataset_coco.json", "captions_val2014.json"]
    assert COCO.read(folder, "train").examples[0].answers[0] == caption(8)
    official["images"] = official["images"][1:]
    official["annotations"] = [one for one in official["annotations"] if one["image_id"]]
    save_json(folder / "annotations" / "captions_val2014.json", official)
    with pytest.raises(UserError, match="image 0, is 0, which .*captions_val2014.json lacks"):
        COCO.read(folder, "test")


def test_flickr30ks_ids_are_file_names(made: pathlib.Path) -> None:
    content = FLICKR30K.read(made / "flickr30k", "test")
    assert [one.id for one in content.examples] == [f"100000{n}" for n in range(6)]
    first = content.examples[0]
    assert first.media.path == made / "flickr30k" / "flickr30k-images" / "1000000.jpg"
    assert first.answers[0] == "A red square number 0." and len(first.answers) == 5
    sizes = {split: len(FLICKR30K.read(made / "flickr30k", split).examples) for split in
             FLICKR30K.splits}  # fmt: skip
    assert sizes == {"test": 6, "val": 2, "train": 42}


def test_nocaps_takes_its_shots_from_coco(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = made / "nocaps"
    content = NOCAPS.read(folder, "val")
    assert Counter(one.question_type for one in content.examples) == {
        "in-domain": 3,
        "near-domain": 3,
        "out-domain": 3,
    }
    second = content.examples[1]
    assert second.id == "1" and second.media.path == folder / "val" / "0000000000000001.jpg"
    assert len(second.answers) == 10 and second.answers[0] == "A green wall number 1."
    support = NOCAPS.read(folder, NOCAPS.support)
    assert [one.id for one in support.examples] == [str(n) for n in range(8, 50)]
    beside = tmp_path / "nocaps"
    beside.mkdir()
    with pytest.raises(UserError, match=r"takes its shots from COCO, but there is no folder"):
        NOCAPS.read(beside, NOCAPS.support)
    (tmp_path / "coco").symlink_to(made / "coco")
    assert len(NOCAPS.read(beside, NOCAPS.support).examples) == 42


def test_textcaps_records_of_an_image_are_one_example(made: pathlib.Path) -> None:
    content = TEXTCAPS.read(made / "textcaps", "val")
    assert [one.id for one in content.examples] == [f"{n:016x}" for n in range(6)]
    first = content.examples[0]
    assert first.answers == tuple(caption(0, n) for n in range(5))
    assert first.media.path == made / "textcaps" / "train_images" / "0000000000000000.jpg"
    assert len(TEXTCAPS.read(made / "textcaps", "train").examples) == 40


def test_vatex_clips_are_files_or_parts_of_videos(made: pathlib.Path) -> None:
    examples = VATEX.read(made / "vatex", "test").examples
    assert examples[1].id == "yt_00000001_000001_000002"
    videos = made / "vatex" / "videos"
    assert examples[1].media == ClipFile(videos / "yt_00000001_000001_000002.mp4")
    assert examples[5].media == ClipFile(videos / "yt_00000005.mp4", 2.0, 3.0)
    assert examples[0].answers == tuple(caption(0, n) for n in range(10))
    assert [len(VATEX.read(made / "vatex", split).examples) for split in ("val", "train")] == [
        2,
        42,
    ]
    shown = examples[5].media.read(at_rate(fps=4.0, frames=8)).frames
    # Second 2 to 3 of a video of 4 frames a second, each 6 levels brighter, from level 15 on.
    np.testing.assert_allclose(shown.mean((1, 2, 3)), [63, 69, 75, 81], atol=3)


def at_rate(**options: Any) -> Preprocessing:
    return Preprocessing.of(tiny_config(40), **options)


def test_youcook2_asks_about_segments(made: pathlib.Path) -> None:
    content = YOUCOOK2.read(made / "youcook2", "val")
    assert [one.id for one in content.examples] == [
        f"cook_00000{video}/{step}" for video in range(3) for step in range(3)
    ]
    videos = made / "youcook2" / "raw_videos" / "validation"
    fifth = content.examples[4]
    assert fifth.media == ClipFile(videos / "102" / "cook_000001.mkv", 1.0, 3.0)
    assert fifth.cluster == "cook_000001" and fifth.answers == (caption(4, 1),)
    support = YOUCOOK2.read(made / "youcook2", "train").examples
    assert len(support) == 80 and len({one.cluster for one in support}) == 40


def test_clips_have_the_rate_of_training_or_the_one_that_is_asked_for(made: pathlib.Path) -> None:
    """A segment of two seconds: its frames at 1 and at 3 a second; 0.67 s is shown until 0.75."""
    clip = YOUCOOK2.read(made / "youcook2", "val").examples[0].media
    one = clip.read(at_rate(frames=30)).frames.mean((1, 2, 3))
    three = clip.read(at_rate(frames=30, fps=3.0)).frames.mean((1, 2, 3))
    np.testing.assert_allclose(one, [0, 24], atol=3)
    np.testing.assert_allclose(three, [0, 6, 12, 24, 30, 36], atol=3)


@pytest.mark.parametrize("name", MADE)
def test_each_set_is_asked_as_in_the_paper(made: pathlib.Path, name: str) -> None:
    """Answers that are a reference of each query score as such a caption does by the metric."""
    opened = open_benchmark(BENCHMARKS[name], made / name)
    asked: Any = opened.asked
    truth = {one.media.read(HOW).digest: one.answers[-1] for one in asked.queries}

    def says(prompt: Prompt) -> str:
        (shown,) = (part for part in prompt[-2:] if isinstance(part, Visual))
        return f" {truth[shown.digest]}"

    engine = ScriptedEngine(says)
    result = asked.run(engine, EvaluationSettings(shots=4))
    support = {answer for one in asked.support for answer in one.answers[:1]}
    for prompt in engine.prompts:
        assert [type(part) for part in prompt] == [Visual, str] * 5
        assert prompt[-1] == "Output:"
        assert all(text.removeprefix("Output: ") in support for text in prompt[1:-1:2])
    zero = ScriptedEngine(says)
    asked.run(zero, EvaluationSettings())
    first, mark, second, end, _, last = zero.prompts[0]
    assert mark is end is END_OF_CHUNK and last == "Output:" and first != second

    options = BENCHMARKS[name].scorer_options
    report = score_predictions("captions", result.predictions, options)
    tokens = tokenize([one.text for one in result.predictions])
    truths = [tokenize(one.answers) for one in result.predictions]
    scores = cider_d(tokens, truths)
    assert report.metrics["CIDEr-D"].score == pytest.approx(scores.mean())
    assert scores.mean() > 1
    if BENCHMARKS[name].video:
        assert all(isinstance(one.media, ClipFile) for one in asked.queries)


def predictions_of(benchmark: BenchmarkSet, folder: pathlib.Path, split: str) -> list[Prediction]:
    return [
        Prediction(
            one.id,
            "",
            caption(number, 3),
            one.answers,
            question_type=one.question_type,
            cluster=one.cluster,
        )
        for number, one in enumerate(benchmark.read(folder, split).examples)
    ]


def test_the_score_is_that_of_the_owners_files(made: pathlib.Path, tmp_path) -> None:
    """NoCaps' own annotations are in the form that `launch.score` reads."""
    predictions = predictions_of(NOCAPS, made / "nocaps", "val")
    said = [{"image_id": int(one.id), "caption": one.text} for one in predictions]
    save_json(tmp_path / "said.json", said)
    references = str(made / "nocaps" / "nocaps_val_4500_captions.json")
    expected = score_caption_files(references, str(tmp_path / "said.json"))
    report = score_predictions("captions", predictions, NOCAPS.scorer_options)
    assert {name: report.metrics[name] for name in expected.metrics} == expected.metrics
    # Each domain's own images alone are what the owners' server scores it on.
    near = [one for one in predictions if one.question_type == "near-domain"]
    alone = score_predictions("captions", near)
    assert report.metrics["CIDEr-D, near-domain"] == alone.metrics["CIDEr-D"]
    assert set(report.metrics) - set(expected.metrics) == {
        f"CIDEr-D, {domain}" for domain in ("in-domain", "near-domain", "out-domain")
    }


def test_errors_of_steps_are_over_videos(made: pathlib.Path) -> None:
    predictions = predictions_of(YOUCOOK2, made / "youcook2", "val")
    report = score_predictions("captions", predictions)
    scores = [one["CIDEr-D"] for one in report.items]
    by_video = mean_estimate(scores, [one.cluster for one in predictions])
    assert report.metrics["CIDEr-D"] == by_video != mean_estimate(scores)


def drop(*path: Any) -> Any:
    def change(content: Any) -> None:
        for part in path[:-1]:
            content = content[part]
        del content[path[-1]]

    return change


def put(*path: Any) -> Any:
    def change(content: Any) -> None:
        for part in path[:-2]:
            content = content[part]
        content[path[-2]] = path[-1]

    return change


FIRST_COOK = ("database", "cook_000000")


@pytest.mark.parametrize(
    ("benchmark", "split", "file", "change", "said"),
    [
        (COCO, "test", "dataset_coco.json", drop("images", 2, "filename"), "image 2, has no"),
        (COCO, "test", "dataset_coco.json", put("images", 0, "sentences", []), "no sentences"),
        (COCO, "test", "dataset_coco.json", put("images", 0, "filepath", "../x"), "'../x', but"),
        (FLICKR30K, "test", "dataset_flickr30k.json", put("images", 1, "filename", "../a.jpg"),
         "no name of a file"),
        (NOCAPS, "val", "nocaps_val_4500_captions.json", put("images", 4, "domain", "far"),
         "image 4, is of domain 'far'"),
        (NOCAPS, "val", "nocaps_val_4500_captions.json", drop("annotations"), "'annotations'"),
        (TEXTCAPS, "val", "TextCaps_0.1_val.json", drop("data", 7, "caption_str"),
         "entry 7, has no 'caption_str'"),
        (VATEX, "test", "vatex_public_test_english_v1.1.json", put(0, "videoID", "a_1_b"),
         "not YouTubeID_start_end"),
        (VATEX, "test", "vatex_public_test_english_v1.1.json", put(3, "enCap", []),
         "entry 3, has 'enCap' that is empty"),
        (VATEX, "test", "vatex_public_test_english_v1.1.json", put(3, "enCap", [7]),
         "not a text"),
        (YOUCOOK2, "val", "youcookii_annotations_trainval.json",
         put(*FIRST_COOK, "annotations", 0, "segment", [4, 2]), r"has the segment \[4, 2\]"),
        (YOUCOOK2, "val", "youcookii_annotations_trainval.json", drop("database"), "database"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_named(
    made: pathlib.Path, tmp_path: pathlib.Path, benchmark: BenchmarkSet, split: str, file: str,
    change: Any, said: str,
) -> None:  # fmt: skip
    folder = changed(made / benchmark.name, tmp_path / benchmark.name, file, change)
    with pytest.raises(UserError, match=said) as caught:
        benchmark.read(folder, split)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", MADE)
def test_a_missing_file_is_named(tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(UserError, match="there is no f"):
        BENCHMARKS[name].read(tmp_path, BENCHMARKS[name].splits[0])


def test_videos_that_are_gone_are_counted(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = changed(
        made / "youcook2", tmp_path / "cook", "youcookii_annotations_trainval.json",
        lambda content: content["database"].update(
            gone=content["database"]["cook_000000"]
        ),
    )  # fmt: skip
    opened = open_benchmark(YOUCOOK2, folder, missing_media="skip")
    assert opened.missing == {"queries": ["gone/0", "gone/1", "gone/2"], "support": []}


def test_splits_without_captions_are_asked_for_the_owners_servers(made: pathlib.Path) -> None:
    found = {}
    for benchmark in (NOCAPS, TEXTCAPS):
        opened: Any = open_benchmark(benchmark, made / benchmark.name, split="test").asked
        engine = ScriptedEngine(lambda prompt: " a thing")
        predictions = opened.run(engine, EvaluationSettings(shots=4)).predictions
        assert not score_predictions("captions", predictions, benchmark.scorer_options).metrics
        found[benchmark.name] = submission(predictions, benchmark)
    assert found == {
        "nocaps": [{"image_id": 7, "caption": "a thing"}],
        "textcaps": [{"image_id": "0000000000000099", "caption": "a thing"}],
    }


def test_suites_name_benchmarks() -> None:
    assert {one for names in SUITES.values() for one in names} <= set(BENCHMARKS)
    assert [one.name for one in find_benchmarks(["captions"])] == list(MADE)
