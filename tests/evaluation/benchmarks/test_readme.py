"""The tables of benchmarks/README.md say what the registry says."""

import pathlib
import re

import pytest

import flamingo_jax
from flamingo_jax.evaluation.benchmarks.benchmark_set import (
    NO_SUPPORT,
    PAPER_SHOTS,
    BenchmarkSet,
)
from flamingo_jax.evaluation.benchmarks.registry import BENCHMARKS, SUITES

README = pathlib.Path(flamingo_jax.__file__).parent / "evaluation/benchmarks/README.md"
SCORES = {
    "captions": "CIDEr-D",
    "vqa": "VQA accuracy",
    "okvqa": "VQA accuracy of stems",
    "exact": "exact match",
    "ivqa": "iVQA's accuracy",
    "wups": "WUPS",
    "mean_of_types": "mean of types",
    "ndcg": "NDCG",
    "auc": "ROC AUC",
    "mwap": "mWAP",
    "choice": "accuracy",
    "top_k": "top-1",
    "first_line": "exact first line",
}
"""Scorer -> how the table calls its metric."""
MANY = re.compile(r"shots_\d_ways_\d")
"""The variants of one set that share a row."""


def rows(header: str) -> list[list[str]]:
    """The cells of the README's table below this header."""
    lines = README.read_text().split(header + "\n", 1)[1].split("\n")[1:]
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def expected(one: BenchmarkSet, shots: set[int]) -> list[str]:
    """All cells but the title and the last one, which are a person's."""
    first, *others = (MANY.sub("shots_N_ways_K", name) for name in one.splits)
    support = one.support if one.support != NO_SUPPORT else "its own" if max(shots) else "none"
    most = f", {one.per_class} a class" if one.per_class else ""
    answer = f"at most {one.max_tokens} tokens" if one.kind == "generate" else "ranked"
    metric = one.scorer_options.get("headline") or SCORES[one.scorer]
    return [
        f"`{MANY.sub('shots_N_ways_K', one.name)}`",
        f"**{first}**" + "".join(f", {name}" for name in others),
        "own" if support == "its own" else support + most,
        "paper's" if shots == set(PAPER_SHOTS) else ", ".join(map(str, sorted(shots))),
        answer,
        metric + (", form" if one.submission else ""),
    ]


def test_the_table_of_sets_is_the_registry() -> None:
    shots: dict[str, set[int]] = {}
    for one in BENCHMARKS.values():
        shots.setdefault(MANY.sub("", one.name), set()).update(one.shots)
    wanted = [expected(one, shots[MANY.sub("", one.name)]) for one in BENCHMARKS.values()]
    wanted = [cells for n, cells in enumerate(wanted) if cells not in wanted[:n]]
    header = "| name | benchmark | queries | shots from | shots | answers | score | what to know |"
    found = rows(header)
    assert [[cells[0], *cells[2:-1]] for cells in found] == wanted
    assert all(cells[1] and cells[-1] for cells in found)


def test_the_table_of_suites_is_the_registry() -> None:
    named = {cells[0].strip("`"): cells[1].split(", ") for cells in rows("| suite | benchmarks |")}
    assert named == {
        suite: list(dict.fromkeys(MANY.sub("shots_N_ways_K", name) for name in names))
        for suite, names in SUITES.items()
    }


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_list_of_files_is_the_layout(name: str) -> None:
    one = BENCHMARKS[name]
    block = README.read_text().split("```text\n")[1].split("```")[0]
    for path, what in one.layout.items():
        path, what = (MANY.sub("shots_N_ways_K", text) for text in (path, what))
        assert f"  {path:<40} {what}" in block.split("\n")
    assert f"{MANY.sub('shots_N_ways_K', name)}/" in block.split("\n")
