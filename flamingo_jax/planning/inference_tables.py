"""Lays out the plan of inference as tables for the terminal."""

from typing import Any

from rich.table import Table

from flamingo_jax.planning.tables import GIB

BOUNDS = {"flops": "FLOPs", "bytes": "memory", "links": "links"}
PARTS = {
    "weights": "weights",
    "cache": "cache of keys and values",
    "visual_keys_values": "keys and values of the visuals",
    "weights_cast": "trained weights in bfloat16, beside float32",
    "activations": "activations, about",
}
STEPS = {"encode": "visuals", "prefill": "prefill", "token": "a token"}


def inference_tables(name: str, plan: dict[str, Any]) -> list[Table]:
    """Lays out the result of `inference.plan_inference`, and of `compile_inference` under
    "programs" if it is there.
    """
    tables = [_memory_table(name, plan), _time_table(plan), _answer_table(plan)]
    return tables + ([_programs_table(plan)] if "programs" in plan else [])


def _memory_table(name: str, plan: dict[str, Any]) -> Table:
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    load = plan["load"]
    asked = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in load.items())
    title = f"{name or 'Flamingo'} on {plan['chips']} chips, {plan['machine']}, mesh {mesh}"
    table = Table("a device's memory", title=title, caption=asked)
    table.add_column("GiB", justify="right")
    for part, text in PARTS.items():
        what = f"{text}, frozen ones {plan['frozen_dtype']}" if part == "weights" else text
        table.add_row(what, f"{plan['bytes'][part] / GIB:.3f}")
    table.add_section()
    verdict = "fits" if plan["fits"] else "[bold]does not fit[/bold]"
    table.add_row(
        f"in all, of {plan['chip_bytes'] / GIB:.2f}: {verdict}", f"{plan['total_bytes'] / GIB:.3f}"
    )
    return table


def _time_table(plan: dict[str, Any]) -> Table:
    table = Table("step", title="least time, ms")
    for column in ("FLOPs, all chips", "by FLOPs", "by memory", "by links", "least", "bound by"):
        table.add_column(column, justify="right")
    for step, text in STEPS.items():
        seconds = plan["seconds"][step]
        table.add_row(
            text,
            f"{plan['flops'][step]:.4g}",
            *(f"{1e3 * seconds[part]:.3f}" for part in (*BOUNDS, "bound")),
            BOUNDS[seconds["by"]] if seconds["bound"] else "",
        )
    return table


def _answer_table(plan: dict[str, Any]) -> Table:
    table = Table("", title="an answer")
    table.add_column("", justify="right")
    token = plan["flops_of_a_token"]
    met = token["weights"] + token["attention"]
    table.add_row("FLOPs of a token, by weights that it meets", f"{token['weights']:.4g}")
    table.add_row("by attention", f"{token['attention']:.4g}")
    traced = f"{token['jaxpr']:.4g} ({token['jaxpr'] / met:.3f} x)"
    table.add_row("both, of the traced step", traced)
    table.add_section()
    table.add_row("tokens a second, at most", f"{plan['tokens_per_second']:,.1f}")
    table.add_row("seconds of all answers, at least", f"{plan['answer_seconds']:.3f}")
    return table


def _programs_table(plan: dict[str, Any]) -> Table:
    table = Table("program", title="compiled, a device")
    columns = ("peak GiB", "arguments", "temporaries", "FLOPs, all chips", "cycles, ms", "sent MiB")
    for column in (*columns, "compiled in"):
        table.add_column(column, justify="right")
    for name, program in plan["programs"].items():
        sizes = program["bytes"]
        fits = program["peak_bytes"] <= plan["chip_bytes"]
        table.add_row(
            name,
            f"{program['peak_bytes'] / GIB:.2f}" + ("" if fits else " does not fit"),
            f"{sizes['arguments'] / GIB:.2f}",
            f"{sizes['temporaries'] / GIB:.2f}",
            # Products with one vector are no matrix products to the compiler.
            f"{program['flops']:.4g}" if program["flops"] else "-",
            f"{1e3 * program['computing_seconds']:.2f}",
            f"{sum(kind['bytes'] for kind in program['sent']) / 2**20:.1f}",
            f"{program['compile_seconds']:.0f} s",
        )
    return table
