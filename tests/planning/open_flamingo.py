"""A training step beside open_flamingo's, both of the same sizes, in turn on the same cores.

    pip install -e '.[interop-test]' einops einops-exts && pip install --no-deps
    open_flamingo==2.0.1 python -m tests.planning.open_flamingo
    --sizes=layers=4,width=256,heads=4,vocab=8192,xattn_every=1,vit_layers=4,vit_width=256,vit_heads=4,\\
image=96,patch=16,interleaved=8x3x128,pairs=16x1x32 [--rounds=3]

open_flamingo wants torchvision, which its model does not need: hence --no-deps. Its step is as
its train_utils.py has it: a loss and its gradient for each dataset, the embedding's gradient
masked to the tokens that were added, clipping, AdamW; float32, as ours.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from configs.benchmark import experiment_of
from flamingo_jax.experiment import DatasetConfig, FlamingoConfig, VisionConfig
from flamingo_jax.models.language_model_config import LanguageModelConfig
from flamingo_jax.planning.timing import median_seconds

SIZES = flags.DEFINE_string("sizes", None, "As launch.benchmark takes them.", required=True)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Of each, in turn.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 12, "Steps that are timed in each.", lower_bound=1)
PEER = flags.DEFINE_bool(
    "peer", False, "Time open_flamingo alone, in this process, and print JSON."
)

MATRIX = 2048


def main(_: list[str]) -> None:
    if PEER.value:
        print(json.dumps(time_peer()))
        return
    if importlib.util.find_spec("open_flamingo") is None:
        sys.exit("open_flamingo is not installed: pip install --no-deps open_flamingo==2.0.1")
    given = [f"--sizes={SIZES.value}", f"--steps={STEPS.value}"]
    ours, peers = [], []
    for _round in range(ROUNDS.value):
        ours.append(_run("-m", "launch.benchmark", "train", "--json", *given))
        peers.append(_run("-m", "tests.planning.open_flamingo", "--peer", *given))
    table = Table("", title="one training step, runs in turn")
    for heading in ("seconds", "matrix rate, GFLOP/s", "share of it"):
        table.add_column(heading, justify="right")
    for mine, peer in zip(ours, peers, strict=True):
        for name, found in (("flamingo_jax", mine), ("open_flamingo", peer)):
            table.add_row(
                name,
                f"{found['step']:.3f}",
                f"{found['matrix_rate'] / 1e9:.0f}",
                f"{mine['flops'] / found['step'] / found['matrix_rate']:.1%}",
            )

    def median(runs):
        return statistics.median(run["step"] for run in runs)

    table.caption = f"the median of ours takes {median(ours) / median(peers):.2f} of the peer's"
    Console().print(table)


def _run(*command: str) -> dict[str, Any]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(found.stdout.splitlines()[-1])


def time_peer() -> dict[str, float]:
    """The median step's seconds and the FLOPs a second of a large product, as `planning.timing`
    takes them.
    """
    import torch

    experiment = experiment_of(SIZES.value)
    assert experiment.flamingo is not None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    step = peer_step(experiment.flamingo, list(experiment.data.values()))
    a = torch.ones(MATRIX, MATRIX)
    return {
        "step": median_seconds(step, STEPS.value),
        "matrix_rate": 2 * MATRIX**3 / median_seconds(lambda: a @ a, STEPS.value),
    }


def peer_step(config: FlamingoConfig, datasets: list[DatasetConfig]) -> Callable[[], None]:
    """open_flamingo's update of random weights on full rows of random content; each dataset's
    visuals stand at equal distances.
    """
    import torch

    find_open_flamingo()
    from open_flamingo.src.flamingo import Flamingo

    lm = config.language_model
    image, end = lm.vocab_size - 1, lm.vocab_size - 2
    text = peer_language_model(lm, max(dataset.max_length for dataset in datasets))
    clip = torch.nn.Module()
    clip.visual = peer_vision(config.vision)
    model = Flamingo(
        clip,
        text,
        end,
        image,
        vis_dim=config.vision.vit.width,
        cross_attn_every_n_layers=config.conditioning.xattn_every,
    ).train()
    model.requires_grad_(False)
    embedding = text.get_input_embeddings()
    for part in (model.perceiver, text.gated_cross_attn_layers, embedding):
        part.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    batches = [
        (random_batch(data, config.vision.image_size, image, end), data.weight) for data in datasets
    ]
    added = torch.zeros(lm.vocab_size, 1)
    added[[image, end]] = 1

    def step() -> None:
        for inputs, weight in batches:
            (model(**inputs)[0] * weight).backward()
        embedding.weight.grad = embedding.weight.grad * added
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def find_open_flamingo() -> None:
    """Makes the package's modules importable without its own __init__, which imports open_clip
    and with it torchvision.
    """
    found = importlib.util.find_spec("open_flamingo")
    assert found is not None and found.submodule_search_locations is not None
    package = types.ModuleType("open_flamingo")
    package.__path__ = list(found.submodule_search_locations)
    source = types.ModuleType("open_flamingo.src")
    source.__path__ = [f"{folder}/src" for folder in package.__path__]
    sys.modules |= {"open_flamingo": package, "open_flamingo.src": source}


def peer_language_model(lm: LanguageModelConfig, max_length: int) -> Any:
    """A GPT-NeoX with the places that open_flamingo puts its layers in."""
    from open_flamingo.src.flamingo_lm import FlamingoLMMixin
    from open_flamingo.src.utils import extend_instance
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    text = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=lm.vocab_size,
            hidden_size=lm.width,
            num_hidden_layers=lm.layers,
            num_attention_heads=lm.attention.heads,
            intermediate_size=lm.feed_forward.width,
            max_position_embeddings=max_length,
        )
    )
    extend_instance(text, FlamingoLMMixin)
    text.set_decoder_layers_attr_name("gpt_neox.layers")
    return text


def peer_vision(vision: VisionConfig) -> Any:
    """A CLIP's vision part as open_clip's `visual` answers: pooled features, then those of the
    patches.
    """
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    class Vision(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = CLIPVisionModel(
                CLIPVisionConfig(
                    hidden_size=vision.vit.width,
                    intermediate_size=vision.vit.feed_forward,
                    num_hidden_layers=vision.vit.layers,
                    num_attention_heads=vision.vit.heads,
                    image_size=vision.image_size,
                    patch_size=vision.vit.patch_size,
                )
            )

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            features = self.vit(images)
            return features.pooler_output, features.last_hidden_state[:, 1:]

    return Vision()


def random_batch(data: DatasetConfig, size: int, image: int, end: int) -> dict[str, Any]:
    """Full rows of random tokens and pixels; image, end: the tokens of <image> and <EOC>."""
    import torch

    tokens = torch.randint(0, end, (data.batch_size, data.max_length))
    tokens[:, :: data.max_length // data.visuals][:, : data.visuals] = image
    return {
        "vision_x": torch.rand(data.batch_size, data.visuals, 1, 3, size, size),
        "lang_x": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": torch.where(tokens == image, -100, tokens),
    }


if __name__ == "__main__":
    app.run(main)
