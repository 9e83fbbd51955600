"""Compares the outputs of a published model here and in transformers, both in float32 on the
same inputs.
"""

import importlib.util
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.interop.load import (
    LoadedLanguageModel,
    load_language_model,
    load_vision_encoder,
)

LENGTHS = (1, 17, 128)
TEXT = (
    "In the beginning there was an image, and whoever looked at it said what was to be seen:"
    " two dogs on a beach, one of them wet, and behind them the sea. Later there were many"
    " images, 1,024 to a page, and nobody looked at all of them. Machines were asked instead."
    " What is on the left? A boat. Is it moving? It is hard to tell from one frame, they said,"
    " and asked for another."
)


class Comparison(NamedTuple):
    """Holds the result of a comparison.

    relative_error: largest absolute difference of logits or features, divided by the largest
    absolute value of the original. divergence: KL(original || ours) in nats, mean over
    positions, None for an encoder. values: how many numbers were compared.
    """

    relative_error: float
    divergence: float | None
    values: int


def require_original() -> None:
    """Raises UserError if torch or transformers is not installed."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{package} is not installed, so that there is no original to compare with: pip"
                " install 'flamingo_jax[interop-test]'"
            )


def verify_language_model(folder: str | pathlib.Path) -> Comparison:
    """Compares the logits of texts of several lengths: in one padded batch here, one by one in
    transformers, which also checks the padding.
    """
    require_original()
    import torch
    import transformers

    loaded = load_language_model(folder, dtype=jnp.float32, weights=jnp.float32)
    texts = _texts(loaded)
    rows, segments = (np.zeros((len(texts), max(map(len, texts))), np.int32) for _ in range(2))
    for row, text in enumerate(texts):
        rows[row, : len(text)], segments[row, : len(text)] = text, 1
    positions = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    ours = np.asarray(nnx.jit(lambda model: model(rows, positions, segments))(loaded.model))
    # Free our weights before the original is loaded.
    del loaded
    original = _original(transformers.AutoModelForCausalLM, folder)
    with torch.no_grad():
        theirs = [
            original(torch.from_numpy(text.astype(np.int64))[None]).logits[0].numpy()
            for text in texts
        ]
    mine = np.concatenate([ours[row, : len(text)] for row, text in enumerate(texts)]).astype(
        np.float64
    )
    expected = np.concatenate(theirs).astype(np.float64)
    # In float64, so that the divergence itself has no rounding error.
    p, q = _log_softmax(expected), _log_softmax(mine)
    return Comparison(
        _relative(mine, expected), float((np.exp(p) * (p - q)).sum(-1).mean()), expected.size
    )


def verify_vision_encoder(folder: str | pathlib.Path) -> Comparison:
    """Compares the grid features of two images of noise."""
    require_original()
    import torch
    import transformers

    loaded = load_vision_encoder(folder, weights=jnp.float32)
    size = loaded.config.image_size
    images = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    ours = np.asarray(nnx.jit(lambda model: model(images))(loaded.model))
    original = _original(transformers.AutoModel, folder)
    tower = getattr(original, "vision_model", original)
    with torch.no_grad():
        theirs = tower(
            pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        ).last_hidden_state.numpy()
    # Skip the class token, if there is one.
    expected = theirs[:, theirs.shape[1] - ours.shape[1] * ours.shape[2] :]
    return Comparison(_relative(ours.reshape(expected.shape), expected), None, expected.size)


def _original(kind: Any, folder: str | pathlib.Path) -> Any:
    found = kind.from_pretrained(
        str(folder),
        attn_implementation="eager",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    return found.float().eval()


def _texts(loaded: LoadedLanguageModel) -> list[np.ndarray]:
    if loaded.tokenizer is None:
        draw = np.random.default_rng(0)
        return [draw.integers(0, loaded.model.config.vocab_size, length) for length in LENGTHS]
    ids = np.array([loaded.tokenizer.bos, *loaded.tokenizer.encode(TEXT)])
    return [ids[:length] for length in LENGTHS]


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
