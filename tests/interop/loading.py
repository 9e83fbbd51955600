"""How fast and with how much memory a checkpoint is loaded, in a process of its own: python -m
tests.interop.loading FOLDER [make|read|load].

make: writes a Llama-form checkpoint of 8 GB in bfloat16. read: a bare read of its files into 16
  MiB. load: load_language_model, twice. The last two
print JSON: seconds, and of load the most memory that the process held beyond what it had before
and beyond the arrays themselves, which on CPU lie in host memory as well. The second load takes
the memory that the first gave back (with the Makefile's GLIBC_TUNABLES, which keep it in the
process): a machine that must find 8 GB of fresh pages first may take longer over that than over
reading, and an accelerator's host needs none. "cold" drops the files from the page cache before
each.
"""

import gc
import json
import math
import os
import pathlib
import sys
import time

import numpy as np

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64_000,
    "hidden_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}
FILES = 4


def tensors() -> dict[str, tuple[int, ...]]:
    width, hidden, vocabulary = 4096, 14_336, 64_000
    layer = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (1024, width),
        "self_attn.v_proj.weight": (1024, width),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (hidden, width),
        "mlp.up_proj.weight": (hidden, width),
        "mlp.down_proj.weight": (width, hidden),
    }
    layers = {
        f"model.layers.{number}.{name}": shape
        for number in range(16)
        for name, shape in layer.items()
    }
    return {
        "model.embed_tokens.weight": (vocabulary, width),
        **layers,
        "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }


def make(folder: pathlib.Path) -> None:
    """The files tensor by tensor, so that no more than one is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    # Finite in bfloat16, and no two pages alike.
    block = (np.random.default_rng(0).integers(0, 2**16, 2**25, np.uint16) & 0xBFFF).astype(
        np.uint16
    )
    shapes, weight_map = tensors(), {}
    names = list(shapes)
    for number in range(FILES):
        file = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        mine, start, header = (
            names[number * len(names) // FILES : (number + 1) * len(names) // FILES],
            0,
            {},
        )
        for name in mine:
            size = 2 * math.prod(shapes[name])
            header[name] = {
                "dtype": "BF16",
                "shape": shapes[name],
                "data_offsets": [start, start + size],
            }
            start += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in mine:
                left = math.prod(shapes[name])
                while left:
                    stream.write(block[: min(left, block.size)].data)
                    left -= min(left, block.size)
            stream.flush()
            os.fsync(stream.fileno())
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))


def drop(folder: pathlib.Path) -> None:
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bare_read(folder: pathlib.Path, cold: bool) -> dict[str, float]:
    if cold:
        drop(folder)
    memory, total, began = bytearray(2**24), 0, time.monotonic()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as stream:
            while count := stream.readinto(memory):
                total += count
    seconds = time.monotonic() - began
    return {"seconds": seconds, "bytes": total, "bytes_a_second": total / seconds}


def load(folder: pathlib.Path, cold: bool) -> dict[str, float]:
    import jax
    from flax import nnx

    from flamingo_jax.interop.folders import open_folder
    from flamingo_jax.interop.load import load_language_model

    largest = open_folder(folder, "language_model").largest
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    # The kernel counts the peak from here on.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, times, overheads = status("VmRSS"), [], []
    for _ in range(2):
        if cold:
            drop(folder)
        began = time.monotonic()
        loaded = load_language_model(folder)
        jax.block_until_ready(nnx.state(loaded.model))
        times.append(time.monotonic() - began)
        result = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(loaded.model)))
        overheads.append(status("VmHWM") - before - result)
        del loaded
        gc.collect()
    return {
        "seconds": times[1],
        "first_seconds": times[0],
        "bytes": result,
        "bytes_a_second": result / times[1],
        "overhead": overheads[0],
        "largest": largest,
    }


def status(key: str) -> int:
    line = next(
        line
        for line in pathlib.Path("/proc/self/status").read_text().splitlines()
        if line.startswith(key)
    )
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    target, what, *rest = pathlib.Path(sys.argv[1]), *sys.argv[2:]
    if what == "make":
        make(target)
    else:
        print(json.dumps({"read": bare_read, "load": load}[what](target, "cold" in rest)))
