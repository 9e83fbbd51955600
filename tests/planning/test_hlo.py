"""Collectives counted as often as they run, in programs whose answer is known."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flamingo_jax.planning.hlo import Collective, parse, summarise


def compiled(steps: int) -> str:
    """A loop over `steps` all-reduces of a float32 [4, 16] over the two devices of `a`, then one all-gather of [8, 16] over the four of `b`."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec(None, "b"), out_specs=PartitionSpec(), check_vma=False)
    def run(x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda c, _: (jnp.tanh(jax.lax.psum(c, "a")), None), x, None, length=steps)
        return jax.lax.all_gather(x, "b", axis=1, tiled=True)

    x = jax.ShapeDtypeStruct((4, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "b")))
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
"""


def test_cycles_of_a_fusion_count_once_and_of_a_loop_as_often_as_it_runs() -> None:
    summary = summarise(TPU)
    assert summary.cycles == 24 * 100 + 5
    assert summary.collectives == [Collective("all-gather", "[4,4]<=[16]", 32 * 128 * 2, 24)]
    computations, entry = parse(TPU)
    assert entry == "main.2" and [i.opcode for i in computations["fused"]] == ["parameter", "negate"]


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        summarise("nothing")
