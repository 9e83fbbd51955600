"""A training step, or captioning, beside open_flamingo's, both of the same sizes, in turn on the
same cores.

    pip install -e '.[interop-test]' einops einops-exts
    pip install --no-deps open_flamingo==2.0.1
    python -m tests.planning.open_flamingo [--generate] [--rounds=3] [--runs=3] \\
        --sizes=layers=4,width=256,heads=4,vocab=8192,xattn_every=1,vit_layers=4,vit_width=256,\\
vit_heads=4,image=96,patch=16,interleaved=8x3x128,pairs=16x1x32

open_flamingo wants torchvision, which its model does not need: hence --no-deps. Its step is as
its train_utils.py has it: a loss and its gradient for each dataset, the embedding's gradient
masked to the tokens that were added, clipping, AdamW; float32, as ours.

--generate times `generate` of both: 1 and 64 prompts of 4 shots, 3 beams, 20 new tokens, random
images and texts of equal numbers of tokens, as `launch.benchmark generate` makes them. Both get
as many threads as this process may use: `taskset -c 0 python -m ...` compares one core. On a
machine that computes something else torch's threads wait for each other at every operation, and
the figures mean nothing: each line says how much of the machine was others'.
"""

import importlib.util
import itertools
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from configs.benchmark import experiment_of
from flamingo_jax.experiment import DatasetConfig, FlamingoConfig, VisionConfig
from flamingo_jax.models.language_model_config import LanguageModelConfig
from flamingo_jax.planning.generation_timing import (
    BEAMS,
    CAPTION_TOKENS,
    SHOTS,
    GenerationWork,
    PromptMaker,
    random_model,
)
from flamingo_jax.planning.timing import median_seconds

SIZES = flags.DEFINE_string("sizes", None, "As launch.benchmark takes them.", required=True)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Of each, in turn.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 12, "Steps that are timed in each.", lower_bound=1)
GENERATE = flags.DEFINE_bool("generate", False, "Time generation in place of the training step.")
PROMPTS = flags.DEFINE_list("prompts", ["1", "64"], "Of --generate: prompts at a time.")
RUNS = flags.DEFINE_integer("runs", 3, "Of --generate: runs of each in a round.", lower_bound=1)
PEER_BATCH = flags.DEFINE_integer(
    "peer_batch",
    16,
    "Of --generate: prompts that open_flamingo takes at a time. On two cores 64 at once took half"
    " as long again.",
    lower_bound=1,
)
ONLY = flags.DEFINE_enum(
    "only", None, ["ours", "peer"], "Time one of the two, in this process, and print JSON."
)

MATRIX = 2048


def main(_: list[str]) -> None:
    if ONLY.value:
        print(json.dumps(time_generations() if GENERATE.value else time_peer()))
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
        peers.append(_run("-m", "tests.planning.open_flamingo", "--only=peer", *given))
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
    """Prints the seconds of captioning 1 and 64 prompts, ours and the peer's in turn, each as it
    comes.
    """
    console = Console()
    given = ["--generate", f"--sizes={SIZES.value}", f"--runs={RUNS.value}"]
    given.append(f"--peer_batch={PEER_BATCH.value}")
    runs: dict[str, dict[str, list[float]]] = {
        count: {"ours": [], "peer": []} for count in PROMPTS.value
    }
    for place, (count, sides) in itertools.product(range(ROUNDS.value), runs.items()):
        for side, found in sides.items():
            began, others = time.perf_counter(), _others_seconds()
            command = ("-m", "tests.planning.open_flamingo", f"--only={side}", *given)
            found.append(_run(*command, f"--prompts={count}")[count])
            taken = time.perf_counter() - began
            share = (_others_seconds() - others) / (taken * (os.cpu_count() or 1))
            console.print(
                f"round {place + 1}, {count} prompts, {side}: {found[-1]:.3f} s ({taken:.0f} s in"
                f" all; {share:.0%} of the machine was others')"
            )
    table = Table(
        "prompts at a time", title=f"captions after {SHOTS} shots, {BEAMS} beams, seconds"
    )
    for heading in ("flamingo_jax", "open_flamingo", "times as fast"):
        table.add_column(heading, justify="right")
    for count, sides in runs.items():
        mine, peer = (statistics.median(sides[side]) for side in ("ours", "peer"))
        table.add_row(count, f"{mine:.3f}", f"{peer:.3f}", f"{peer / mine:.2f}")
    console.print(table)


def _others_seconds() -> float:
    """CPU seconds since the start of the machine that no child of this process, ended, used."""
    ticks = [int(n) for n in pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    # user, nice and system; not idle.
    return sum(ticks[:3]) / os.sysconf("SC_CLK_TCK") - used.ru_utime - used.ru_stime


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


def time_generations() -> dict[str, float]:
    """{number of prompts: median seconds of captioning them}, of new images in each run, of the
    side that --only names.
    """
    experiment = experiment_of(SIZES.value)
    assert experiment.flamingo is not None
    make = own_generation if ONLY.value == "ours" else peer_generation
    return {
        count: median_seconds(make(experiment.flamingo, int(count)), RUNS.value)
        for count in PROMPTS.value
    }


def own_generation(config: FlamingoConfig, prompts: int) -> Callable[[], None]:
    """Our captioning of random images by a model of random weights."""
    model = random_model(config)
    maker, tokens = PromptMaker(model), GenerationWork().max_tokens

    def caption() -> None:
        asked = [maker.prompt() for _ in range(prompts)]
        made = model.generate(asked, max_tokens=tokens, beam_size=BEAMS)
        assert all(len(one.tokens) == tokens for one in made)

    return caption


def peer_generation(config: FlamingoConfig, prompts: int) -> Callable[[], None]:
    """open_flamingo's captioning of random images by a model of random weights."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    image, end = _added_tokens(config)
    shot = [image, *[0] * CAPTION_TOKENS, end]
    lengths = GenerationWork().max_tokens + len(shot) * (SHOTS + 1)
    model = peer_model(config, lengths).eval()
    # As PromptMaker's: <BOS>, the shots, and the query's image and first token.
    row = torch.tensor([0, *shot * SHOTS, image, 0])
    size = config.vision.image_size

    def caption() -> None:
        for start in range(0, prompts, PEER_BATCH.value):
            some(min(PEER_BATCH.value, prompts - start))

    def some(prompts: int) -> None:
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
