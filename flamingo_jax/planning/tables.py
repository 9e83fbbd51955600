"""Lays out plans, and the change of int8 weights, as tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from flamingo_jax.experiment import Experiment
from flamingo_jax.inference.int8_change import Int8Change
from flamingo_jax.planning.counts import PartCount

GIB = 2**30
NUMBERS = {"B": 1e9, "M": 1e6, "k": 1e3}
BYTES = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "bytes": 1}


def held_out_table(held_out: dict[str, Any]) -> Table:
    """Lays out the result of `plan.plan_held_out`: the peak memory of each held-out
    dataset.
    """
    table = Table("held-out dataset", title="evaluation")
    table.add_column("peak of the chip's memory", justify="right")
    for name, peak in held_out["peak_bytes"].items():
        verdict = "fits" if peak <= held_out["chip_bytes"] else "[bold]does not fit[/bold]"
        table.add_row(
            name, f"{peak / GIB:.2f} of {held_out['chip_bytes'] / GIB:.2f} GiB: {verdict}"
        )
    return table


def counts_table(experiment: Experiment, parts: Mapping[str, PartCount]) -> Table:
    """Lays out the parameter counts of a model's parts, trained and frozen."""
    table = Table("part", title=experiment.name or experiment.task)
    for column in ("parameters", "", "trained", "frozen"):
        table.add_column(column, justify="right")
    whole = PartCount(*(sum(counts) for counts in zip(*parts.values(), strict=True)))
    for part, count in [*parts.items(), ("total", whole)]:
        if part == "total":
            table.add_section()
        shares = (count.trained, count.parameters - count.trained)
        table.add_row(
            part.replace("_", " "),
            f"{count.parameters:,}",
            _short(count.parameters),
            *(_short(share) if share else "" for share in shares),
        )
    return table


def checkpoint_table(sizes: dict[str, int]) -> Table:
    """Lays out the result of `counts.checkpoint_bytes`."""
    table = Table("", title="a checkpoint")
    table.add_column("", justify="right")
    rest = ("step, key and counters", "rest")
    for name, key in (
        ("trained parameters, float32", "trainables"),
        ("their moments, float32", "moments"),
        rest,
        ("the whole checkpoint", "total"),
    ):
        if key == "total":
            table.add_section()
        table.add_row(name, _short(sizes[key], BYTES))
    table.add_section()
    table.add_row("frozen parameters, not in it", _short(sizes["frozen"], BYTES))
    return table


def step_tables(step: dict[str, Any]) -> list[Table]:
    """Lays out the result of `plan.plan_step`: the step, its largest tensors, its
    collectives.
    """
    mesh = " x ".join(f"{axis}={size}" for axis, size in step["mesh"].items())
    table = Table("", title=f"one step on {step['chips']} chips, {step['topology']}, mesh {mesh}")
    table.add_column("", justify="right")
    if step["change"]:
        table.add_row("fits with", step["change"])
    for part, count in step["bytes"].items():
        table.add_row(f"{part}, a device", f"{count / GIB:.2f} GiB")
    verdict = "fits" if step["fits"] else "[bold]does not fit[/bold]"
    table.add_row(
        "peak of the chip's memory",
        f"{step['peak_bytes'] / GIB:.2f} of {step['chip_bytes'] / GIB:.2f} GiB: {verdict}",
    )
    table.add_section()
    formula = step["flops"]["formula"]
    table.add_row("FLOPs by the formula, full rows", f"{formula:.4g}")
    for name, key in (("of the traced step", "jaxpr"), ("of the compiled program", "program")):
        table.add_row(
            f"FLOPs {name}",
            f"{step['flops'][key]:.4g} ({step['flops'][key] / max(formula, 1):.2f} x)",
        )
    table.add_section()
    table.add_row("least time, at the chips' peak", f"{step['floor_seconds']:.3f} s")
    table.add_row(
        "computing, by the compiler's cycles",
        f"{step['seconds']['computing']:.3f} s ({step['cycles_over_floor']:.2f} x)",
    )
    table.add_row("sending, at the links' rate", f"{step['seconds']['sending']:.3f} s")
    table.add_row(
        "a step with no overlap", f"{step['seconds']['step']:.3f} s, {step['mfu']:.0%} MFU"
    )
    table.add_row("the run", f"{step['days']:.1f} days, {step['chip_hours']:,.0f} chip-hours")
    table.add_row(
        "compiled in",
        f"{step['compile_seconds']:.0f} s with {step['compiler_bytes'] / GIB:.1f} GiB",
    )
    return [table, _largest_table(step), sent_table(step["collectives"], "a step")]


def sent_table(collectives: Sequence[dict[str, Any]], of: str) -> Table:
    """Lays out what devices send each other in a program, as `plan.by_axes` sums it."""
    table = Table("collective", "axes", title=f"sent between devices in {of}")
    for column in ("times", "GiB", "largest, MiB"):
        table.add_column(column, justify="right")
    for c in collectives:
        table.add_row(
            c["kind"],
            c["axes"],
            str(c["times"]),
            f"{c['bytes'] / GIB:.2f}",
            f"{c['largest'] / 2**20:.1f}",
        )
    return table


def _largest_table(step: dict[str, Any]) -> Table:
    table = Table("tensor", "sharding", title="the largest that each device holds between steps")
    table.add_column("GiB", justify="right")
    for tensor in step["largest"]:
        table.add_row(tensor["name"], tensor["sharding"], f"{tensor['bytes'] / GIB:.2f}")
    return table


def int8_tables(title: str, found: Int8Change) -> list[Table]:
    """Formats what int8 weights save and, where it was measured, what they change."""
    memory = Table("memory of the parameters", title=title)
    for heading in ("parameters", "bfloat16, MiB", "int8, MiB", "int8 / bfloat16"):
        memory.add_column(heading, justify="right")
    for part, m in found.memory.items():
        sizes = [f"{size / 2**20:,.1f}" for size in (m.bfloat16, m.int8)]
        memory.add_row(part.replace("_", " "), f"{m.parameters:,}", *sizes, f"{m.ratio:.3f}")
    if found.change is None:
        return [memory]
    c = found.change
    change = Table(f"predictions of {c.tokens:,} tokens", title="against the weights as stored")
    change.add_column("", justify="right")
    change.add_row("perplexity as stored", f"{c.perplexity:.4f}")
    change.add_row("perplexity in int8", f"{c.int8_perplexity:.4f} ({c.rise:+.3%})")
    change.add_row("KL divergence, mean", f"{c.divergence:.3g} nats")
    change.add_row("KL divergence, 99 % of tokens below", f"{c.divergence_99:.3g} nats")
    change.add_row("KL divergence, largest", f"{c.largest_divergence:.3g} nats")
    change.add_row("largest difference of a logit", f"{c.largest_difference:.3g}")
    change.add_row("same most likely token", f"{c.same_choice:.2%}")
    return [memory, change]


def _short(count: int, units: Mapping[str, float] = NUMBERS) -> str:
    for unit, size in units.items():
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return str(count)
