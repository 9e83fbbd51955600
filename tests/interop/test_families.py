"""Published families give what transformers' PyTorch modules give: fixtures/ holds their
outputs on weights that `cases.values` makes again.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.interop.load import load_language_model, load_vision_encoder
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.vit import resize_positions
from tests.interop import cases

BAR = 1e-5
"""Largest difference over the largest value."""
STEPS = 5
"""Tokens that are decoded one by one."""


def relative_error(found: jax.Array, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


def texts(case: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, logits of the last of them) of every length."""
    kept = cases.outputs(case)
    return [
        (kept[name], kept[name.replace("tokens", "logits")])
        for name in kept
        if name.startswith("tokens")
    ]


@pytest.fixture(scope="module", params=cases.LANGUAGE_MODELS)
def language_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, LanguageModel]:
    # Three files, so that layers lie apart from each other.
    folder = cases.write_folder(
        tmp_path_factory.mktemp(request.param), *cases.fixture(request.param), files=3
    )
    return request.param, load_language_model(folder).model


@nnx.jit
def logits(
    model: LanguageModel, tokens: jax.Array, positions: jax.Array, segments: jax.Array
) -> jax.Array:
    return model(tokens, positions, segments)


def test_padded_rows(language_model: tuple[str, LanguageModel]) -> None:
    case, model = language_model
    found = texts(case)
    length = max(len(tokens) for tokens, _ in found) + 3
    rows, segments = np.zeros((2, len(found), length), np.int32)
    for row, (tokens, _) in enumerate(found):
        rows[row, : len(tokens)], segments[row, : len(tokens)] = tokens, 1
    made = logits(model, rows, np.broadcast_to(np.arange(length), rows.shape), segments)
    for row, (tokens, expected) in enumerate(found):
        assert (
            relative_error(made[row, len(tokens) - len(expected) : len(tokens)], expected) <= BAR
        ), len(tokens)


def test_packed_rows(language_model: tuple[str, LanguageModel]) -> None:
    case, model = language_model
    found = texts(case)
    row = np.concatenate([tokens for tokens, _ in found])[None]
    positions = np.concatenate([np.arange(len(tokens)) for tokens, _ in found])[None]
    segments = np.concatenate(
        [np.full(len(tokens), number + 1) for number, (tokens, _) in enumerate(found)]
    )[None]
    made, end = logits(model, row, positions, segments)[0], 0
    for tokens, expected in found:
        end += len(tokens)
        assert relative_error(made[end - len(expected) : end], expected) <= BAR, len(tokens)


def test_with_the_cache(language_model: tuple[str, LanguageModel]) -> None:
    """Prompts of several lengths side by side, padded, then token by token."""
    case, model = language_model
    found = [(tokens, expected) for tokens, expected in texts(case) if len(tokens) > STEPS]
    rows, slots = len(found), 208
    decode = nnx.jit(lambda model, tokens, positions, cache: model.decode(tokens, positions, cache))
    prompts = [tokens[: len(tokens) - STEPS] for tokens, _ in found]
    block = np.zeros((rows, max(map(len, prompts))), np.int32)
    positions = np.full(block.shape, slots)
    for row, prompt in enumerate(prompts):
        block[row, : len(prompt)], positions[row, : len(prompt)] = prompt, np.arange(len(prompt))
    made, cache = decode(model, block, positions, model.init_cache(rows, slots))
    parts = [[made[row, : len(prompt)]] for row, prompt in enumerate(prompts)]
    for step in range(STEPS):
        places = np.array([[len(prompt) + step] for prompt in prompts])
        made, cache = decode(
            model,
            np.array(
                [[tokens[place]] for (tokens, _), (place,) in zip(found, places, strict=True)]
            ),
            places,
            cache,
        )
        for row in range(rows):
            parts[row].append(made[row])
    for row, (tokens, expected) in enumerate(found):
        assert relative_error(jnp.concatenate(parts[row])[-len(expected) :], expected) <= BAR, len(
            tokens
        )


@pytest.mark.parametrize("case", cases.VISION_ENCODERS)
def test_vision_encoders(case: str, tmp_path: pathlib.Path) -> None:
    config, tensors = cases.fixture(case)
    loaded = load_vision_encoder(cases.write_folder(tmp_path, config, tensors, files=2))
    features = loaded.model(jnp.asarray(cases.images(case, config["image_size"])))
    expected = cases.outputs(case)["features"]
    assert features.shape[1] * features.shape[2] == expected.shape[1]
    assert relative_error(features.reshape(expected.shape), expected) <= BAR


@pytest.mark.parametrize("case", cases.OTHER_SIZES)
def test_vision_encoders_at_another_size(case: str, tmp_path: pathlib.Path) -> None:
    config, tensors = cases.fixture(case)
    size = cases.OTHER_SIZES[case]
    assert size != config["image_size"]
    loaded = load_vision_encoder(cases.write_folder(tmp_path, config, tensors))
    features = loaded.model(jnp.asarray(cases.images(case, size)))
    expected = cases.positions()[f"features_{case}"]
    assert relative_error(features.reshape(expected.shape), expected) <= BAR


@pytest.mark.parametrize("grid", cases.GRIDS)
def test_positions_are_interpolated_as_torch_does(grid: tuple[int, int]) -> None:
    found = cases.positions()
    made = resize_positions(jnp.asarray(found["table"]), *grid)
    assert relative_error(made, found["table_{}_{}".format(*grid)]) <= BAR
