"""A training step, or captioning, beside open_flamingo's, both of the same sizes, in turn on the
same cores.

    pip install -e '.[interop-test]' einops einops-exts
    pip install --no-deps open_flamingo==2.0.1
    python -m tests.planning.open_flamingo [--generate] [--rounds=3] \\
        --sizes=layers=4,width=256,heads=4,vocab=8192,xattn_every=1,vit_layers=4,vit_width=256,\\
vit_heads=4,image=96,patch=16,interleaved=8x3x128,pairs=16x1x32

open_flamingo wants torchvision, which its model does not need: hence --no-deps. Its step is as
its train_utils.py has it: a loss and its gradient for each dataset, the embedding's gradient
masked to the tokens that were added, clipping, AdamW; float32, as ours.

--generate times `generate` of both: 1 and 64 prompts of 4 shots, 3 beams, 20 new tokens, random
images and texts of equal numbers of tokens, as `launch.benchmark generate` makes them.
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
from flamingo_jax.planning.generation_timing import BEAMS, CAPTION_TOKENS, SHOTS, GenerationWork
from flamingo_jax.planning.timing import median_seconds

SIZES = flags.DEFINE_string("sizes", None, "As launch.benchmark takes them.", required=True)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Of each, in turn.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 12, "Steps that are timed in each.", lower_bound=1)
GENERATE = flags.DEFINE_bool("generate", False, "Time generation in place of the training step.")
PROMPTS = flags.DEFINE_list("prompts", ["1", "64"], "Of --generate: prompts at a time.")
PEER = flags.DEFINE_bool(
    "peer", False, "Time open_flamingo alone, in this process, and print JSON."
)

MATRIX = 2048


def main(_: list[str]) -> None:
    if PEER.value:
        print(json.dumps(time_peer_generation() if GENERATE.value else time_peer()))
        return
    if importlib.util.find_spec("open_flamingo") is None:
        sys.exit("open_flamingo is not installed: pip install --no-deps open_flamingo==2.0.1")
    if GENERATE.value:
        compare_generation()
        return
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


def compare_generation() -> None:
    """Prints the seconds of captioning 1 and 64 prompts, ours and the peer's in turn."""
    given = [f"--sizes={SIZES.value}", f"--prompts={','.join(PROMPTS.value)}"]
    runs: dict[str, list[dict[str, float]]] = {"flamingo_jax": [], "open_flamingo": []}
    for _round in range(ROUNDS.value):
        ours = _run("-m", "launch.benchmark", "generate", "--json", "--names=1", *given)
        runs["flamingo_jax"].append({n: rates["caption"] for n, rates in ours["rates"].items()})
        runs["open_flamingo"].append(
            _run("-m", "tests.planning.open_flamingo", "--peer", "--generate", *given)
        )
    table = Table(
        "prompts at a time", title=f"captions after {SHOTS} shots, {BEAMS} beams, seconds"
    )
    for heading in (*runs, "times as fast"):
        table.add_column(heading, justify="right")
    for count in PROMPTS.value:
        mine, peer = (statistics.median(run[count] for run in some) for some in runs.values())
        table.add_row(count, f"{mine:.3f}", f"{peer:.3f}", f"{peer / mine:.2f}")
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


def time_peer_generation() -> dict[str, float]:
    """{number of prompts: median seconds of captioning them}, of new images in each run."""
    import torch

    experiment = experiment_of(SIZES.value)
    assert experiment.flamingo is not None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return {
        str(count): median_seconds(
            peer_generation(experiment.flamingo, count), GenerationWork().runs
        )
        for count in map(int, PROMPTS.value)
    }


def peer_generation(config: FlamingoConfig, prompts: int) -> Callable[[], None]:
    """open_flamingo's captioning of random images by a model of random weights."""
    import torch

    image, end = _added_tokens(config)
    shot = [image, *[0] * CAPTION_TOKENS, end]
    lengths = GenerationWork().max_tokens + len(shot) * (SHOTS + 1)
    model = peer_model(config, lengths).eval()
    # As PromptMaker's: <BOS>, the shots, and the query's image and first token.
    row = torch.tensor([0, *shot * SHOTS, image, 0])
    size = config.vision.image_size

    def caption() -> None:
        tokens = torch.where(
            row < end, torch.randint(4, end, (prompts, len(row))), row.expand(prompts, -1)
        )
        with torch.inference_mode():
            made = model.generate(
                torch.rand(prompts, SHOTS + 1, 1, 3, size, size),
                tokens,
                torch.ones_like(tokens),
                num_beams=BEAMS,
                max_new_tokens=GenerationWork().max_tokens,
                # Random weights would end a text anywhere: all texts are of one length.
                min_new_tokens=GenerationWork().max_tokens,
                pad_token_id=0,
            )
        assert made.shape == (prompts, len(row) + GenerationWork().max_tokens)

    return caption


def _added_tokens(config: FlamingoConfig) -> tuple[int, int]:
    """The ids that stand for <image> and <EOC>."""
    vocabulary = config.language_model.vocab_size
    return vocabulary - 1, vocabulary - 2


def peer_model(config: FlamingoConfig, max_length: int) -> Any:
    """An open_flamingo of the config's sizes, its weights random."""
    import torch

    find_open_flamingo()
    from open_flamingo.src.flamingo import Flamingo

    image, end = _added_tokens(config)
    text = peer_language_model(config.language_model, max_length)
    clip = torch.nn.Module()
    clip.visual = peer_vision(config.vision)
    return Flamingo(
        clip,
        text,
        end,
        image,
        vis_dim=config.vision.vit.width,
        cross_attn_every_n_layers=config.conditioning.xattn_every,
    )


def peer_step(config: FlamingoConfig, datasets: list[DatasetConfig]) -> Callable[[], None]:
    """open_flamingo's update of random weights on full rows of random content; each dataset's
    visuals stand at equal distances.
    """
    import torch

    image, end = _added_tokens(config)
    model = peer_model(config, max(dataset.max_length for dataset in datasets)).train()
    text = model.lang_encoder
    model.requires_grad_(False)
    embedding = text.get_input_embeddings()
    for part in (model.perceiver, text.gated_cross_attn_layers, embedding):
        part.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    batches = [
        (random_batch(data, config.vision.image_size, image, end), data.weight) for data in datasets
    ]
    added = torch.zeros(config.language_model.vocab_size, 1)
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
    if "open_flamingo" in sys.modules:
        return
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
    forward = type(text).forward

    # transformers leaves out a mask of ones, which open_flamingo's layers expect.
    def with_mask(self: Any, input_ids: Any, attention_mask: Any = None, **others: Any) -> Any:
        return forward(self, input_ids, attention_mask, **others)

    type(text).forward = with_mask
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
