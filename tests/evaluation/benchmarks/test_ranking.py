"""Benchmarks whose candidates are ranked, and those of words learned in context, in made files."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import NO_SUPPORT
from flamingo_jax.evaluation.benchmarks.opening import OpenedBenchmark, open_benchmark
from flamingo_jax.evaluation.benchmarks.rareact import action
from flamingo_jax.evaluation.benchmarks.registry import BENCHMARKS, SUITES
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.media import ClipFile, ImageFile, Preprocessing
from flamingo_jax.evaluation.protocol.benchmark import EvaluationSettings, Prediction
from flamingo_jax.evaluation.scoring.predictions import score_predictions
from flamingo_jax.evaluation.scoring.ranked import (
    score_auc_files,
    score_mwap_files,
    score_ndcg_files,
)
from flamingo_jax.evaluation.scoring.report import ScoreReport
from flamingo_jax.inference.prompts import Prompt
from flamingo_jax.processing.visuals import Visual
from tests.evaluation.made_sets import ranking
from tests.evaluation.world import ScriptedEngine
from tests.inference.tiny_models import tiny_config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("made")
    for name, make in ranking.MADE.items():
        (root / name).mkdir()
        make(root / name)
    return root


def opened(made: pathlib.Path, name: str, **options: object) -> OpenedBenchmark:
    return open_benchmark(BENCHMARKS[name], made / name, **options)  # type: ignore[arg-type]


def queries(made: pathlib.Path, name: str, **options: object) -> list[BenchmarkExample]:
    return list(opened(made, name, **options).asked.queries)


def run(
    made: pathlib.Path, name: str, engine: ScriptedEngine, shots: int = 0, **options: object
) -> tuple[list[Prediction], ScoreReport]:
    """Predictions go through a file, as those that are scored again do."""
    one = opened(made, name, **options)
    settings = EvaluationSettings(shots=shots, text_examples=one.benchmark.text_examples or 0)
    found = one.asked.run(engine, settings).predictions  # type: ignore[arg-type]
    kept = [Prediction.from_json(json.loads(json.dumps(each.to_json()))) for each in found]
    benchmark = one.benchmark
    return kept, score_predictions(benchmark.scorer, kept, benchmark.scorer_options)


def texts_of(prompt: Prompt) -> str:
    return "".join(part if isinstance(part, str) else "<image>" for part in prompt)


def liked(prompt: Prompt, text: str) -> float:
    """Some number of a prompt and a candidate."""
    content = f"{texts_of(prompt)}|{text}|{_grey(prompt)}".encode()
    return -float(np.random.default_rng(list(content)).integers(1, 40)) / 8


def _grey(prompt: Prompt) -> int:
    return int([part for part in prompt if isinstance(part, Visual)][-1].frames[0, 16, 16, 0])


def test_all_are_registered_and_their_shots_can_be_asked(made: pathlib.Path) -> None:
    assert set(ranking.MADE) == {*SUITES["ranking"], *SUITES["in_context"]}
    for name in ranking.MADE:
        one = opened(made, name)
        for shots in one.benchmark.shots:
            one.asked.check(EvaluationSettings(shots=shots, text_examples=0))
        assert one.references and not one.missing["queries"]


def test_nextqa_mc_is_read(made: pathlib.Path) -> None:
    first, second, *_ = queries(made, "nextqa_mc")
    assert (first.id, first.cluster, first.answers) == ("4000_0", "4000", ("reason 0",))
    assert (second.id, second.cluster, second.answers) == ("4000_1", "4000", ("reason 1",))
    assert first.question == "why did the boy smile 0"
    assert (first.question_type, second.question_type) == ("CW", "TN")
    assert first.candidates == tuple(f"reason {n}" for n in range(5))
    folder = made / "nextqa_mc" / "NExTVideo"
    assert first.media == ClipFile(folder / "1164" / "4000.mp4")
    (shot, *_) = opened(made, "nextqa_mc").asked.support
    assert shot.media == ClipFile(folder / "9000.mp4")


def test_nextqa_mc_is_scored_by_type_and_group(made: pathlib.Path) -> None:
    engine = ScriptedEngine(likes=lambda prompt, text: float(text == " reason 1"))
    predictions, report = run(made, "nextqa_mc", engine, shots=1)
    assert [one.rank for one in predictions] == [1, 0, 2, 3, 4, 1]
    assert report.metrics["accuracy"].score == pytest.approx(1 / 6)
    assert report.about["by_type"] == {"C": 0, "CW": 0, "D": 0, "DO": 0, "T": 0.5, "TN": 0.5}
    (text,) = {texts_of(prompt).count("<image>") for prompt in engine.prompts}
    assert text == 2
    assert texts_of(engine.prompts[0]).endswith("<image>Question: why did the boy smile 0 Answer:")


def test_star_is_read_without_what_happens_in_the_clip(made: pathlib.Path) -> None:
    examples = queries(made, "star")
    first, second, *_ = examples
    assert (first.id, first.question_type, first.cluster) == (
        "Interaction_T1_0",
        "Interaction",
        "V000",
    )
    assert (second.id, second.cluster) == ("Sequence_T1_1", "V000")
    assert first.media == ClipFile(made / "star/Charades_v1_480/V000.mp4", 1.5, 7.0)
    assert first.answers == ("The door.",)
    assert first.candidates == ("The door.", "The book.", "The bag.", "The shoe.")
    assert "000001" not in repr(examples)


def test_star_is_the_mean_of_its_types(made: pathlib.Path) -> None:
    """Both questions of one type are right, and one of another."""
    engine = ScriptedEngine(
        likes=lambda prompt, text: float(
            text == " The door." or (" person 1?" in texts_of(prompt) and text == " The book.") * 2
        )
    )
    predictions, report = run(made, "star", engine)
    assert [one.rank == 0 for one in predictions] == [True, True, False, False] + [
        True,
        False,
        False,
        False,
    ]
    scores = {name: estimate.score for name, estimate in report.metrics.items()}
    assert scores == {
        "mean of types": pytest.approx(0.375),
        "Feasibility": 0,
        "Interaction": 1,
        "Prediction": 0,
        "Sequence": 0.5,
        "accuracy": 0.375,
    }
    # Of unequal numbers the mean of types is another one.
    fewer = score_predictions("mean_of_types", predictions[:5])
    assert fewer.metrics["mean of types"].score == pytest.approx(0.5)
    assert fewer.metrics["accuracy"].score == pytest.approx(0.6)
    assert 0 < report.metrics["mean of types"].standard_error < 0.2


@pytest.mark.parametrize(
    ("verb", "noun", "said"),
    [
        ("hammer", "phone", "hammers a phone"),
        ("microwave", "egg", "microwaves an egg"),
        ("wash", "carrots", "washes carrots"),
        ("spray", "glass", "sprays a glass"),
        ("dry", "cactus", "dries a cactus"),
    ],
)
def test_actions_are_written_as_captions(verb: str, noun: str, said: str) -> None:
    assert action(verb, noun) == said


def test_rareact_is_zero_shot_and_equals_the_owners_score(
    made: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    one = opened(made, "rareact")
    assert list(one.asked.classes) == [  # type: ignore[union-attr]
        "hammers a phone",
        "hammers an egg",
        "washes a phone",
        "dries carrots",
    ]
    assert one.asked.queries[7].media == ClipFile(
        made / "rareact/videos/vid-2.mp4", start=1.0, end=6.0
    )
    assert [query.answers for query in one.asked.queries[3:5]] == [("dries carrots",), ()]
    engine = ScriptedEngine(likes=liked)
    predictions, report = run(made, "rareact", engine)
    assert {texts_of(prompt) for prompt in engine.prompts} == {"<image>Caption: a person"}
    scores = np.empty((12, 4))
    for place, prediction in enumerate(predictions):
        for number, value in prediction.ranking:
            scores[place, number] = value
    np.save(tmp_path / "scores.npy", scores)
    owners = score_mwap_files(str(made / "rareact/rareact.csv"), str(tmp_path / "scores.npy"))
    assert report.metrics == owners.metrics and report.items == owners.items
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.save(tmp_path / "scores.npy", shares)
    owners = score_mwap_files(str(made / "rareact/rareact.csv"), str(tmp_path / "scores.npy"))
    again = score_predictions("mwap", predictions, {"values": "softmax"})
    assert again.metrics["mWAP"].score == pytest.approx(owners.metrics["mWAP"].score)
    with pytest.raises(UserError, match="rareact needs 4 support examples .* there are 0"):
        one.asked.check(EvaluationSettings(shots=4))


def test_visdial_prompts_begin_with_the_caption(made: pathlib.Path) -> None:
    one = opened(made, "visdial")
    third = one.asked.queries[2]
    assert (third.id, third.cluster) == ("12", "12")
    assert third.details == {
        "image_id": 12,
        "round_id": 3,
        "relevance": [0.0, 1.0, 0.0, 0.4, 1.0],
    }
    assert third.candidates == ("yes", "no", "red", "blue", "no")
    assert third.answers == ("yes",)
    folder = made / "visdial"
    assert third.media == ImageFile(
        folder / "VisualDialog_val2018" / "VisualDialog_val2018_000000000012.jpg"
    )
    assert [shot.media for shot in one.asked.support[:2]] == [
        ImageFile(folder / "train2014/COCO_train2014_000000000010.jpg"),
        ImageFile(folder / "val2014/COCO_val2014_000000000011.jpg"),
    ]
    engine = ScriptedEngine(likes=liked)
    run(made, "visdial", engine, shots=1, support_limit=1)
    shot = (
        "<image>a thing {} Question: is it a photo Answer: {} Question: what colour is it"
        " Answer: {} Question: any people Answer: {}"
    )
    answers = ["yes", "no", "red", "blue"]
    shown = [
        shot.format(n, *(answers[(n + turn) % 4] for turn in range(3)))
        for n in range(ranking.SUPPORT)
    ]
    asked = (
        "<image>a thing 2 Question: is it a photo Answer: red Question: what colour is it"
        " Answer: blue Question: any people Answer:"
    )
    assert texts_of(engine.prompts[2]) in {f"{one}{asked}" for one in shown}


def test_visdial_equals_the_owners_score(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Equal texts among the candidates get equal scores."""
    predictions, report = run(made, "visdial", ScriptedEngine(likes=liked))
    submitted = []
    for one in predictions:
        scores = [value for _, value in sorted(one.ranking)]
        assert len(scores) == 5 and scores[1] == scores[4]
        key = {name: one.details[name] for name in ("image_id", "round_id")}
        submitted.append(key | {"scores": scores})
    (tmp_path / "submitted.json").write_text(json.dumps(submitted))
    dense = made / "visdial" / "visdial_1.0_val_dense_annotations.json"
    owners = score_ndcg_files(str(dense), str(tmp_path / "submitted.json"))
    assert report.metrics == owners.metrics
    assert len({item["NDCG"] for item in report.items}) > 1


def test_hateful_memes_prompts_hold_the_memes_text(made: pathlib.Path) -> None:
    engine = ScriptedEngine(likes=liked)
    run(made, "hatefulmemes", engine, shots=1)
    prompt = texts_of(engine.prompts[0])
    assert prompt.endswith(
        '<image>is an image with written: "when "you" see 1" on it. Is it hateful? Answer:'
    )
    shot = prompt.removeprefix('<image>is an image with written: "when "you" see ')
    number = int(shot.split('"')[0])
    assert shot.startswith(
        f'{number}" on it. Is it hateful? Answer: {"no" if number % 3 else "yes"}<image>'
    )
    first = queries(made, "hatefulmemes")[0]
    assert first.media == ImageFile(made / "hatefulmemes/img/00001.png")


@pytest.mark.parametrize("values", ["softmax", "log-likelihood"])
def test_hateful_memes_equals_the_owners_score(
    made: pathlib.Path, tmp_path: pathlib.Path, values: str
) -> None:
    predictions, _ = run(made, "hatefulmemes", ScriptedEngine(likes=liked))
    given = {}
    for one in predictions:
        no, yes = (value for _, value in sorted(one.ranking))
        given[one.id] = yes if values == "log-likelihood" else 1 / (1 + np.exp(no - yes))
    (tmp_path / "given.json").write_text(json.dumps(given))
    labels = made / "hatefulmemes" / "test_seen.jsonl"
    owners = score_auc_files(str(labels), str(tmp_path / "given.json"))
    report = score_predictions("auc", predictions, {"values": values})
    assert report.metrics["ROC AUC"] == pytest.approx(owners.metrics["ROC AUC"])
    assert [item["label"] for item in report.items] == [0, 0, 1, 0, 0, 1]


def test_imagenet_is_read_from_folders(made: pathlib.Path) -> None:
    one = opened(made, "imagenet")
    assert one.asked.classes == ["tench", "goldfish", "crane bird"]  # type: ignore[union-attr]
    first = one.asked.queries[0]
    folder = made / "imagenet"
    assert (first.id, first.answers) == ("ILSVRC2012_val_00000001", ("tench",))
    assert first.media == ImageFile(folder / "val" / "n01440764" / "ILSVRC2012_val_00000001.JPEG")
    assert len(one.asked.support) == 42
    few = dataclasses.replace(BENCHMARKS["imagenet"], per_class=2)
    support = open_benchmark(few, folder).asked.support
    assert [shot.answers[0] for shot in support] == ["tench"] * 2 + ["goldfish"] * 2 + [
        "crane bird"
    ] * 2


def test_imagenets_flat_images_take_their_classes_from_either_list(
    made: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The development kit's numbers of classes are not in the order of the WordNet ids."""
    import scipy.io

    (tmp_path / "classnames.txt").write_text((made / "imagenet/classnames.txt").read_text())
    (tmp_path / "val").mkdir()
    wnids = ["n01443537", "n01440764", "n02012849"]
    expected = [wnids[place] for place in (2, 0, 1, 1)]
    with pytest.raises(UserError, match="nothing tells the classes"):
        BENCHMARKS["imagenet"].read(tmp_path, "val")
    kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    form = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    synsets = np.array([(place + 1, wnid, 0) for place, wnid in enumerate(wnids)], form)
    scipy.io.savemat(kit / "meta.mat", {"synsets": synsets})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("3\n1\n2\n2\n")
    content = BENCHMARKS["imagenet"].read(tmp_path, "val")
    assert [one.details["wnid"] for one in content.examples] == expected
    assert [path.name for path in content.files] == [
        "classnames.txt",
        "ILSVRC2012_validation_ground_truth.txt",
        "meta.mat",
    ]
    assert not any(one.media.there for one in content.examples)  # type: ignore[attr-defined]
    rows = [f"ILSVRC2012_val_{n + 1:08d},{wnid} 1 2 3 4" for n, wnid in enumerate(expected)]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    again = BENCHMARKS["imagenet"].read(tmp_path, "val")
    assert [one.id for one in again.examples] == [one.id for one in content.examples]
    assert [one.details["wnid"] for one in again.examples] == expected


def test_classes_of_one_name_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "classnames.txt").write_text("n04008634 missile\nn03773504 missile\n")
    with pytest.raises(UserError, match="n04008634 and n03773504 both 'missile'"):
        BENCHMARKS["imagenet"].read(tmp_path, "val")


def test_a_class_is_right_by_its_name(made: pathlib.Path) -> None:
    """Of 1,000 classes a prediction keeps the first ten and the true one."""
    engine = ScriptedEngine(likes=lambda prompt, text: -float(len(text)))
    predictions, report = run(made, "imagenet", engine)
    assert [one.rank for one in predictions] == [0, 0, 1, 1, 2, 2]
    assert report.metrics["top-1"].score == pytest.approx(1 / 3)
    assert next(iter(report.metrics)) == "top-1"
    one = opened(made, "imagenet").asked
    many = dataclasses.replace(one, classes=[*(f"other {n}" for n in range(997)), *one.classes])  # type: ignore[arg-type, union-attr, type-var]
    engine = ScriptedEngine(likes=lambda prompt, text: -float(len(text) == 8))
    found = many.run(engine, EvaluationSettings()).predictions[0]  # type: ignore[union-attr]
    assert len(found.ranking) == 11 and found.ranking[-1] == (997, 0.0)
    assert found.rank == 997 - 10


def test_kinetics_is_read_and_scored(made: pathlib.Path) -> None:
    one = opened(made, "kinetics700")
    folder = made / "kinetics700"
    assert one.asked.classes == ["abseiling", "waxing (back)", "zumba"]  # type: ignore[union-attr]
    second = one.asked.queries[1]
    assert second.media == ClipFile(folder / "val" / "v_-001_000001_000011.mp4")
    assert (second.answers, second.cluster) == (("waxing (back)",), "v_-001")
    assert one.asked.support[0].media == ClipFile(
        folder / "train" / "abseiling" / "t_-000_000000_000010.mp4"
    )
    engine = ScriptedEngine(likes=lambda prompt, text: float(text == " zumba"))
    _, report = run(made, "kinetics700", engine)
    assert next(iter(report.metrics)) == "mean of top-1 and top-5"
    assert report.metrics["mean of top-1 and top-5"].score == pytest.approx((1 / 3 + 1) / 2)
    assert report.metrics["top-1"].score == pytest.approx(1 / 3)


def test_frozens_questions_have_their_own_shots(made: pathlib.Path) -> None:
    engine = ScriptedEngine(lambda prompt: " blicket\nThis is")
    name = "open_mini_imagenet_shots_1_ways_2"
    predictions, report = run(made, name, engine, shots=2)
    assert texts_of(engine.prompts[0]) == (
        "<image>This is a blicket<image>This is a dax<image>This is a"
    )
    shown = [_grey([part]) for part in engine.prompts[0] if isinstance(part, Visual)]
    assert np.abs(np.array(shown) - [41, 1, 60]).max() <= 2
    assert predictions[0].shots == ("1/1", "1/2")
    assert report.metrics["accuracy"].score == 0.5
    assert opened(made, name).support_split == NO_SUPPORT


def test_vl_icls_shots_are_of_two_classes_in_turn(made: pathlib.Path) -> None:
    engine = ScriptedEngine(lambda prompt: " dax. It is")
    predictions, report = run(made, "vl_icl_open_mi", engine, shots=10)
    others = set()
    for number, (prompt, one) in enumerate(zip(engine.prompts, predictions, strict=True)):
        parts = texts_of(prompt).split("<image>This is a")
        assert len(parts) == 12 and parts[0] == parts[-1] == ""
        words = [part.strip() for part in parts[1:-1]]
        assert words == words[:2] * 5 and one.answers[0] in words[:2]
        (other,) = {*words} - {*one.answers}
        others.add((words.index(other), other))
        assert one.shots == tuple(f"{number}/{words[n % 2]}/{n // 2}" for n in range(10))
    assert len(others) > 2
    assert report.metrics["accuracy"].score == pytest.approx(2 / 6)
    fewer = ScriptedEngine()
    run(made, "vl_icl_open_mi", fewer, shots=2)
    assert texts_of(fewer.prompts[0]).count("<image>") == 3


def test_counting_is_induced_from_the_support_set(made: pathlib.Path) -> None:
    engine = ScriptedEngine(lambda prompt: " 1")
    predictions, report = run(made, "vl_icl_clevr", engine, shots=2)
    prompt = texts_of(engine.prompts[0])
    assert prompt.endswith("<image>size: large\nAnswer:")
    assert prompt.count("\nAnswer: ") == 2
    assert all(shot.startswith("support/") for shot in predictions[0].shots)
    assert report.metrics["accuracy"].score == pytest.approx(2 / 6)
    assert queries(made, "vl_icl_clevr")[4].answers == ("0",)


@pytest.mark.parametrize(
    ("said", "score"),
    [("Dax", 1), ("dax.", 1), ("dax\nmore", 1), ("dax is. it", 0), ("a dax", 0), (".dax", 0)],
)
def test_the_first_line_counts(said: str, score: float) -> None:
    report = score_predictions("first_line", [Prediction("a", "", said, ("dax",))])
    assert report.metrics["accuracy"].score == score


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "said"),
    [
        ("nextqa_mc", "test.csv", ",0,0,CW", ",9,0,CW", "row 2, has the answer 9"),
        ("nextqa_mc", "test.csv", "a4", "b4", "no column a4"),
        ("star", "STAR_val.json", '"Interaction_T1_0"', '"Other_T1_0"', "no type of question"),
        (
            "star",
            "STAR_val.json",
            '"answer": "The door."',
            '"answer": "It."',
            "none of its choices",
        ),
        ("rareact", "rareact.csv", "0,vid-0,0,5,0", "0,vid-0,0,5,7", "from 0 on"),
        ("rareact", "rareact.csv", "0,vid-0,0,5,0", "0,../a,0,5,0", "may not name other folders"),
        ("visdial", "visdial_1.0_val.json", '"question": 0', '"question": 9', "no text"),
        ("visdial", "visdial_1.0_val.json", '"image_id": 10,', '"image_id": 9,', "1 images that"),
        (
            "visdial",
            "visdial_1.0_val.json",
            '"answer_options": [0, 1, 2, 3, 4]',
            '"answer_options": [0, 1]',
            "2 candidates, but .* of 5",
        ),
        ("hatefulmemes", "test_seen.jsonl", '"label": 1', '"label": 2', "the label 2, not 0 or 1"),
        ("imagenet", "classnames.txt", "n01443537 goldfish", "n01443537", "line 2, must be"),
        ("kinetics700", "val.csv", "zumba", "", "row 4, has no label"),
        ("vl_icl_open_mi", "query.json", "open_mi/query/0", "open_mi/0", "not in query/ or"),
        ("vl_icl_open_mi", "query.json", '"answer": "dax"', '"answer": "x"', "support for its"),
        ("vl_icl_clevr", "query.json", '"answer": 1', '"number": 1', "entry 1, has no 'answer'"),
        (
            "open_mini_imagenet_shots_1_ways_2",
            "open_ended_mi_shots_1_ways_2_all_questions.json",
            '"image_1"',
            '"image_one"',
            "no 'image_1'",
        ),
    ],
)
def test_malformed_files_give_one_sentence(
    made: pathlib.Path, name: str, file: str, old: str, new: str, said: str
) -> None:
    place = made / name / file
    text = place.read_text()
    assert old in text
    benchmark = BENCHMARKS[name]
    try:
        place.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=said):
            benchmark.read(made / name, benchmark.splits[0])
    finally:
        place.write_text(text)


def test_what_is_not_there_is_named(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for name in ranking.MADE:
        benchmark = BENCHMARKS[name]
        with pytest.raises(UserError, match=str(tmp_path)):
            benchmark.read(tmp_path, benchmark.splits[0])
    video = made / "rareact" / "videos" / "vid-1.mp4"
    content = video.read_bytes()
    video.unlink()
    try:
        with pytest.raises(UserError, match="3 of 12 images or videos of rareact"):
            opened(made, "rareact")
        _, report = run(made, "rareact", ScriptedEngine(likes=liked), missing_media="skip")
        assert 0 < report.metrics["mWAP"].score <= 1
    finally:
        video.write_bytes(content)


def test_clips_are_cut_to_the_question(made: pathlib.Path) -> None:
    """At one frame a second, 1.5 to 7 s of a film has five frames or six."""
    media = queries(made, "star")[0].media
    found = media.read(Preprocessing.of(tiny_config(40), frames=30, fps=1.0))
    assert found.frames.shape[0] in (5, 6)
