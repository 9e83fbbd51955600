"""Questions with generated answers: what is read of the official files, and that predictions have
the score that their owners' forms have.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.opening import OpenedBenchmark, open_benchmark
from flamingo_jax.evaluation.benchmarks.registry import BENCHMARKS, find_benchmarks
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.media import ClipFile, ImageFile
from flamingo_jax.evaluation.protocol.benchmark import EvaluationSettings, Prediction
from flamingo_jax.evaluation.scoring.captions import score_caption_files
from flamingo_jax.evaluation.scoring.predictions import check_scorer, score_predictions
from flamingo_jax.evaluation.scoring.questions import score_answer_files
from flamingo_jax.evaluation.scoring.report import ScoreReport
from flamingo_jax.evaluation.scoring.submission import submission, write_submission
from flamingo_jax.evaluation.scoring.wups import score_wups_files
from flamingo_jax.inference.prompts import END_OF_CHUNK
from flamingo_jax.processing.visuals import Visual
from tests.evaluation import small_wordnet
from tests.evaluation.made_sets.questions import MADE
from tests.evaluation.world import ScriptedEngine

Made = Callable[[str], pathlib.Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes each set once."""
    folders: dict[str, pathlib.Path] = {}

    def make(name: str) -> pathlib.Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            MADE[name](folders[name])
        return folders[name]

    return make


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_wordnet.write(tmp_path_factory.mktemp("words") / "wordnet"))


def split(made: Made, name: str, part: str) -> list[BenchmarkExample]:
    return BENCHMARKS[name].read(made(name), part).examples


def test_vqav2_has_questions_and_the_most_frequent_answer(made: Made) -> None:
    examples = split(made, "vqav2", "val")
    assert [one.id for one in examples[:3]] == ["2000", "2001", "2010"]
    first = examples[0]
    assert first.question == "what color is it?" and first.cluster == "200"
    assert first.answers == ("dog", "cat", *["dog"] * 7, "a cat")
    assert first.question_type == "other"
    assert first.details == {"types": {"answer_type": "other", "question_type": "one"}}
    assert first.media == ImageFile(
        made("vqav2") / "val2014" / "COCO_val2014_000000000200.jpg", True
    )
    assert len(split(made, "vqav2", "train")) == 80


def test_questions_without_answers_can_be_asked(made: Made, wordnet: str) -> None:
    (one, *_) = split(made, "vqav2", "test-dev")
    assert (one.id, one.answers, one.cluster) == ("3000", (), "300")
    assert one.media.path.name == "COCO_test2015_000000000300.jpg"  # type: ignore[attr-defined]
    assert split(made, "textvqa", "test")[0].answers == ()
    assert split(made, "vizwiz", "test")[0].answers == ()
    opened = opened_set(made, "vqav2", wordnet, split="test-dev")
    predictions = predicted(opened, " dog")
    report = score_predictions("vqa", predictions)
    assert report.metrics == {} and report.about == {"unscored": True}
    asked = {one.id for one in split(made, "vqav2", "test")}
    found = submission(predictions[:1], BENCHMARKS["vqav2"], asked)
    assert sorted(found, key=lambda one: one["question_id"])[:2] == [
        {"question_id": 3000, "answer": "dog"},
        {"question_id": 3001, "answer": ""},
    ]
    # Nor is there anything to show of them.
    empty = opened_set(made, "vqav2", wordnet, support_split="test-dev")
    assert list(empty.asked.support) == []


def test_okvqa_shows_answers_and_keeps_their_stems(made: Made) -> None:
    first = split(made, "okvqa", "val")[0]
    assert first.answers == ("dogs", "cats", "cats", *["dogs"] * 5, "a cats", "a cats")
    assert first.details["stems"] == ["dog", "cat", "cat", *["dog"] * 5, "a cat", "a cat"]
    # The people who answered twice, by the place of their first answer.
    assert first.details["records"] == [2, 0, 0, 2, 4, 4, 6, 6, 8, 8]
    assert first.question_type == "one"


def test_textvqa_and_vizwiz_have_files_of_their_own(made: Made) -> None:
    text = split(made, "textvqa", "val")[0]
    assert (text.id, text.cluster, text.answers[0]) == ("1000", f"{100:016x}", "dog")
    assert text.media == ImageFile(made("textvqa") / "train_images" / f"{100:016x}.jpg", True)
    (photo, *others) = split(made, "vizwiz", "val")
    assert (photo.id, photo.cluster) == ("VizWiz_val_00000000.jpg", "")
    assert photo.media == ImageFile(made("vizwiz") / "val" / "VizWiz_val_00000000.jpg", True)
    assert "records" not in photo.details and len(others) == 7


def test_videos_are_found_under_their_number_or_name(made: Made) -> None:
    examples = split(made, "msvdqa", "test")
    assert [one.id for one in examples[:2]] == ["450", "451"]
    assert examples[0].cluster == "45" and examples[0].answers == ("cat",)
    assert [one.question_type for one in examples[:2]] == ["what", "how"]
    clips = {one.media for part in ("train", "test") for one in split(made, "msvdqa", part)}
    names = {clip.path.name for clip in clips}  # type: ignore[attr-defined]
    assert all(clip.there for clip in clips)  # type: ignore[attr-defined]
    assert "vid45.avi" in names and "-aB_vid1_5_15.avi" in names
    (first, *_) = split(made, "msrvttqa", "train")
    assert first.media == ClipFile(made("msrvttqa") / "video" / "video1.mp4", None, None, True)


def test_ivqa_asks_about_parts(made: Made) -> None:
    examples = split(made, "ivqa", "test")
    assert [one.id for one in examples[:3]] == ["test-0_2", "test-0_3", "test-1_4"]
    assert examples[0].answers == ("dog", "cat", "dog", "dog", "a cat")
    folder = made("ivqa") / "video"
    assert examples[1].media == ClipFile(folder / "test-0_1_9.mp4", None, None, True)
    assert examples[3].media == ClipFile(folder / "test-1.mp4", 1.0, 9.0, True)
    assert examples[3].cluster == "test-1"


def test_nextqa_has_second_answers_and_vidors_folders(made: Made) -> None:
    first, second, third, _ = split(made, "nextqa", "test")[:4]
    assert (first.id, first.cluster) == ("4924794377_0", "4924794377")
    assert first.answers == ("poodle", "toy") and third.answers == ("dog",)
    assert (first.question, first.question_type) == ("what color is it", "TP")
    folder = made("nextqa") / "NExTVideo"
    assert first.media == ClipFile(folder / "1164" / "4924794377.mp4", None, None, True)
    assert third.media == ClipFile(folder / "4924794378.mp4", None, None, True)
    assert second.id == "4924794377_1"


def opened_set(made: Made, name: str, wordnet: str, **options: Any) -> OpenedBenchmark:
    return open_benchmark(BENCHMARKS[name], made(name), wordnet=wordnet, **options)


def predicted(opened: OpenedBenchmark, says: str) -> list[Prediction]:
    """The predictions of an engine that always says one thing."""
    for one in (*opened.asked.queries, *opened.asked.support):
        assert one.media.there  # type: ignore[attr-defined]
    return [
        Prediction(
            one.id,
            "",
            says.strip(),
            one.answers,
            question_type=one.question_type,
            cluster=one.cluster,
            details=json.loads(json.dumps(one.details)),
        )
        for one in opened.asked.queries
    ]


def mixed(opened: OpenedBenchmark, *says: str) -> list[Prediction]:
    """Predictions that say one thing after the other."""
    made = [predicted(opened, text) for text in says]
    return [made[place % len(says)][place] for place in range(len(made[0]))]


def same(found: ScoreReport, expected: ScoreReport) -> None:
    """Every score is the same, to the bit."""
    assert found.metrics == expected.metrics
    told = [{**item, "id": None} for item in found.items]
    assert told == [{**item, "id": None} for item in expected.items]
    assert found.about == {k: v for k, v in expected.about.items() if k != "annotations_sha256"}


@pytest.mark.parametrize(
    ("name", "annotations", "options", "says"),
    [
        ("vqav2", "v2_mscoco_val2014_annotations.json", {}, ("a Dog.", "toy", "cat")),
        ("okvqa", "mscoco_val2014_annotations.json", {"stems": True}, ("dogs", "Cats", "toy")),
        ("textvqa", "TextVQA_0.5.1_val.json", {"variant": "textvqa"}, ("a dog?", "cat's")),
        ("vizwiz", "Annotations/val.json", {"variant": "vizwiz"}, ("the Dog", "toy", "cat")),
    ],
)  # fmt: skip
def test_predictions_have_the_score_of_their_submission(
    made: Made,
    wordnet: str,
    tmp_path: pathlib.Path,
    name: str,
    annotations: str,
    options: dict[str, Any],
    says: tuple[str, ...],
) -> None:
    benchmark, folder = BENCHMARKS[name], made(name)
    predictions = mixed(opened_set(made, name, wordnet), *says)
    found = score_predictions(
        benchmark.scorer, predictions, benchmark.scorer_options, wordnet=wordnet
    )
    write_submission(tmp_path / "answers.json", predictions, benchmark)
    expected = score_answer_files(
        str(folder / annotations), str(tmp_path / "answers.json"), wordnet=wordnet, **options
    )
    same(found, expected)
    accuracy = found.metrics["accuracy"]
    assert 0 < accuracy.score < 1 and accuracy.standard_error > 0
    # A part of the questions has the score of that part.
    write_submission(tmp_path / "answers.json", predictions[:5], benchmark)
    expected = score_answer_files(
        str(folder / annotations),
        str(tmp_path / "answers.json"),
        wordnet=wordnet,
        skip_incomplete=True,
        **options,
    )
    same(
        score_predictions(
            benchmark.scorer, predictions[:5], benchmark.scorer_options, wordnet=wordnet
        ),
        expected,
    )


def test_people_who_answered_twice_are_left_out_together(made: Made, wordnet: str) -> None:
    """Of ten answers, two by each of five people, four agree: with one left out three of eight."""
    opened = opened_set(made, "okvqa", wordnet)
    (one, *_) = predicted(opened, "cats")
    found = score_predictions("okvqa", [one], wordnet=wordnet)
    # "cat" four times, with the article removed: 4 of 8 for others, 2 of 8 where one is left out.
    assert found.metrics["accuracy"].score == pytest.approx((6 * 1.0 + 4 * 2 / 3) / 10)
    assert found.about["stems"]


def test_nextqa_has_the_score_of_its_submission(
    made: Made, wordnet: str, tmp_path: pathlib.Path
) -> None:
    benchmark, folder = BENCHMARKS["nextqa"], made("nextqa")
    predictions = mixed(opened_set(made, "nextqa", wordnet), "dogs", "a cat", "toys")
    found = score_predictions("wups", predictions, wordnet=wordnet)
    write_submission(tmp_path / "answers.json", predictions, benchmark)
    expected = score_wups_files(
        str(folder / "test.csv"),
        str(tmp_path / "answers.json"),
        str(folder / "add_reference_answer_test.json"),
        wordnet=wordnet,
    )
    same(found, expected)
    # "poodle" or "toy" against "dogs": the better of 6 / 7 and 2 / 5.
    assert found.items[0] == {
        "id": "4924794377_0",
        "type": "TN",
        "WUPS@0": pytest.approx(6 / 7),
        "WUPS@0.9": pytest.approx(0.1 * 6 / 7),
    }
    assert set(found.about["by_type"]) == {"TN", "T", "DC", "D", "CW", "C"}


@pytest.mark.parametrize(("name", "score"), [("msvdqa", 0.25), ("msrvttqa", 0.25), ("ivqa", 0.375)])
def test_a_run_has_the_expected_score(made: Made, wordnet: str, name: str, score: float) -> None:
    """Of four videos, one is of a dog; of iVQA's eight questions two people or more say so of
    two, and one does of two."""
    opened = opened_set(made, name, wordnet)
    predictions = opened.asked.run(
        ScriptedEngine(lambda prompt: " dog"),  # type: ignore[arg-type]
        EvaluationSettings(shots=2, frames=2, fps=1.0),
    ).predictions
    report = score_predictions(BENCHMARKS[name].scorer, predictions)
    assert report.metrics["accuracy"].score == pytest.approx(score)
    if name == "msvdqa":
        assert report.about["by_type"] == {"how": 0.25, "what": 0.25}


def test_prompts_are_the_papers(made: Made, wordnet: str) -> None:
    engine = ScriptedEngine(lambda prompt: " dog")
    opened = opened_set(made, "okvqa", wordnet, limit=1)
    opened.asked.run(engine, EvaluationSettings(shots=1))  # type: ignore[arg-type]
    opened.asked.run(engine, EvaluationSettings())  # type: ignore[arg-type]
    shown = {one.id: one for one in opened.asked.support}
    few, none = engine.prompts
    written = [part for part in few if isinstance(part, str)]
    assert [type(part) for part in few] == [Visual, str, Visual, str]
    assert written[1].startswith("Question: ") and written[1].endswith("? Answer:")
    assert written[0] in {
        f"Question: {one.question} Answer: {one.answers[0]}" for one in shown.values()
    }
    first, mark, second, again, image, last = none
    assert mark is again is END_OF_CHUNK and first != second and isinstance(image, Visual)
    assert last == written[1]


def test_captions_are_submitted_by_image(tmp_path: pathlib.Path) -> None:
    references = {
        "images": [{"id": 1}, {"id": 2}],
        "annotations": [
            {"image_id": 1, "caption": "A dog runs."},
            {"image_id": 2, "caption": "Two red cars."},
        ],
    }
    (tmp_path / "references.json").write_text(json.dumps(references))
    predictions = [
        Prediction("1", "", "a dog runs", ("A dog runs.",)),
        Prediction("2", "", "two cars", ("Two red cars.",)),
    ]
    assert submission(predictions, BENCHMARKS["coco"])[1] == {"image_id": 2, "caption": "two cars"}
    write_submission(tmp_path / "captions.json", predictions, BENCHMARKS["coco"])
    expected = score_caption_files(
        str(tmp_path / "references.json"), str(tmp_path / "captions.json")
    )
    assert score_predictions("captions", predictions).metrics == expected.metrics
    with pytest.raises(UserError, match="the owners of ivqa have no form of submissions"):
        submission(predictions, BENCHMARKS["ivqa"])


@pytest.mark.parametrize("name", ["okvqa", "nextqa"])
def test_a_run_without_wordnet_is_refused_at_once(
    made: Made, tmp_path: pathlib.Path, name: str
) -> None:
    with pytest.raises(UserError, match="--wordnet names the folder") as error:
        open_benchmark(BENCHMARKS[name], made(name), wordnet=str(tmp_path))
    assert "\n" not in str(error.value)
    check_scorer("vqa", wordnet=str(tmp_path))


def test_no_score_depends_on_where_wordnet_is(
    made: Made, wordnet: str, tmp_path: pathlib.Path
) -> None:
    other = str(small_wordnet.write(tmp_path / "elsewhere"))
    predictions = mixed(opened_set(made, "okvqa", wordnet), "dogs", "playing")
    first, second = (
        score_predictions("okvqa", predictions, wordnet=folder) for folder in (wordnet, other)
    )
    assert first == second and wordnet not in json.dumps(first.to_json())
    assert "wordnet" not in BENCHMARKS["okvqa"].scorer_options


def test_examples_without_anything_to_show_are_no_shots(made: Made, wordnet: str) -> None:
    folder = made("vizwiz")
    place = folder / "Annotations" / "train.json"
    kept = place.read_text()
    entries = json.loads(kept)
    for answer in entries[0]["answers"]:
        answer["answer"] = ""
    place.write_text(json.dumps(entries))
    support = opened_set(made, "vizwiz", wordnet).asked.support
    place.write_text(kept)
    assert len(support) == 39 and "VizWiz_train_00000000.jpg" not in {one.id for one in support}


def without(content: Any) -> Any:
    content["annotations"].pop()
    return content


@pytest.mark.parametrize(
    ("name", "file", "change", "sentence"),
    [
        ("vqav2", "v2_mscoco_val2014_annotations.json", without, "question 7, has the id 2031, of"),
        ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", None, "there is no file"),
        ("textvqa", "TextVQA_0.5.1_val.json", lambda read: read["data"], "must hold an object"),
        ("vizwiz", "Annotations/val.json", lambda read: [{"image": 1}], "'image' that is 1, not a"),
        ("vizwiz", "Annotations/val.json", lambda read: [{"image": "../a.jpg", "question": "?"}],
         "is no name of a file"),
        ("msvdqa", "youtube_mapping.txt", lambda read: "vid1", "line 1, must have two words"),
        ("msrvttqa", "test_qa.json", lambda read: [{"video_id": "x"}], "'video_id' that is a text"),
        ("ivqa", "test.csv", lambda read: read.replace("9,how", "nan,how"), "start or end that is"),
        ("ivqa", "test.csv", lambda read: read.replace("answer5", "x"), "has no column answer5"),
        ("nextqa", "add_reference_answer_test.json", None, "there is no file"),
    ],
)  # fmt: skip
def test_bad_files_are_told_in_a_sentence(
    made: Made, name: str, file: str, change: Callable[[Any], Any] | None, sentence: str
) -> None:
    place = made(name) / file
    kept = place.read_text()
    if change is None:
        place.unlink()
    else:
        read = json.loads(kept) if file.endswith("json") else kept
        changed = change(read)
        place.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    try:
        with pytest.raises(UserError) as error:
            BENCHMARKS[name].read(made(name), BENCHMARKS[name].splits[0])
    finally:
        place.write_text(kept)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_all_are_in_suites() -> None:
    found = find_benchmarks(["vqa", "video_questions"])
    assert {one.name for one in found} == set(MADE)
    assert all(one.video == (one.name in ("msvdqa", "msrvttqa", "ivqa", "nextqa")) for one in found)
