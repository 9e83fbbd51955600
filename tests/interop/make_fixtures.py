"""Writes fixtures/ from transformers' PyTorch modules: python -m tests.interop.make_fixtures
[CASE ...], by default all of them (needs flamingo_jax[interop-test]).
"""

import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

from tests.interop import cases


def original(
    case: str, folder: pathlib.Path
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], dict[str, np.ndarray]]:
    """(config.json, {tensor: shape}, inputs and outputs) of the family's own module with the
    weights of `cases.values`.
    """
    import torch
    import transformers

    torch.set_num_threads(1)
    is_text = case in cases.LANGUAGE_MODELS
    given = (cases.LANGUAGE_MODELS if is_text else cases.VISION_ENCODERS)[case]
    config = transformers.AutoConfig.for_model(**given)
    kind = transformers.AutoModelForCausalLM if is_text else transformers.AutoModel
    kind.from_config(config).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved.pop("transformers_version")
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        tensors = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - it is no dict
    cases.write_folder(folder, saved, tensors)
    model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    found: dict[str, np.ndarray] = {}
    with torch.no_grad():
        if is_text:
            for text in cases.tokens(case, given["vocab_size"]):
                logits = model(torch.from_numpy(text.astype(np.int64))[None]).logits[0].numpy()
                found |= {
                    f"tokens_{len(text)}": text,
                    f"logits_{len(text)}": logits if len(text) <= 40 else logits[-20:],
                }
        else:
            images = cases.images(case, given["image_size"])
            features = model(
                pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            ).last_hidden_state
            found["features"] = features[
                :, 1 if "clip" in case and "siglip" not in case else 0 :
            ].numpy()
    return saved, tensors, found


def positions() -> dict[str, np.ndarray]:
    """As `cases.positions` holds them."""
    import torch
    import transformers

    torch.set_num_threads(1)
    table = cases.values("position_embedding", (4, 4, 8))
    channels_first = torch.from_numpy(table.transpose(2, 0, 1).copy())[None]
    found = {"table": table}
    for grid in cases.GRIDS:
        made = torch.nn.functional.interpolate(
            channels_first, size=grid, mode="bicubic", align_corners=False
        )
        found["table_{}_{}".format(*grid)] = made[0].numpy().transpose(1, 2, 0)
    for case, size in cases.OTHER_SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            cases.write_folder(pathlib.Path(folder), *cases.fixture(case))
            model = transformers.AutoModel.from_pretrained(
                folder, attn_implementation="eager", dtype=torch.float32
            ).eval()
        images = torch.from_numpy(cases.images(case, size).transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            made = model(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
        found[f"features_{case}"] = made[:, "siglip" not in case :].numpy()
    return found


def main() -> None:
    cases.FIXTURES.mkdir(exist_ok=True)
    everything = (*cases.LANGUAGE_MODELS, *cases.VISION_ENCODERS)
    if not sys.argv[1:]:
        np.savez_compressed(cases.FIXTURES / "positions.npz", **positions())
    for case in sys.argv[1:] or everything:
        with tempfile.TemporaryDirectory() as folder:
            config, tensors, found = original(case, pathlib.Path(folder))
        content = {
            "config": config,
            "tensors": {name: list(shape) for name, shape in tensors.items()},
        }
        (cases.FIXTURES / f"{case}.json").write_text(json.dumps(content, indent=1) + "\n")
        np.savez_compressed(cases.FIXTURES / f"{case}.npz", **found)


if __name__ == "__main__":
    main()
