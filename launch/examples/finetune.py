r"""Fine-tunes a Flamingo on your own images and captions, in a short loop to read and change.

    python -m launch.examples.finetune my_photos --model=runs/quickstart/flamingo/export \
        --output=runs/mine/finetuned

The folder has a `captions.jsonl` (see captions.py); a tenth of it is held out. As in the
paper, the resampler, the gated cross-attention and the embedding of <EOC> are trained, and the
vision encoder and the language model are frozen. Use `launch.train` for data larger than
memory, several devices and checkpoints.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from typing import Any

import jax
import optax
from flax import nnx

import flamingo_jax as fj
from flamingo_jax.partitioning.rules import trainable_names
from flamingo_jax.pytrees import from_flat, to_flat
from flamingo_jax.tasks.flamingo import FlamingoTask
from launch.examples.captions import Captioned, read_captions


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="images and captions.jsonl")
    parser.add_argument("--model", default="runs/quickstart/flamingo/export")
    parser.add_argument("--output", default="runs/finetuned", help="export that is written")
    parser.add_argument("--prompt", default="Output:", help="what stands behind an image")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    options = parser.parse_args()

    records = read_captions(options.folder)
    random.Random(0).shuffle(records)
    held_out, records = records[: len(records) // 10 or 1], records[len(records) // 10 or 1 :]
    if not records:
        raise fj.UserError(f"{options.folder} has one caption: write more")
    model = fj.load(options.model)
    flamingo = fine_tune(model, records, held_out, options)
    fj.Model(flamingo, model.tokenizer).save(options.output)
    print(f"saved {options.output}")


def fine_tune(
    model: fj.Model, records: list[Captioned], held_out: list[Captioned], options: Any
) -> fj.Flamingo:
    """Trains with AdamW and prints the held-out loss, in nats per caption."""
    # One split into graph, trained and frozen arrays; gradients and moments exist only for the
    # trained ones.
    graph, state = nnx.split(model.flamingo)
    parameters = to_flat(state)
    names = trainable_names("flamingo", parameters)
    trained = {name: parameters[name] for name in names}
    frozen = {name: value for name, value in parameters.items() if name not in names}
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, max(1, options.steps // 10), options.steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    moments = optimizer.init(trained)

    @jax.jit
    def loss_of(trained: Any, frozen: Any, batch: Any) -> jax.Array:
        flamingo = nnx.merge(graph, nnx.State(from_flat(trained | frozen)))
        return FlamingoTask().losses(flamingo, {"own": batch}, None)["own"].value

    @jax.jit
    def step(trained: Any, frozen: Any, moments: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_of)(trained, frozen, batch)
        updates, moments = optimizer.update(gradient, moments, trained)
        return optax.apply_updates(trained, updates), moments, loss

    def batch_of(some: Sequence[Captioned]) -> Any:
        prompts = [[record.image, options.prompt] for record in some]
        return model.batch(prompts, [f" {record.caption.strip()}" for record in some])

    draw = random.Random(0)
    for number in range(options.steps + 1):
        if number % max(1, options.steps // 10) == 0:
            held = [loss_of(trained, frozen, batch_of([record])) for record in held_out]
            print(f"step {number}: held-out loss {sum(map(float, held)) / len(held):.3f}")
        if number < options.steps:
            some = draw.choices(records, k=options.batch_size)
            trained, moments, _ = step(trained, frozen, moments, batch_of(some))
    return nnx.merge(graph, nnx.State(from_flat(trained | frozen)))


if __name__ == "__main__":
    try:
        main()
    except fj.UserError as error:
        sys.exit(f"error: {error}")
