"""Computes what inference with a Flamingo costs on a machine that need not exist: bytes of each
device, and the least time of a prompt and of a token, by FLOPs, by the bytes that are read from
memory, and by the bytes that are sent over links.

Each bound is a quotient: FLOPs over the peak of the chips, weights and cache over the memory's
bandwidth, sends over the links' bandwidth. The three overlap at best, so that a step takes at
least the longest of them. What a single message or the start of a kernel takes is not counted.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.inference.ahead_of_time import abstract_parameters
from flamingo_jax.inference.prompts import bucket_length
from flamingo_jax.models.conditioning import count_blocks
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.partitioning import rules
from flamingo_jax.partitioning.mesh import AXES, DATA, FSDP, MODEL, mesh_shape
from flamingo_jax.planning.topology import Chip, PlannedMachine
from flamingo_jax.tasks.flops import encoder_cost, product_flops
from flamingo_jax.weight_parts import is_multiplied

COMPUTE = jnp.dtype(jnp.bfloat16)
"""Compute dtype of inference on accelerators, also that of the cache."""


@dataclasses.dataclass(frozen=True)
class InferenceLoad:
    """What is asked of the model at a time.

    batch: prompts. prompt_tokens: of each prompt, padded to the engine's buckets. new_tokens:
    that are generated at most. visuals: images or clips of each prompt; frames: of each visual.
    beams: hypotheses of beam search, which share their prompt's cache.
    """

    batch: int = 1
    prompt_tokens: int = 512
    new_tokens: int = 32
    visuals: int = 5
    frames: int = 1
    beams: int = 1


class DeviceWork(NamedTuple):
    """What one device does in a step: FLOPs, bytes that it reads from its memory, and bytes
    that it sends.
    """

    flops: float
    bytes: float
    sent: float

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Returns the least seconds by each of the three."""
        return {
            "flops": self.flops / chip.flops,
            "bytes": self.bytes / chip.bandwidth,
            "links": self.sent / chip.link,
        }


class HeldWeight(NamedTuple):
    """A parameter as inference holds it.

    elements: of the whole array, 0 for the scales of integers. held: bytes on each device. read:
    bytes that each device multiplies with, after gathering what `fsdp` shards. cast: bytes of the
    copy in the compute dtype that the compiler may keep of a float32 parameter, for all layers at
    once.
    """

    elements: int
    held: float
    read: float
    cast: float


def plan_mesh(
    config: FlamingoConfig, machine: PlannedMachine, sizes: str, frozen_dtype: str = "bfloat16"
) -> AbstractMesh:
    """Makes the mesh of a machine without devices.

    sizes: such as "data=2,model=4"; "" shards over `model` as far as it divides all heads,
      which takes the least time for a token, and over `data` what is left, or over `fsdp` if
      the weights do not fit otherwise.

    Raises: UserError where the sizes do not multiply to the machine's chips, or the weights fit
      no such mesh.
    """

    def make(sizes: str) -> AbstractMesh:
        shape = mesh_shape(sizes, machine.chips)
        return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))

    if sizes:
        return make(sizes)
    parts = (config.language_model.attention, config.resampler, config.conditioning)
    model = math.gcd(machine.chips, *(part.heads for part in parts))
    try:
        mesh = make(f"model={model}")
        _parameters(config, machine, mesh, frozen_dtype)
    except UserError:
        mesh = make(f"data=1,fsdp=-1,model={model}")
    return mesh


def _parameters(
    config: FlamingoConfig, machine: PlannedMachine, mesh: AbstractMesh, frozen_dtype: str
) -> dict[str, jax.ShapeDtypeStruct]:
    devices: Any = mesh  # Of which only the shape is read.
    return abstract_parameters(
        config, devices, COMPUTE, memory=machine.chip.memory, frozen_dtype=frozen_dtype
    )[1]


def plan_inference(
    config: FlamingoConfig,
    machine: PlannedMachine,
    load: InferenceLoad,
    *,
    mesh: str = "",
    frozen_dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Computes whether a model fits a machine for inference and what bounds it, JSON-able.

    Bytes and seconds are those of one device, FLOPs those of all devices together.

    Args:
      mesh: see `plan_mesh`.
      frozen_dtype: "bfloat16" or "int8", of the language model's and the vision encoder's matrices.

    Raises: UserError for a mesh that does not fit the machine, or weights that do not fit its
      memory.
    """
    cost = _InferenceCost(config, machine, load, mesh, frozen_dtype)
    held = cost.bytes_held()
    total = sum(held.values())
    steps = {"encode": cost.encode(), "prefill": cost.prefill(), "token": cost.token()}
    seconds = {name: work.seconds(machine.chip) for name, work in steps.items()}
    bounds = {name: max(parts.values()) for name, parts in seconds.items()}
    chips = machine.chips
    return {
        "machine": machine.name,
        "chips": chips,
        "mesh": dict(cost.mesh.shape),
        "load": dataclasses.asdict(load) | {"slots": cost.prompt + load.new_tokens},
        "frozen_dtype": frozen_dtype,
        "bytes": {name: round(count) for name, count in held.items()},
        "total_bytes": round(total),
        "chip_bytes": machine.chip.memory,
        "fits": total <= machine.chip.memory,
        "flops": {name: work.flops * chips for name, work in steps.items()},
        "flops_of_a_token": {
            "weights": 2 * cost.elements_met,
            "attention": cost.attention_flops(cost.slots) + cost.visual_flops(cost.attended),
            "jaxpr": cost.traced_token_flops(),
        },
        "seconds": {
            name: parts | {"bound": bounds[name], "by": max(parts, key=lambda key: parts[key])}
            for name, parts in seconds.items()
        },
        "tokens_per_second": load.batch / bounds["token"],
        "answer_seconds": bounds["encode"] + bounds["prefill"] + load.new_tokens * bounds["token"],
    }


class _InferenceCost:
    """The counts of one model on one mesh. Arguments as for `plan_inference`."""

    def __init__(
        self,
        config: FlamingoConfig,
        machine: PlannedMachine,
        load: InferenceLoad,
        mesh: str,
        frozen_dtype: str,
    ):
        self.config, self.load = config, load
        self.lm, self.conditioning = config.language_model, config.conditioning
        self.mesh = plan_mesh(config, machine, mesh, frozen_dtype)
        self.model = self.mesh.shape[MODEL]
        shards = self.mesh.shape[DATA] * self.mesh.shape[FSDP]
        # The engine pads a batch to a multiple of the row shards.
        self.rows = math.ceil(load.batch / shards)
        self.prompts, self.row_shards = self.rows * shards, shards
        self.prompt = bucket_length(load.prompt_tokens)
        self.slots = self.prompt + load.new_tokens
        self.weights = dict(_weights(_parameters(config, machine, self.mesh, frozen_dtype)))
        self.shapes: Any = nnx.eval_shape(lambda: Flamingo(config, rngs=nnx.Rngs(0), dtype=COMPUTE))
        grafting = self.conditioning.kind == "grafting"
        self.layers = self.lm.layers + (self.conditioning.grafted_layers if grafting else 0)
        self.blocks = count_blocks(self.conditioning, self.lm)
        # All visuals of the row, or the one before the answer.
        last = self.conditioning.attend_to_media == "last"
        self.attended = min(load.visuals, 1) if last else load.visuals

    # What a token meets.

    def met(self, name: str) -> bool:
        """Returns whether a decoding step multiplies with a parameter: not with the vision
        encoder, the resampler, or what makes keys and values that are kept; and of an embedding
        table that is not the head it reads a few rows.
        """
        if name.startswith("language_model/"):
            tables = r"language_model/(position_embedding|layers/attention/position)(/.*)?"
            if not self.lm.tied_embeddings:
                tables += r"|language_model/embedding(/.*)?"
            return not re.fullmatch(tables, name)
        kept = "media_norm/.*" if self.conditioning.text_window else "(key|value|media_norm/.*)"
        if re.fullmatch(f"gated_xattn/layers/{kept}", name):
            return False
        return name.startswith(("gated_xattn/", "grafted/", "extra_embedding"))

    @property
    def elements_met(self) -> int:
        """Counts the parameters that a token meets."""
        return sum(w.elements for name, w in self.weights.items() if self.met(name))

    def attention_flops(self, slots: int) -> int:
        """Counts the FLOPs of a token's self-attention over a cache: scores and values, and the
        scores of distances with Transformer-XL's positions.
        """
        form, window = self.lm.attention, self.conditioning
        each = 6 if self.lm.positions.kind == "transformer_xl" else 4
        own = self.layers * each * slots * form.heads * form.head_width
        text = self.blocks * 4 * slots * window.heads * window.head_width
        return own + (text if window.text_window else 0)

    def visual_flops(self, visuals: int) -> int:
        """Counts the FLOPs of a token's cross-attention over so many visuals."""
        form, tokens = self.conditioning, visuals * self.config.resampler.latents
        return self.blocks * 4 * tokens * form.heads * form.head_width

    def traced_token_flops(self) -> int:
        """Counts the FLOPs of decoding one token, from the traced model."""
        graph, state = nnx.split(self.shapes)

        def of(decodes: bool) -> int:
            def run(state: nnx.State, visual_tokens: jax.Array) -> Any:
                model, one = nnx.merge(graph, state), jnp.zeros((1, 1), jnp.int32)
                media = model.prepare_media(visual_tokens) if self.attended else None
                seen = jnp.zeros((1, self.attended), jnp.int32) if self.attended else None
                cache = model.init_cache(1, self.slots)
                return (
                    model.decode(one, one, one, media, seen, cache) if decodes else (media, cache)
                )

            latents = (max(self.attended, 1), self.config.resampler.latents, self.lm.width)
            visual_tokens = jax.ShapeDtypeStruct(latents, COMPUTE)
            return product_flops(jax.make_jaxpr(run)(state, visual_tokens).jaxpr)

        # Without what comes before: the visuals' keys and values, the keys of the distances.
        return of(decodes=True) - of(decodes=False)

    # Bytes on each device.

    def bytes_held(self) -> dict[str, float]:
        """Computes the bytes on each device, part by part."""
        visuals = self.prompts * self.load.visuals
        return {
            "weights": sum(weight.held for weight in self.weights.values()),
            "cache": self.cache_bytes(),
            "visual_keys_values": visuals * self._visual_bytes(),
            "weights_cast": sum(w.cast for name, w in self.weights.items() if self.met(name)),
            "activations": max(self._prefill_activations(), self._encode_activations()),
        }

    def cache_bytes(self) -> float:
        """Computes the bytes of the self-attention's keys and values on a device: each prompt's
        once, and the new tokens' for every beam.
        """
        form, size = self.lm.attention, COMPUTE.itemsize
        heads = form.kv_heads or form.heads
        slots = self.rows * (self.prompt + self.load.beams * self.load.new_tokens)
        found = self.layers * 2 * slots * self._shard(heads) * form.head_width * size
        if self.lm.positions.kind == "transformer_xl":
            found += self.layers * self.slots * self._shard(form.heads) * form.head_width * size
        if self.conditioning.text_window:
            window = self.conditioning
            found += self.blocks * 2 * slots * self._shard(window.heads) * window.head_width * size
        return found

    def _shard(self, heads: int) -> float:
        """Returns the heads on a device: all of them where `model` does not divide them."""
        return heads / self.model if heads % self.model == 0 else heads

    def _visual_bytes(self) -> float:
        """Computes the bytes of one visual's keys and values, of all blocks, on a device."""
        form, latents = self.conditioning, self.config.resampler.latents
        width = self._shard(form.heads) * form.head_width
        return self.blocks * 2 * latents * width * COMPUTE.itemsize

    def _prefill_activations(self) -> float:
        """Estimates the largest working memory of prefill: the residual stream beside the
        scores of self-attention, of cross-attention, or the hidden units.
        """
        form, cross = self.lm.attention, self.conditioning
        tokens, size = self.rows * self.prompt, COMPUTE.itemsize
        # Float32 scores and their softmax; with Transformer-XL's the scores of distances too.
        scores = tokens * self._shard(form.heads) * self.slots * 4
        scores *= 4 if self.lm.positions.kind == "transformer_xl" else 2
        keys = self.load.visuals * self.config.resampler.latents
        own_visuals = self.rows * self.load.visuals * self._visual_bytes() / self.blocks
        crossed = own_visuals + 2 * tokens * self._shard(cross.heads) * keys * 4
        hidden = 3 * tokens * self.lm.feed_forward.width / self.model * size
        return 4 * tokens * self.lm.width * size + max(scores, crossed, hidden)

    def _encode_activations(self) -> float:
        """Estimates the largest working memory of the vision encoder: the largest inputs and
        results of one of its operations.
        """
        frames = math.ceil(self._frames() / self.mesh.size)
        if not frames:
            return 0.0
        side = self.config.vision.image_size
        image = jax.ShapeDtypeStruct((frames, side, side, 3), COMPUTE)
        graph, state = nnx.split(self.shapes.vision_encoder)
        jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, image)
        return max(_operation_bytes(jaxpr.jaxpr, min_size=frames * side))

    def _frames(self) -> int:
        return self.prompts * self.load.visuals * self.load.frames

    # The work of each step, on one device.

    def encode(self) -> DeviceWork:
        """Counts the work of encoding the visuals of all prompts and of projecting them to the
        keys and values of every block.
        """
        if not self.load.visuals:
            return DeviceWork(0.0, 0.0, 0.0)
        config, visuals = self.config, self.prompts * self.load.visuals
        resampler, latents = config.resampler, config.resampler.latents
        frame, cells = encoder_cost(self.shapes.vision_encoder, config.vision.image_size)
        resample = self._resampler_flops(cells)
        sharded = visuals / self.row_shards
        matrices = ("gated_xattn/layers/key", "gated_xattn/layers/value")
        media = 2 * latents * sum(self.weights[name].elements for name in matrices)
        flops = frame * math.ceil(self._frames() / self.mesh.size)
        # Every row shard holds the keys and values of all visuals.
        flops += (sharded * resample + visuals * media) / self.model
        read = sum(
            weight.read
            for name, weight in self.weights.items()
            if name.startswith(("vision_encoder/", "resampler/", "visual_projection"))
            or name in matrices
        )
        size = COMPUTE.itemsize
        tokens = sharded * latents * resampler.width * size
        sent = self._all_reduces(2 * resampler.layers, tokens)
        # The grid's features reach the model shards of their rows, the tokens all rows.
        sent += self._gathered(self._frames() / self.row_shards * cells, size)
        others = (self.row_shards - 1) / self.row_shards
        sent += others * visuals * latents * self.lm.width * size
        return DeviceWork(flops, read, sent)

    def _resampler_flops(self, cells: int) -> int:
        """Counts the FLOPs of resampling one visual and projecting it."""
        grid = jax.ShapeDtypeStruct(
            (1, self.load.frames, cells, self.shapes.vision_encoder.width), COMPUTE
        )
        graph, state = nnx.split(self.shapes.resampler)
        mask = jax.ShapeDtypeStruct(grid.shape[:2], jnp.bool_)
        jaxpr = jax.make_jaxpr(lambda state, x, m: nnx.merge(graph, state)(x, m))(state, grid, mask)
        projection = self.weights["visual_projection"].elements
        return product_flops(jaxpr.jaxpr) + 2 * self.config.resampler.latents * projection

    def prefill(self) -> DeviceWork:
        """Counts the work of reading all prompts into the cache; their logits are not needed."""
        head = "embedding" if self.lm.tied_embeddings else "head"
        # The added tokens' columns of the head are no work either.
        unused = (f"language_model/{head}", "extra_embedding")
        matrices = self.elements_met - sum(
            weight.elements
            for name, weight in self.weights.items()
            if name.startswith(unused) and self.met(name)
        )
        token = 2 * matrices + self.attention_flops(self.slots)
        token += self.visual_flops(self.load.visuals)
        flops = self.rows * self.prompt * token / self.model
        if self.lm.positions.kind == "transformer_xl":
            form = self.lm.attention
            map_size = self.lm.width * form.heads * form.head_width
            # The keys of the distances, once for all rows.
            flops += self.layers * 2 * self.slots * map_size / self.model
        read = sum(weight.read for name, weight in self.weights.items() if self.met(name))
        stream = self.rows * self.prompt * self.lm.width * COMPUTE.itemsize
        return DeviceWork(
            flops, read, self._all_reduces(self._sums(), stream) + self._weights_sent()
        )

    def token(self) -> DeviceWork:
        """Counts the work of one decoding step, a token of every hypothesis."""
        rows, size = self.rows * self.load.beams, COMPUTE.itemsize
        token = 2 * self.elements_met
        token += self.attention_flops(self.slots) + self.visual_flops(self.attended)
        read = sum(weight.read for name, weight in self.weights.items() if self.met(name))
        read += self.cache_bytes()
        read += self.rows * self.attended * self._visual_bytes()
        sent = self._all_reduces(self._sums() + 1, rows * self.lm.width * size)
        sent += self._gathered(rows * self.lm.vocab_size, 4) + self._weights_sent()
        return DeviceWork(rows * token / self.model, read, sent)

    def _sums(self) -> int:
        """Counts the sums over `model` in a pass through all layers: one after each half of a
        layer and of a block.
        """
        halves = 1 if self.conditioning.kind == "vanilla_xattn" else 2
        return 2 * self.layers + halves * self.blocks

    def _all_reduces(self, count: int, size: float) -> float:
        """Computes the bytes that a device sends in all-reduces of `size` bytes over `model`,
        by the ring: a reduce-scatter and an all-gather.
        """
        return count * 2 * (self.model - 1) / self.model * size

    def _gathered(self, elements: float, size: int) -> float:
        """Computes the bytes that a device sends to gather what is sharded over `model`."""
        return (self.model - 1) / self.model * elements * size

    def _weights_sent(self) -> float:
        """Computes the bytes that gathering weights over `fsdp` takes in one pass."""
        return sum(w.read - w.held for name, w in self.weights.items() if self.met(name))


def _weights(
    parameters: Mapping[str, jax.ShapeDtypeStruct],
) -> Iterator[tuple[str, HeldWeight]]:
    """Yields (name, weight) of every parameter."""
    trained = rules.trainable_names("flamingo", parameters)
    for name, p in parameters.items():
        sharding = p.sharding
        assert isinstance(sharding, NamedSharding)
        shard = sharding.shard_shape(p.shape)
        elements, each = math.prod(shard), float(p.dtype.itemsize)
        gathered = sharding.mesh.shape[FSDP] if FSDP in sharding.spec else 1
        read = elements * each * gathered
        cast = elements * gathered * COMPUTE.itemsize if name in trained else 0.0
        multiplied = math.prod(p.shape) if is_multiplied(name) else 0
        yield name, HeldWeight(multiplied, elements * each, read, cast)


def _operation_bytes(jaxpr: Any, min_size: int) -> Iterator[float]:
    """Yields the bytes of the inputs and results of every operation, those of loops' bodies
    among them. min_size: elements of the smallest array that counts.
    """
    yield 0.0
    for equation in jaxpr.eqns:
        inner = [p for p in jax.tree.leaves(equation.params) if hasattr(p, "eqns")]
        inner += [p.jaxpr for p in jax.tree.leaves(equation.params) if hasattr(p, "jaxpr")]
        for body in inner:
            yield from _operation_bytes(body, min_size)
        if not inner:
            arrays = [v.aval for v in (*equation.invars, *equation.outvars)]
            yield float(
                sum(
                    a.size * a.dtype.itemsize
                    for a in arrays
                    if getattr(a, "size", 0) >= min_size and hasattr(a, "dtype")
                )
            )
