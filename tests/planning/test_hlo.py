"""Collectives counted as often as they run, in programs whose answer is known."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flamingo_jax.planning.hlo import Collective, first_group, parse, summarise
from flamingo_jax.tasks.flops import product_flops


def compiled(steps: int) -> str:
    """A loop over `steps` all-reduces of a float32 [4, 16] over the two devices of `a`, then
    one all-gather of [8, 16] over the four of `b`.
    """
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=PartitionSpec(None, "b"),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    def run(x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(
            lambda c, _: (jnp.tanh(jax.lax.psum(c, "a")), None), x, None, length=steps
        )
        return jax.lax.all_gather(x, "b", axis=1, tiled=True)

    x = jax.ShapeDtypeStruct(
        (4, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "b"))
    )
    return jax.jit(run).lower(x).compile().as_text()


@pytest.mark.parametrize("steps", [3, 11])
def test_a_loops_body_counts_as_often_as_it_runs(steps: int) -> None:
    found = {c.kind: c for c in summarise(compiled(steps)).collectives}
    assert found["all-reduce"][2:] == (4 * 16 * 4, steps)
    assert found["all-gather"][2:] == (4 * 64 * 4, 1)


def test_depth_does_not_lengthen_the_program() -> None:
    assert summarise(compiled(3)).instructions == summarise(compiled(40)).instructions


TPU = """HloModule jit_step, is_scheduled=true

%body.1 (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]{1,0}) parameter(0)
  %x = bf16[8,128]{1,0} get-tuple-element(%p), index=1
  %ag = (bf16[8,128]{1,0}, bf16[32,128]{1,0:T(8,128)}) all-gather-start(%x), replica_groups=[4,4]<=[16], dimensions={0}, backend_config={"flag":"x"}
  %f = bf16[8,128]{1,0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
  ROOT %t = (s32[], bf16[8,128]{1,0}) tuple(%p, %f)
}

%fused (q: bf16[8,128]) -> bf16[8,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  ROOT %n = bf16[8,128]{1,0} negate(%q), backend_config={"estimated_cycles":"7"}
}

ENTRY %main.2 (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %w = (s32[], bf16[8,128]{1,0}) while(%a), condition=%cond, body=%body.1, backend_config={"known_trip_count":{"n":"24"}}
  ROOT %g = bf16[8,128]{1,0} get-tuple-element(%w), index=1, backend_config={"estimated_cycles":"5"}
}
"""  # noqa: E501


def test_cycles_of_a_fusion_count_once_and_of_a_loop_as_often_as_it_runs() -> None:
    summary = summarise(TPU)
    assert summary.cycles == 24 * 100 + 5
    assert summary.collectives == [Collective("all-gather", (0, 1, 2, 3), 32 * 128 * 2, 24)]
    computations, entry = parse(TPU)
    assert entry == "main.2" and [i.opcode for i in computations["fused"]] == [
        "parameter",
        "negate",
    ]


def test_a_loop_without_a_note_runs_as_often_as_its_condition_says() -> None:
    condition = """%cond (c: (s32[], bf16[8,128])) -> pred[] {
  %c = (s32[], bf16[8,128]{1,0}) parameter(0)
  %most = s32[] constant(9)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %most), direction=LT
}

ENTRY"""
    text = TPU.replace(', backend_config={"known_trip_count":{"n":"24"}}', "").replace(
        "ENTRY", condition
    )
    assert summarise(text).cycles == 9 * 100 + 5


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, to_apply=%add", (0, 2)),
        ("replica_groups=[2,4]<=[8], dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=3] {'axis_1'}, dimensions={0}", (0, 1, 2)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=3] {'axis_0'}, dimensions={0}", (0, 3)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("source_target_pairs={{0,1},{1,2}}", (0, 1)),
        ("replica_groups={}, to_apply=%add", ()),
    ],
)
def test_the_first_group_of_every_form(attributes: str, group: tuple[int, ...]) -> None:
    assert first_group(f"%x), channel_id=3, {attributes}") == group


def test_products_and_convolutions_of_a_program_are_those_of_its_jaxpr() -> None:
    def step(x: jax.Array, w: jax.Array, kernel: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=5)
        image = x.reshape(2, 8, 8, 4)
        return jax.lax.conv_general_dilated(
            image, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 64), (64, 64), (3, 3, 4, 16))
    ]
    text = jax.jit(step).lower(*arrays).compile().as_text()
    expected = 5 * 2 * 8 * 64 * 64 + 2 * 2 * 3 * 3 * 16 * 3 * 3 * 4
    assert product_flops(jax.make_jaxpr(step)(*arrays).jaxpr) == expected
    # XLA's CPU backend calls a library for some products, which are then no longer in the
    # program.
    assert summarise(text).flops in (expected, expected - 5 * 2 * 8 * 64 * 64)


def test_taps_on_padding_and_between_inputs_are_no_work() -> None:
    # A batched product as TPU programs write it: of the three taps of each output one falls on
    # its own input.
    text = """ENTRY %main (a: bf16[3,8,4], b: bf16[3,4,5]) -> bf16[3,8,5] {
  %a = bf16[3,8,4]{2,1,0} parameter(0)
  %b = bf16[3,4,5]{2,1,0} parameter(1)
  ROOT %c = bf16[3,8,5]{2,1,0} convolution(%a, %b), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf
}
"""  # noqa: E501
    assert summarise(text).flops == 2 * 3 * 8 * 4 * 5


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        summarise("nothing")
