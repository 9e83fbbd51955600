"""Published configs mean what transformers mean by them; what cannot be honoured, or is not
whole, is refused in one sentence before anything is read.
"""

import io
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import MeshConfig, RotaryScaling
from flamingo_jax.interop.folders import (
    PublishedFolder,
    is_published_folder,
    open_folder,
    read_config,
)
from flamingo_jax.interop.load import load_language_model, load_vision_encoder
from flamingo_jax.interop.published import VISION_ENCODERS, published
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.positions import rotary_frequencies
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.pytrees import to_flat
from tests.interop import cases

# As the models' cards and papers count them.
PARAMETERS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "mpt-7b": 6_649_286_656,
    # Without the two rows of positions that no token has.
    "opt-1.3b": 1_315_758_080 - 2 * 2048,
    "pythia-410m": 405_334_016,
    "RedPajama-INCITE-Base-3B-v1": 2_775_864_320,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_of_public_models(name: str) -> None:
    model = nnx.eval_shape(lambda: LanguageModel(published(name), rngs=nnx.Rngs(0)))
    assert sum(math.prod(a.shape) for a in to_flat(nnx.state(model)).values()) == PARAMETERS[name]


def test_details_of_public_models() -> None:
    assert published("Llama-3.1-8B").positions.scaling == RotaryScaling(
        "llama3", 8.0, 1.0, 4.0, 8192
    )
    assert (
        published("Mistral-7B-v0.1").attention.window == 4096
        and published("Qwen2.5-7B").attention.window == 0
    )
    assert [published(name).image_size for name in VISION_ENCODERS] == [224, 224, 384]
    assert (
        published("siglip-base-patch16-224").vit.activation == "gelu"
        and published("clip-vit-large-patch14").vit.activation == "quick_gelu"
    )
    assert (
        published("siglip-base-patch16-224").mean == (0.5, 0.5, 0.5)
        and published("clip-vit-large-patch14").std[0] == 0.26862954
    )


def folder_of(
    case: str, folder: pathlib.Path, change: dict[str, Any] | None = None, **options: Any
) -> pathlib.Path:
    config, tensors = cases.fixture(case)
    return cases.write_folder(folder, config | (change or {}), tensors, **options)


def refused(folder: pathlib.Path, part: Any = "language_model") -> str:
    with pytest.raises(UserError) as caught:
        open_folder(folder, part)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        (
            "llama",
            {"model_type": "mixtral"},
            (
                "has model_type = 'mixtral', but only one of 'llama', 'mistral', 'qwen2',"
                " 'qwen3', 'gpt_neox', 'mpt', 'opt' can be read"
            ),
        ),
        ("llama", {"model_type": None}, "has no model_type"),
        ("llama", {"hidden_act": "relu6"}, "hidden_act = 'relu6'"),
        ("mistral", {"attention_bias": True}, "attention_bias = True, but only False"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"quantization_config": {"bits": 4}}, "but only models without it"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type = 'yarn', but only 'default', 'linear' or 'llama3'",
        ),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "type = 'dynamic'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "has no low_freq_factor",
        ),
        ("llama", {"num_key_value_heads": 3}, "a divisor of num_attention_heads (4)"),
        ("llama", {"hidden_size": "wide"}, "hidden_size = 'wide', but only a whole number"),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
                "layer_types": None,
            },
            "a sliding window in all layers or in none",
        ),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("gpt_neox", {"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ("mpt", {"no_bias": False}, "no_bias = False, but only True"),
        ("mpt", {"expansion_ratio": 8}, "expansion_ratio = 8, but only 4"),
        ("mpt", {"attn_config": {"alibi": False}}, "has alibi = False"),
        ("mpt", {"attn_config": {"clip_qkv": 8}}, "clip_qkv = 8, but only models without it"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim = 16, but only 32"),
        ("clip", {"hidden_act": "tanh"}, "hidden_act = 'tanh'"),
        ("clip", {"num_channels": 1}, "num_channels = 1"),
        ("clip", {"model_type": "dinov2"}, "model_type = 'dinov2'"),
    ],
)
def test_configs_that_cannot_be_honoured(
    case: str, change: dict[str, Any], said: str, tmp_path: pathlib.Path
) -> None:
    folder = folder_of(case, tmp_path, change)
    assert said in refused(folder, "vision_encoder" if case == "clip" else "language_model")


def test_preprocessing(tmp_path: pathlib.Path) -> None:
    folder = folder_of("clip", tmp_path)
    assert read_config(folder, "vision_encoder").mean == (0.48145466, 0.4578275, 0.40821073)
    preprocessor = folder / "preprocessor_config.json"
    preprocessor.write_text(
        json.dumps(
            {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "rescale_factor": 1 / 255}
        )
    )
    config = read_config(folder, "vision_encoder")
    assert config.mean == (0.1, 0.2, 0.3) and config.std == (1.0, 2.0, 3.0)
    preprocessor.write_text(json.dumps({"rescale_factor": 1 / 127.5}))
    assert "rescale_factor" in refused(folder, "vision_encoder")
    preprocessor.write_text("{")
    assert "is no JSON document" in refused(folder, "vision_encoder")


@pytest.mark.parametrize(
    ("case", "given", "fit"),
    [
        ("clip", None, "crop"),
        ("clip", {"size": 224, "crop_size": 224, "do_center_crop": True}, "crop"),
        (
            "clip",
            {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}},
            "crop",
        ),
        ("clip", {"size": {"height": 224, "width": 224}, "do_center_crop": False}, "stretch"),
        ("siglip", None, "stretch"),
        ("siglip", {"size": {"height": 384, "width": 384}}, "stretch"),
        ("siglip", {"size": {"shortest_edge": 384}}, "crop"),
    ],
)
def test_images_become_squares_as_the_folders_preprocessor_makes_them(
    case: str, given: dict[str, Any] | None, fit: str, tmp_path: pathlib.Path
) -> None:
    folder = folder_of(case, tmp_path)
    if given is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(given))
    config = read_config(folder, "vision_encoder")
    assert config.image_fit == fit
    if given is not None:
        (folder / "preprocessor_config.json").unlink()
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": given}))
        assert read_config(folder, "vision_encoder") == config
    wide = io.BytesIO()
    Image.fromarray(np.full((20, 60, 3), 255, np.uint8)).save(wide, "PNG")
    made = load_vision_encoder(folder).preprocess([wide.getvalue()])
    # White to the edges: nothing is padded.
    assert np.ptp(made, axis=(1, 2)).max() == 0


def test_all_that_differs_is_said_at_once(tmp_path: pathlib.Path) -> None:
    folder = folder_of("llama", tmp_path)
    arrays = load_file(folder / "model.safetensors")
    layer = "model.layers.1.self_attn."
    arrays[layer + "query_proj.weight"] = arrays.pop(layer + "q_proj.weight")
    arrays[layer + "k_proj.weight"] = arrays[layer + "k_proj.weight"][:3].copy()
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.int32)
    arrays["extra"] = np.zeros(2, np.float32)
    del arrays["lm_head.weight"]
    save_file(arrays, folder / "model.safetensors")
    said = refused(folder)
    for part in (
        "(6 differ)",
        f"{layer}q_proj.weight is missing (nearest: {layer}query_proj.weight)",
        f"{layer}query_proj.weight [32, 32] is not known",
        "lm_head.weight is missing",
        "extra [2] is not known",
        f"{layer}k_proj.weight is [3, 32] instead of [16, 32]",
        "model.norm.weight is of type I32",
    ):
        assert part in said


def test_harmless_tensors_are_left_unread(tmp_path: pathlib.Path) -> None:
    def add(folder: pathlib.Path, **more: np.ndarray) -> None:
        arrays = load_file(folder / "model.safetensors")
        save_file(
            arrays | {name.replace("__", "."): array for name, array in more.items()},
            folder / "model.safetensors",
        )

    tied = folder_of("llama3", tmp_path / "tied")
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    turns = rotary_frequencies(4, 500_000.0, RotaryScaling("llama3", 8.0, 1.0, 4.0, 64))
    add(tied, lm_head__weight=embedding, model__layers__0__self_attn__rotary_emb__inv_freq=turns)
    assert open_folder(tied, "language_model").config.tied_embeddings
    add(tied, model__layers__1__self_attn__rotary_emb__inv_freq=rotary_frequencies(4, 500_000.0))
    assert (
        "model.layers.1.self_attn.rotary_emb.inv_freq is not what the config's rope_theta"
        in refused(tied)
    )
    # The whole of a CLIP as published has names of its own for the tower, and positions as a
    # tensor.
    config, tensors = cases.fixture("clip")
    names = {
        name if name.startswith("vision_model.") else f"vision_model.{name}": shape
        for name, shape in tensors.items()
    }
    whole = cases.write_folder(
        tmp_path / "clip", {"model_type": "clip", "vision_config": config}, names
    )
    add(
        whole,
        text_model__a=np.zeros(1, np.float32),
        visual_projection__weight=np.zeros(1, np.float32),
        logit_scale=np.zeros((), np.float32),
        vision_model__embeddings__position_ids=np.zeros(1, np.int64),
    )
    add(folder_of("clip", tmp_path / "tower"))
    assert isinstance(open_folder(whole, "vision_encoder"), PublishedFolder)


@pytest.mark.parametrize("names", ["", "model."], ids=["whole", "saved bare"])
def test_a_head_of_its_own_is_read_whatever_the_config_ties(
    names: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Transformers untie where a checkpoint holds both and they differ; the fixture is theirs."""
    folder = folder_of("llama", tmp_path, {"tie_word_embeddings": True})
    arrays = load_file(folder / "model.safetensors")
    arrays = {name.removeprefix(names): array for name, array in arrays.items()}
    save_file(arrays, folder / "model.safetensors")
    loaded = load_language_model(folder)
    assert not loaded.model.config.tied_embeddings and "is another tensor" in caplog.text
    assert read_config(folder, "language_model") == loaded.model.config
    kept = cases.outputs("llama")
    rows = kept["tokens_7"][None]
    places = np.arange(rows.shape[1])[None]
    found = nnx.jit(lambda model: model(rows, places, np.ones_like(rows)))(loaded.model)[0]
    expected = kept["logits_7"]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    head = np.ascontiguousarray(arrays["model.embed_tokens.weight".removeprefix(names)])
    save_file(arrays | {"lm_head.weight": head}, folder / "model.safetensors")
    assert open_folder(folder, "language_model").config.tied_embeddings


@pytest.mark.parametrize(
    ("case", "change", "window"),
    [
        ("mistral", {}, 9),
        ("mistral", {"max_position_embeddings": 8}, 9),
        ("mistral", {"max_position_embeddings": 9}, 9),
        ("mistral", {"sliding_window": None}, 0),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, 8),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, 0),
        (
            "qwen2",
            {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
            0,
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 600, "max_window_layers": 0},
            600,
        ),
    ],
)
def test_windows(case: str, change: dict[str, Any], window: int, tmp_path: pathlib.Path) -> None:
    change = {"layer_types": None} | change
    config = read_config(folder_of(case, tmp_path, change), "language_model")
    assert config.attention.window == window


def test_a_language_model_saved_without_its_head(tmp_path: pathlib.Path) -> None:
    config, tensors = cases.fixture("qwen2")
    whole, bare = (
        cases.write_folder(tmp_path / name, config, tensors) for name in ("whole", "bare")
    )
    arrays = load_file(whole / "model.safetensors")
    save_file(
        {name.removeprefix("model."): array for name, array in arrays.items()},
        bare / "model.safetensors",
    )
    same(load_language_model(whole).model, load_language_model(bare).model)


def test_folders_that_are_not_whole(tmp_path: pathlib.Path) -> None:
    assert "is no folder" in refused(tmp_path / "nowhere")
    assert "there is no" in refused(tmp_path)
    folder = folder_of("llama", tmp_path, files=3)
    assert is_published_folder(folder)
    index = folder / "model.safetensors.index.json"
    kept = index.read_text()
    index.write_text(kept.replace("model-00002-of-00003", "../model-00002-of-00003"))
    assert "names the file '../model-00002" in refused(folder)
    index.unlink()
    assert "holds 3 safetensors files but no model.safetensors.index.json" in refused(folder)
    index.write_text(kept)
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "model-00002-of-00003.safetensors is no whole safetensors file" in refused(folder)
    file.unlink()
    assert file.name in refused(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").touch()
    assert "files that unpickle are not read" in refused(folder)


def same(first: nnx.Module, second: nnx.Module) -> None:
    a, b = (to_flat(nnx.state(model)) for model in (first, second))
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_read_onto_a_mesh(tmp_path: pathlib.Path) -> None:
    folder = folder_of("qwen3", tmp_path / "lm", files=2)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    whole, spread = (
        load_language_model(folder).model,
        load_language_model(folder, mesh=mesh).model,
    )
    same(whole, spread)
    query = spread.layers.attention.query[...]
    assert query.sharding.spec == jax.P(None, "fsdp", "model", None) and query.addressable_shards[
        0
    ].data.shape == (2, 16, 2, 16)
    encoder = load_vision_encoder(folder_of("clip", tmp_path / "clip"), mesh=mesh).model
    assert encoder.patch_embedding[...].sharding.is_fully_replicated


def test_the_digest_names_weights_and_config(tmp_path: pathlib.Path) -> None:
    def digest(name: str, **change: Any) -> str:
        return open_folder(
            folder_of(
                "qwen2",
                tmp_path / name,
                change,
                dtype=np.float16 if name == "half" else np.float32,
            ),
            "language_model",
        ).digest()

    assert digest("a") == digest("b")
    assert len({digest("a"), digest("half"), digest("other", rms_norm_eps=1e-5)}) == 3
