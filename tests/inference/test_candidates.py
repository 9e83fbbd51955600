"""Candidates as a tree: of which tokens, how often they are read, and their scores against plain
reading of whole sequences.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.experiment import (
    AttentionConfig,
    ConditioningConfig,
    PositionsConfig,
    ViTConfig,
)
from flamingo_jax.inference import candidates as candidates_module
from flamingo_jax.inference import programs
from flamingo_jax.inference.candidates import CandidateTree, make_tree
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.loading import LoadedFlamingo
from flamingo_jax.inference.prefill import prefill
from flamingo_jax.inference.prompts import Prompt, tokenise
from flamingo_jax.inference.scoring import next_log_probabilities, tree_arrays
from flamingo_jax.processing.visuals import Visual
from tests.inference.test_generation import MODEL, PROMPTS, TERMS, TOKENS, likelihood
from tests.inference.test_generation import prompt as prompt_of
from tests.inference.tiny_models import WORDS, make_loaded, make_tokenizer, tiny_config
from tests.rounding import assert_close

RNG = np.random.default_rng(0)


def ancestors(tree: CandidateTree, part: int, token: int) -> list[int]:
    """The ids on the way from the prompt to a token of a part, itself included."""
    held = tree.parts[part]
    above = [j for j in range(1, token + 1) if j <= token < held.ends[j]]
    assert [int(held.depths[j]) for j in above] == list(range(1, len(above) + 1))
    return held.tokens[above].tolist()


@pytest.mark.parametrize("most", [1, 4, 9, 1000])
def test_a_tree_holds_every_candidate_and_reads_what_they_share_once(most: int) -> None:
    candidates = [RNG.integers(0, 4, RNG.integers(1, 6)).tolist() for _ in range(80)]
    candidates += [candidates[0], candidates[1][:1], [3, 3, 3, 3, 3, 3, 3]]
    tree = make_tree(candidates, most)
    for ids, path in zip(candidates, tree.paths.tolist(), strict=True):
        real = [pair for pair in path if pair[0] >= 0]
        assert len(real) == len(ids) and path[: len(real)] == real
        for depth, (part, place) in enumerate(real):
            assert tree.parts[part].targets[place] == ids[depth]
            assert ancestors(tree, part, tree.parts[part].sources[place]) == ids[:depth]
    wanted = {tuple(ids[:end]) for ids in candidates for end in range(1, len(ids) + 1)}
    assert sum(len(part.targets) for part in tree.parts) == len(wanted)
    # Tokens that nothing follows are not read; ancestors only are repeated.
    read = {tuple(ids[:end]) for ids in candidates for end in range(len(ids))}
    assert max(len(part.tokens) for part in tree.parts) <= most + 8
    assert len(tree.parts) <= -(-len(read) // most)
    if most == 1000:
        assert [len(part.tokens) for part in tree.parts] == [len(read)]


@pytest.mark.parametrize("most", [2, 100])
def test_scores_are_the_likelihoods_of_whole_sequences(most: int) -> None:
    candidates = [[[1, 2], [0], [3, 1, 4], [1, 2]], [[2, 2, 2], [2, 2, 4], [2]], [[1], [0, 1, 3]]]
    trees = [make_tree(some, most) for some in candidates]
    prefilled = jax.jit(lambda: prefill(MODEL, PROMPTS, None, 8))()
    score = jax.jit(lambda tree: next_log_probabilities(MODEL, prefilled, None, tree))
    found = np.stack([score(part) for part in tree_arrays(trees, len(TOKENS))], 1)
    for row, (tree, some) in enumerate(zip(trees, candidates, strict=True)):
        expected = [likelihood(prompt_of(row), ids) for ids in some]
        assert_close(tree.scores(found[row]), expected, TERMS)


LANGUAGE_MODEL = tiny_config(make_tokenizer().vocab_size).language_model
SMALL = ConditioningConfig(heads=2, head_width=16, feed_forward=64, grafted_layers=1)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "transformer_xl, gated_xattn_dense": ({}, {}),
    "rotary in a window with shared keys, vanilla_xattn with text": (
        {
            "positions": PositionsConfig(kind="rotary"),
            "attention": AttentionConfig(heads=2, head_width=16, kv_heads=1, window=9),
        },
        {"kind": "vanilla_xattn", "text_window": 4},
    ),
    "alibi, grafting": (
        {"positions": PositionsConfig(kind="alibi")},
        {"kind": "grafting", "text_window": 3},
    ),
    "learned, all visuals": (
        {"positions": PositionsConfig(kind="learned", max_length=64)},
        {"attend_to_media": "all_previous"},
    ),
}
IMAGES = [Visual(RNG.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)) for _ in range(3)]
ASKED: list[Prompt] = [
    [IMAGES[0], "Output: a red circle", IMAGES[1], "Output:"],
    ["Question: what colour is this?"],
    [IMAGES[2], "Output:"],
]
NAMES = [
    "".join(f" {RNG.choice(WORDS)}" for _ in range(length)) for length in RNG.integers(1, 4, 40)
]
LENGTH = 48


def make(name: str) -> LoadedFlamingo:
    language_model, conditioning = KINDS[name]
    vit = ViTConfig(patch_size=16, layers=1, width=32, heads=2, feed_forward=64)
    config = tiny_config(make_tokenizer().vocab_size)
    return make_loaded(
        language_model=dataclasses.replace(LANGUAGE_MODEL, **language_model),
        conditioning=dataclasses.replace(SMALL, **conditioning),
        vision=dataclasses.replace(config.vision, vit=vit),
    )


def one_at_a_time(
    loaded: LoadedFlamingo, asked: list[tuple[int, str]]
) -> dict[tuple[int, str], float]:
    """{(number of the prompt in ASKED, name): log-likelihood} by one pass over whole rows, each of
    a single candidate, without a cache.
    """
    graph, state = nnx.split(loaded.model)

    @jax.jit
    def run(state, tokens, segments, index, images, visuals):
        model = nnx.merge(graph, state)
        seen = model.encode_visuals(images, jnp.ones((3, 1), bool))
        positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
        return jax.nn.log_softmax(model(tokens, positions, segments, index, seen, visuals))

    tokenizer = loaded.tokenizer
    tokens, segments, index = np.zeros((3, len(asked), LENGTH), np.int32)
    visuals = np.full((len(asked), 2), -1)
    spans = []
    for row, (place, name) in enumerate(asked):
        made, after = tokenise(ASKED[place], tokenizer), [*tokenizer.encode(name), tokenizer.eoc]
        first, end = len(made.tokens), len(made.tokens) + len(after)
        tokens[row, :first], tokens[row, first:end], segments[row, :end] = made.tokens, after, 1
        index[row] = made.media_index[-1]
        index[row, :first] = made.media_index
        for slot, visual in enumerate(made.visuals):
            visuals[row, slot] = [one.digest for one in IMAGES].index(visual.digest)
        spans.append((first, after))
    images = np.stack([visual.frames for visual in IMAGES])
    rows = np.asarray(run(state, tokens, segments, index, images, visuals), np.float64)
    return {
        pair: sum(rows[row, first - 1 + n, token] for n, token in enumerate(after))
        for row, (pair, (first, after)) in enumerate(zip(asked, spans, strict=True))
    }


@pytest.mark.parametrize("name", KINDS)
def test_sharing_changes_no_score(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every kind of positions and conditioning, in parts that repeat ancestors."""
    loaded = make(name)
    monkeypatch.setattr(candidates_module, "make_tree", lambda ids: make_tree(ids, 16))
    lists = [NAMES, [*NAMES[:3], NAMES[0]], NAMES]
    found = Engine(loaded).log_likelihoods(ASKED, lists)
    pairs = [(place, name) for place, names in enumerate(lists) for name in names]
    expected = one_at_a_time(loaded, pairs)
    for place, (names, scores) in enumerate(zip(lists, found, strict=True)):
        wanted = [expected[place, name] for name in names]
        np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_prompts_are_read_once_and_equal_lists_make_one_tree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = make("transformer_xl, gated_xattn_dense")
    trees: list[list[list[int]]] = []
    read: dict[str, list[tuple[int, ...]]] = {"prompts": [], "candidates": []}
    prefill_, score_ = programs.prefill_prompts, programs.score_tree

    def made(ids: list[list[int]]) -> CandidateTree:
        trees.append(ids)
        return make_tree(ids)

    def prefilling(graph, state, prompts, *others):
        read["prompts"].append(prompts.tokens.shape)
        return prefill_(graph, state, prompts, *others)

    def scoring(graph, state, prefilled, media, tree):
        read["candidates"].append(tree.tokens.shape)
        return score_(graph, state, prefilled, media, tree)

    monkeypatch.setattr(candidates_module, "make_tree", made)
    monkeypatch.setattr(programs, "prefill_prompts", prefilling)
    monkeypatch.setattr(programs, "score_tree", scoring)
    Engine(loaded).log_likelihoods(ASKED, [NAMES, list(NAMES), NAMES])
    assert len(trees) == 1 and len(trees[0]) == len(NAMES)
    assert read["prompts"] == [(4, 32)]
    distinct = {tuple(ids[:end]) for ids in trees[0] for end in range(len(ids))}
    ((rows, length),) = read["candidates"]
    assert rows == 4 and len(distinct) <= length < len(distinct) + 32
