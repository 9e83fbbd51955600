"""The benchmark of generation, at tiny size: what is timed is what it says, and both sides of a
comparison find the same.
"""

import json

import pytest

from flamingo_jax.errors import UserError
from flamingo_jax.planning.generation_timing import SHOTS, NumberTokenizer
from launch import command
from tests.launch import commands
from tests.planning.test_timing import SIZES


def benchmark(monkeypatch: pytest.MonkeyPatch, **flags: object) -> None:
    module = commands.load("benchmark")
    monkeypatch.setattr(command, "given_flags", set)
    for name, value in flags.items():
        monkeypatch.setattr(module, name, commands.flag(value))
    assert module.main("generate") == 0


def test_captioning_ranking_and_rates_are_timed_beside_plain_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = SIZES.replace("vocab=32", "vocab=64")
    given = {"SIZES": sizes, "MAX_TOKENS": 3, "NAMES": 30, "SAMPLE": 2, "PROMPTS": ["1"]}
    benchmark(monkeypatch, **given, JSON=True)
    found = json.loads(capsys.readouterr().out)
    caption, ranking = found["captioning"], found["ranking"]
    # <BOS>; a shot: image, 12 tokens, <EOC>; the query: image and one token.
    assert caption["prompt"] == 1 + SHOTS * (1 + 12 + 1) + 2
    assert caption["agrees"] and 0 <= caption["tokens"] <= 3
    assert caption["ratio"] == pytest.approx(caption["plain"] / caption["seconds"])
    assert ranking["names"] == 30 and ranking["sample"] == 2
    assert 30 * 2 <= ranking["name_tokens"] <= 30 * 5
    assert ranking["difference"] < 1e-4
    assert set(found["rates"]) == {"1"}
    assert all(rates["prefill"] > 0 for rates in found["rates"].values())


def test_a_model_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--model, --sizes and --config each name a model"):
        benchmark(monkeypatch, SIZES=SIZES, MODEL="runs/export")
    with pytest.raises(UserError, match="--prompts=1,many must be numbers such as 1,64"):
        benchmark(monkeypatch, SIZES=SIZES, MODEL="", PROMPTS=["1", "many"])


def test_numbers_are_read_as_they_are_written() -> None:
    tokenizer = NumberTokenizer(50)
    assert tokenizer.encode(" w7 w49") == [7, 49] and tokenizer.decode([7, 49, 50]) == " w7 w49"
    assert tokenizer.encode(" w7<image> w8") == [7, *tokenizer.image_tag_ids, 8]
    assert tokenizer.encode("<i>") == 3 * [tokenizer.pad]
