"""A Llama-form GGUF file as a folder of transformers: config.json, float32 safetensors and
tokenizer.json. For tests on real weights that are at hand as GGUF alone; it needs the package
`gguf`.
"""

import json
import pathlib
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SEPARATOR = "<|endoftext|>"
"""Between documents in SmolLM2's training."""


def write_folder(file: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Writes the folder of a GGUF file whose architecture is llama and tokenizer smollm's."""
    import gguf

    reader = gguf.GGUFReader(file)
    known = {name: field.contents() for name, field in reader.fields.items()}
    assert known["general.architecture"] == "llama" and known["tokenizer.ggml.pre"] == "smollm"
    heads = {
        "attn_q": known["llama.attention.head_count"],
        "attn_k": known["llama.attention.head_count_kv"],
    }
    tensors = {}
    for tensor in reader.tensors:
        values = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        layer, _, part = tensor.name.removeprefix("blk.").partition(".")
        part = part.removesuffix(".weight")
        if part in heads:
            # GGUF stores the values that rotary positions turn as pairs beside one another;
            # here value i and i + d / 2 form a pair.
            pairs = values.reshape(heads[part], -1, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        whole = {
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight",
        }
        name = whole.get(tensor.name) or f"model.layers.{layer}.{NAMES[part]}.weight"
        tensors[name] = np.ascontiguousarray(values)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama",
        "vocab_size": known["llama.vocab_size"],
        "hidden_size": known["llama.embedding_length"],
        "num_hidden_layers": known["llama.block_count"],
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "intermediate_size": known["llama.feed_forward_length"],
        "rms_norm_eps": known["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": known["llama.rope.freq_base"],
        "max_position_embeddings": known["llama.context_length"],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(known, folder)
    return folder


def _write_tokenizer(known: dict[str, Any], folder: pathlib.Path) -> None:
    tokens = known["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in known["tokenizer.ggml.merges"]]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: number for number, token in enumerate(tokens)}, merges)
    )
    split = tokenizers.pre_tokenizers
    made.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    kinds = known["tokenizer.ggml.token_type"]
    made.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == 3])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": SEPARATOR, "eos_token": SEPARATOR})
    )
