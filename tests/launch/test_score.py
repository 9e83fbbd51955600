"""The command that scores files: its forms, and what is refused."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from flamingo_jax.errors import UserError
from tests.evaluation import small_wordnet
from tests.launch.commands import flag, load


def score(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    task: str,
    texts: dict[str, Any],
    **values: object,
) -> dict[str, Any]:
    """Writes files, scores them and returns what was printed and written."""
    paths = {}
    for name, content in texts.items():
        path = tmp_path / name
        if isinstance(content, np.ndarray):
            np.save(path.with_suffix(".npy"), content)
            path = path.with_suffix(".npy")
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        paths[name] = str(path)
    with pytest.MonkeyPatch.context() as patch:
        command = load("score")
        patch.setattr(command.command, "given_flags", lambda: set())
        for name, value in {**paths, "per_item": str(tmp_path / "items.json"), **values}.items():
            patch.setattr(command, name.upper(), flag(value))
        assert command.main(task) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["task"] == task
    printed["per_item"] = json.loads((tmp_path / "items.json").read_text())
    return printed


REFERENCES = {
    "images": [{"id": 1}, {"id": 2}, {"id": 3}],
    "annotations": [
        {"id": n, "image_id": image, "caption": text}
        for n, (image, text) in enumerate(
            [(1, "A dog runs."), (1, "The dog is running."), (2, "Two red cars."), (3, "A cat.")]
        )
    ],
}


def test_captions(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = [
        {"image_id": image, "caption": text}
        for image, text in ((1, "a dog runs"), (3, "a cat"), (2, "cars, two of them"))
    ]
    found = score(
        tmp_path, capsys, "captions", {"references": REFERENCES, "predictions": predictions}
    )
    assert found["items"] == 3 and found["references"] == 4 and not found["missing"]
    assert [item["id"] for item in found["per_item"]] == [1, 2, 3]
    mean = np.mean([item["CIDEr-D"] for item in found["per_item"]])
    assert found["metrics"]["CIDEr-D"]["score"] == pytest.approx(mean)
    low, high = found["metrics"]["ROUGE-L"]["interval_95"]
    assert low < found["metrics"]["ROUGE-L"]["score"] < high


@pytest.mark.parametrize(
    ("predictions", "sentence"),
    [
        ([{"image_id": 1, "caption": "a"}], "2 images have no prediction (2, 3)"),
        (
            [{"image_id": i, "caption": "a"} for i in (1, 2, 3, 9)],
            "a prediction but no reference (9)",
        ),
        ([{"image_id": 1, "caption": "a"}] * 2, "has two entries for 1"),
        ([{"image_id": "1", "caption": "a"}], "no image has both"),
        ([{"image_id": 1}], "has no 'caption'"),
        ([{"image_id": 1, "caption": 2}], "'caption' that is 2, not a text"),
        ([{"image_id": True, "caption": "a"}], "not a whole number or a text"),
        ([{"image_id": 1, "caption": "a" * 100_001}], "more than 100,000"),
        ({}, "must hold a list, but holds an object"),
        ("[1,", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_bad_captions_are_told_in_a_sentence(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], predictions: Any, sentence: str
) -> None:
    files = {"references": REFERENCES, "predictions": predictions}
    with pytest.raises(UserError) as error:
        score(tmp_path, capsys, "captions", files)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_incomplete_predictions_are_listed_if_asked(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = [{"image_id": i, "caption": "a dog"} for i in (1, 3, 9)]
    files = {"references": REFERENCES, "predictions": predictions}
    found = score(tmp_path, capsys, "captions", files, skip_incomplete=True)
    assert (found["items"], found["missing"], found["surplus"]) == (2, [2], [9])


def _answers(*texts: str) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_id": n} for n, text in enumerate(texts, 1)]


def test_vqa(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = {
        "annotations": [
            {"question_id": q, "image_id": q // 2, "answer_type": kind, "answers": _answers(*texts)}
            for q, kind, texts in (
                (1, "number", ["two"] * 10),
                (2, "other", ["a dog"] * 2 + ["cat"] * 8),
                (3, "other", ["red"] * 10),
            )
        ]
    }
    questions = {"questions": [{"question_id": q, "image_id": q // 2} for q in (1, 2, 3, 4)]}
    predictions = [
        {"question_id": q, "answer": answer} for q, answer in ((1, "two"), (2, "dog"), (3, "blue"))
    ]
    files = {"annotations": annotations, "questions": questions, "predictions": predictions}
    found = score(tmp_path, capsys, "vqa", files)
    partly = (2 * 1 / 3 + 8 * 2 / 3) / 10
    assert found["metrics"]["accuracy"]["score"] == pytest.approx((1 + partly) / 3)
    assert found["by_answer_type"] == pytest.approx({"number": 1.0, "other": partly / 2})
    assert found["variant"] == "official"
    questions["questions"] = questions["questions"][:1]
    with pytest.raises(UserError, match="2 annotated questions are not in"):
        score(tmp_path, capsys, "vqa", files)


def test_textvqa_and_vizwiz_have_forms_of_their_own(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    textvqa = {"data": [{"question_id": 5, "image_id": "a", "answers": ["Coke"] * 10}]}
    files = {"annotations": textvqa, "predictions": [{"question_id": 5, "answer": "coke?"}]}
    assert score(tmp_path, capsys, "vqa", files, variant="textvqa")["metrics"]["accuracy"][
        "score"
    ] == pytest.approx(1.0)
    vizwiz = [{"image": "a.jpg", "question": "?", "answers": [{"answer": "soup"}] * 10}]
    files = {"annotations": vizwiz, "predictions": [{"image": "a.jpg", "answer": "Soup"}]}
    found = score(tmp_path, capsys, "vqa", files, variant="vizwiz")
    assert found["per_item"] == [{"id": "a.jpg", "accuracy": 1.0}]


def test_okvqa_answers_are_compared_as_stems(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [
        {"answer": "ride", "raw_answer": "riding", "answer_id": n, "answer_confidence": "yes"}
        for n in range(10)
    ]
    annotations = {"annotations": [{"question_id": 1, "image_id": 1, "answers": answers}]}
    files = {"annotations": annotations, "predictions": [{"question_id": 1, "answer": "riding"}]}
    wordnet = str(small_wordnet.write(tmp_path / "wordnet"))
    plain = score(tmp_path, capsys, "vqa", files)
    stemmed = score(tmp_path, capsys, "vqa", files, stems=True, wordnet=wordnet)
    assert plain["metrics"]["accuracy"]["score"] == 0.0
    assert stemmed["metrics"]["accuracy"]["score"] == pytest.approx(1.0) and stemmed["stems"]


def test_wups(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (
        "video,frame_count,question,answer,qid,type\n1,9,what,a dog,0,TP\n1,9,how many,two,1,DC\n"
    )
    files = {
        "annotations": rows,
        "predictions": {"1": {"0": "a cat", "1": "two"}},
        "more_references": {"1": {"0": "poodle"}},
    }
    wordnet = str(small_wordnet.write(tmp_path / "wordnet"))
    found = score(tmp_path, capsys, "wups", files, wordnet=wordnet)
    assert [item["WUPS@0"] for item in found["per_item"]] == pytest.approx([4 / 6, 1.0])
    assert found["by_type"] == pytest.approx({"TN": 4 / 6, "T": 4 / 6, "DC": 1.0, "D": 1.0})
    assert "in place of nltk's tagger" in found["part_of_speech"]


RAREACT = "id,video_id,start,end,class_id,verb,noun,annotation\n" + "".join(
    f"{n},{video},0,1,{number},{verb},{noun},{annotation}\n"
    for n, (video, number, verb, noun, annotation) in enumerate(
        [("a", 0, "cut", "egg", 1), ("b", 0, "cut", "egg", 0), ("c", 1, "mix", "egg", 1)]
    )
)


def test_mwap(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = np.array([[0.5, 0.1], [0.9, 0.2], [0.1, 0.8]], np.float32)
    found = score(tmp_path, capsys, "mwap", {"annotations": RAREACT, "predictions": scores})
    assert {item["id"]: item["mWAP"] for item in found["per_item"]} == {
        "cut egg": 0.5,
        "mix egg": 1.0,
    }
    assert found["metrics"]["mWAP"]["score"] == 0.75


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((2, 2), np.float32), "has the shape [2, 2]"),
        (np.full((3, 2), np.nan, np.float32), "not finite"),
        (np.array([["a"] * 2] * 3), "not numbers"),
        (np.array([[None] * 2] * 3), "is no .npy file of numbers"),
        ("nothing", "is no .npy file of numbers"),
    ],
)
def test_bad_arrays_are_told_in_a_sentence(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], array: Any, sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        score(tmp_path, capsys, "mwap", {"annotations": RAREACT, "predictions": array})
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_ndcg(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = [{"image_id": 7, "round_id": 2, "gt_relevance": [0.0, 1.0, 0.5]}]
    files = {
        "annotations": annotations,
        "predictions": [{"image_id": 7, "round_id": 2, "ranks": [1, 2, 3]}],
    }
    best = 1.0 + 0.5 / np.log2(3)
    found = score(tmp_path, capsys, "ndcg", files)
    assert found["metrics"]["NDCG"]["score"] == pytest.approx(1 / np.log2(3) / best)
    files["predictions"] = [{"image_id": 7, "round_id": 2, "scores": [0.3, 0.2, 0.1]}]
    assert score(tmp_path, capsys, "ndcg", files)["metrics"] == found["metrics"]
    files["predictions"] = [{"image_id": 7, "round_id": 2, "ranks": [1, 1, 3]}]
    with pytest.raises(UserError, match="ranks that are not 1 to 3"):
        score(tmp_path, capsys, "ndcg", files)


@pytest.mark.parametrize(
    "predictions",
    [
        {"1": 0.9, "2": 0.2, "3": 0.6},
        [{"id": 1, "proba": 0.9}, {"id": 2, "proba": 0.2}, {"id": 3, "proba": 0.6}],
        '{"id": 1, "proba": 0.9}\n{"id": 2, "proba": 0.2}\n{"id": 3, "proba": 0.6}\n',
    ],
)
def test_auc(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], predictions: Any) -> None:
    lines = "".join(
        json.dumps({"id": n, "img": "x", "label": label, "text": ""}) + "\n"
        for n, label in ((1, 1), (2, 1), (3, 0))
    )
    found = score(tmp_path, capsys, "auc", {"annotations": lines, "predictions": predictions})
    assert found["metrics"]["ROC AUC"]["score"] == 0.5
    assert found["per_item"][0] == {"id": "1", "label": 1, "score": 0.9}


def test_a_missing_flag_or_file_is_told(tmp_path: pathlib.Path) -> None:
    command = load("score")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.command, "given_flags", lambda: {"meteor"})
        with pytest.raises(UserError, match="--meteor is not read by vqa but by captions"):
            command.main("vqa")
        patch.setattr(command.command, "given_flags", lambda: set())
        with pytest.raises(UserError, match="--annotations is not set"):
            command.main("auc")
        for name in ("ANNOTATIONS", "PREDICTIONS"):
            patch.setattr(command, name, flag(str(tmp_path / "none.json")))
        with pytest.raises(UserError, match="there is no file"):
            command.main("auc")


def test_scoring_needs_no_jax() -> None:
    code = (
        "import sys; from launch import score;"
        "from flamingo_jax.evaluation.scoring import captions, questions, ranked, wups;"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
