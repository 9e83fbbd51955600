import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flamingo_jax.inference import rows
from flamingo_jax.inference.beam_search import beam_search
from flamingo_jax.inference.decoding import DecodingConfig, TokenConstraints
from flamingo_jax.inference.prefill import PromptArrays
from tests.inference.tiny_models import TableModel
from tests.rounding import assert_close

V, STOP, T = 5, 4, 4
TERMS = T * (V + 3) + T
"""Terms of a score: at most T logarithms of a softmax over V, and their sum."""
MODEL = TableModel(V)
VOCABULARY = TokenConstraints(stop=(STOP,))
TOKENS = np.array([[0, 1, 2, 0], [3, 3, 0, 0], [1, 0, 0, 0]], np.int32)
LENGTHS = np.array([4, 2, 1], np.int32)
PROMPTS = PromptArrays(jnp.asarray(TOKENS), jnp.full(TOKENS.shape, -1), jnp.asarray(LENGTHS), None)
KEYS = jax.random.split(jax.random.key(0), 3)


def prompt(row: int) -> list[int]:
    return TOKENS[row, : LENGTHS[row]].tolist()


_whole_rows = jax.jit(
    lambda tokens, positions: MODEL.decode(
        tokens, positions, None, None, None, MODEL.init_cache(1, 16)
    )[0]
)


def log_probabilities(tokens: list[int]) -> np.ndarray:
    """[n, V] of one whole row, read at once and padded to one shape."""
    row, places = np.zeros((1, 16), np.int32), np.full((1, 16), 16)
    row[0, : len(tokens)], places[0, : len(tokens)] = tokens, np.arange(len(tokens))
    return np.asarray(jax.nn.log_softmax(_whole_rows(row, places))[0, : len(tokens)], np.float64)


def likelihood(before: list[int], after: list[int]) -> float:
    rows = log_probabilities(before + after[:-1])[len(before) - 1 :]
    return float(sum(rows[i, token] for i, token in enumerate(after)))


def continued(
    prompts: PromptArrays, keys: jax.Array, decoding: DecodingConfig, vocabulary: TokenConstraints
) -> rows.Chunk:
    count, length = prompts.tokens.shape
    options = rows.RowOptions(
        jax.random.key_data(keys),
        jnp.full(count, decoding.max_tokens),
        jnp.full(count, decoding.temperature),
        jnp.full(count, decoding.top_p),
    )
    started = rows.start(MODEL, prompts, None, options, length + decoding.max_tokens)
    none, steps = jnp.zeros(count, bool), jnp.int32(decoding.max_tokens)
    return rows.advance(MODEL, started, none, steps, vocabulary, decoding.max_tokens)[1]


def run(
    decoding: DecodingConfig, vocabulary: TokenConstraints = VOCABULARY
) -> list[tuple[list[int], float, bool]]:
    if decoding.beam_size == 1:
        chunk = jax.jit(lambda: continued(PROMPTS, KEYS, decoding, vocabulary))()
        return [
            (
                [t for t in row.tolist() if t >= 0 and t not in vocabulary.stop],
                float(gains.sum()),
                bool(np.isin(row, vocabulary.stop).any()),
            )
            for row, gains in zip(*map(np.asarray, chunk[:2]), strict=True)
        ]
    return [found[0] for found in search(decoding, vocabulary)]


def search(
    decoding: DecodingConfig, vocabulary: TokenConstraints = VOCABULARY
) -> list[list[tuple[list[int], float, bool]]]:
    made = jax.jit(lambda: beam_search(MODEL, PROMPTS, None, decoding, vocabulary))()
    return [
        [
            ([t for t in tokens.tolist() if t >= 0], float(score), bool(finished))
            for tokens, score, finished in zip(*row, strict=True)
        ]
        for row in zip(*map(np.asarray, made), strict=True)
    ]


def test_greedy_takes_the_likeliest_token_until_a_stop() -> None:
    made = run(DecodingConfig(max_tokens=T))
    for row, (tokens, score, finished) in enumerate(made):
        expected: list[int] = []
        while len(expected) < T and STOP not in expected:
            expected.append(int(log_probabilities(prompt(row) + expected)[-1].argmax()))
        assert tokens == [t for t in expected if t != STOP]
        assert finished == (STOP in expected)
        assert_close(score, likelihood(prompt(row), expected), TERMS)


def test_a_wide_beam_finds_the_likeliest_of_all_sequences() -> None:
    made = run(DecodingConfig(max_tokens=T, beam_size=V**3))
    for row, (tokens, score, finished) in enumerate(made):
        closed = [
            [*body, STOP] for n in range(T) for body in itertools.product(range(STOP), repeat=n)
        ]
        best = max(closed, key=lambda tokens: likelihood(prompt(row), tokens))
        assert finished
        assert tokens == best[:-1]
        assert_close(score, likelihood(prompt(row), best), TERMS)


def test_a_length_penalty_ranks_by_mean_like_scores() -> None:
    made = run(DecodingConfig(max_tokens=T, beam_size=V**3, length_penalty=2.0))
    for row, (tokens, _, _) in enumerate(made):
        closed = [
            [*body, STOP] for n in range(T) for body in itertools.product(range(STOP), repeat=n)
        ]
        best = max(
            closed,
            key=lambda tokens: likelihood(prompt(row), tokens) / ((5 + len(tokens)) / 6) ** 2,
        )
        assert tokens == best[:-1]


@pytest.mark.parametrize("length_penalty", [0.0, 1.5])
def test_n_best_are_the_best_of_all_sequences_in_their_order(length_penalty: float) -> None:
    made = search(DecodingConfig(T, beam_size=V**3, length_penalty=length_penalty, n_best=4))
    for row, found in enumerate(made):
        closed = [
            [*body, STOP] for n in range(T) for body in itertools.product(range(STOP), repeat=n)
        ]
        ranks = {
            tuple(tokens[:-1]): likelihood(prompt(row), tokens)
            / ((5 + len(tokens)) / 6) ** length_penalty
            for tokens in closed
        }
        best = sorted(ranks, key=lambda tokens: -ranks[tokens])[:4]
        assert [tuple(tokens) for tokens, _, _ in found] == best
        assert all(finished for *_, finished in found)
        for tokens, score, _ in found:
            assert_close(score, likelihood(prompt(row), [*tokens, STOP]), TERMS)


def test_too_few_ended_hypotheses_are_followed_by_open_ones_without_repeats() -> None:
    """Two tokens that end a text end each hypothesis once."""
    two = TokenConstraints(stop=(STOP, 0))
    for found in search(DecodingConfig(T, beam_size=6, n_best=6), two):
        texts = [tuple(tokens) for tokens, _, _ in found]
        assert len(set(texts)) == len(texts)
        flags = [finished for *_, finished in found]
        assert flags == sorted(flags, reverse=True) and all(np.isfinite(s) for _, s, _ in found)


@pytest.mark.parametrize("beam_size", [2, 3])
def test_a_narrow_beam_equals_a_written_out_one(beam_size: int) -> None:
    made = run(DecodingConfig(max_tokens=T, beam_size=beam_size))
    for row, (tokens, score, _) in enumerate(made):
        opened: list[tuple[float, list[int]]] = [(0.0, [])]
        best: tuple[float, list[int]] = (-np.inf, [])
        for _ in range(T):
            grown = [
                (likelihood(prompt(row), [*h, t]), [*h, t]) for _, h in opened for t in range(V)
            ]
            grown.sort(key=lambda pair: -pair[0])
            for value, tokens_ in grown[:beam_size]:
                if tokens_[-1] == STOP and value > best[0]:
                    best = (value, tokens_[:-1])
            opened = [pair for pair in grown if pair[1][-1] != STOP][:beam_size]
        expected = best if best[0] > -np.inf else opened[0]
        assert tokens == expected[1]
        assert_close(score, expected[0], TERMS)


def test_what_is_never_written_is_not_written() -> None:
    for beam_size in (1, 3):
        for tokens, _, _ in run(
            DecodingConfig(max_tokens=T, beam_size=beam_size),
            TokenConstraints(stop=(STOP,), suppressed=(0, 2)),
        ):
            assert not {0, 2} & set(tokens)


def test_nucleus_keeps_the_smallest_set_that_reaches_the_share() -> None:
    probabilities = np.array([[0.5, 0.1, 0.3, 0.06, 0.04], [0.2, 0.2, 0.2, 0.2, 0.2]])
    logits = jnp.log(jnp.concatenate([probabilities] * 2))
    kept = np.isfinite(rows.nucleus(logits, jnp.array([0.75, 1.0, 0.85, 0.3])))
    np.testing.assert_array_equal(kept[0], [True, False, True, False, False])
    np.testing.assert_array_equal(kept[1], [True] * 5)
    np.testing.assert_array_equal(kept[2], [True, True, True, False, False])


def test_sampling_follows_the_models_distribution_and_its_keys() -> None:
    count = 4000
    prompts = PromptArrays(*(jnp.repeat(a[:1], count, axis=0) for a in PROMPTS[:3]), None)
    sample = jax.jit(
        lambda keys: continued(
            prompts,
            keys,
            DecodingConfig(max_tokens=1, temperature=1.5),
            TokenConstraints(stop=()),
        ).tokens[:, 0]
    )
    drawn = np.asarray(sample(jax.random.split(jax.random.key(3), count)))
    wanted = jax.nn.softmax(log_probabilities(prompt(0))[-1] / 1.5)
    np.testing.assert_allclose(np.bincount(drawn, minlength=V) / count, wanted, atol=0.03)
    np.testing.assert_array_equal(drawn, sample(jax.random.split(jax.random.key(3), count)))
