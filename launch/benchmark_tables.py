"""The tables that `launch.benchmark` prints."""

from typing import TYPE_CHECKING, Any

from rich.table import Table

from flamingo_jax.experiment import Experiment

if TYPE_CHECKING:
    from data_pipelines.benchmark import ReadingBenchmark
    from flamingo_jax.planning.export_timing import ExportTiming
    from flamingo_jax.planning.generation_timing import GenerationTiming
    from flamingo_jax.planning.rices_timing import RicesTiming, RicesWork
    from flamingo_jax.planning.timing import Timing


def step_table(experiment: Experiment, timing: "Timing") -> Table:
    """Lays out the seconds of a step and of its parts."""
    table = Table("", title=f"{experiment.name or experiment.task}: one training step")
    table.add_column("", justify="right")
    table.add_row("whole step", f"{timing.step:.4g} s")
    for part, seconds in timing.parts.items():
        table.add_row(f"  {part}", f"{seconds:.4g} s")
    table.add_section()
    table.add_row("tokens a second", f"{timing.tokens / timing.step:,.0f}")
    if timing.frames:
        table.add_row("images a second", f"{timing.frames / timing.step:,.1f}")
    table.add_row("model FLOPs of a step", f"{timing.flops:.4g}")
    table.add_row("measured matrix rate", f"{timing.matrix_rate / 1e9:,.0f} GFLOP/s")
    table.add_row("model FLOPs utilisation of it", f"{timing.mfu:.1%}")
    table.add_row("compiled in", f"{timing.compile_seconds:.0f} s")
    return table


def generation_table(timing: "GenerationTiming") -> Table:
    """Lays out the seconds of generation beside those of plain code."""
    caption, rank = timing.captioning, timing.ranking
    table = Table(
        "",
        title="generation after 4 shots",
        caption=f"the plain loop wrote {'the same texts' if caption.agrees else 'OTHER texts'};"
        f" a name's two scores differ by at most {rank.difference:.1e}",
    )
    for heading in ("seconds", "times as long"):
        table.add_column(heading, justify="right")
    wanted = f"{caption.tokens} tokens after {caption.prompt}, 3 beams"
    table.add_row(f"a caption, {wanted}", f"{caption.seconds:.4g}", "1")
    for way, seconds in (
        ("everything recomputed for each token", caption.plain),
        ("the text alone recomputed", caption.plain_text),
    ):
        table.add_row(f"  {way}", f"{seconds:.4g}", f"{seconds / caption.seconds:.1f}")
    table.add_section()
    named = f"{rank.names:,} names of {rank.name_tokens:,} tokens ranked"
    table.add_row(named, f"{rank.seconds:.4g}", "1")
    one = f"  one at a time, scaled from {rank.sample} of them"
    table.add_row(one, f"{rank.one_at_a_time:.4g}", f"{rank.ratio:.1f}")
    table.add_section()
    for count, rates in timing.rates.items():
        prompts = f"{count} prompt{'s' * (count > 1)} at a time"
        table.add_row(f"{prompts}: captions, 3 beams", f"{rates.caption:.4g}", "")
        table.add_row(f"  prefill, tokens a second: {rates.prefill:,.0f}")
        table.add_row(f"  greedy decoding, tokens a second: {rates.decode:,.0f}")
    return table


def generation_json(timing: "GenerationTiming") -> dict[str, Any]:
    """Lays out the same for a program."""
    return {
        "captioning": timing.captioning._asdict() | {"ratio": timing.captioning.ratio},
        "ranking": timing.ranking._asdict() | {"ratio": timing.ranking.ratio},
        "rates": {count: rates._asdict() for count, rates in timing.rates.items()},
    }


def reading_table(measured: "ReadingBenchmark", step_seconds: float) -> Table:
    """Lays out how fast datasets are read. step_seconds: of the step that waits for them."""
    table = Table(
        "dataset",
        title=f"reading; a step of {step_seconds:g} s waits {measured.waiting:.2%} of the time",
    )
    counts = [
        f"by the clock, {count} reader{'s' * (count > 1)}"
        for count in next(iter(measured.rates.values()), {})
    ]
    for heading in (
        "images a second, rows",
        "bare loop",
        "rows / bare",
        *counts,
        "tokens that are no padding",
        "images met",
    ):
        table.add_column(heading, justify="right")
    for name, made in measured.readings.items():
        clock = [f"{rate:,.0f}" for rate in measured.rates[name].values()]
        table.add_row(
            name,
            f"{made.rows:,.0f}",
            f"{made.bare:,.0f}",
            f"{made.share:.1%}",
            *clock,
            f"{made.fill:.1%}",
            f"{made.images:,}",
        )
    return table


def export_table(timing: "ExportTiming") -> Table:
    """Lays out an export beside a bare copy, and how a killed one was continued."""
    table = Table("", title=f"export of {timing.bytes / 1e9:.3g} GB")
    table.add_column("", justify="right")
    for what, value in (
        ("bare copy of the files, flushed", f"{timing.copy:.1f} s"),
        ("export", f"{timing.seconds:.1f} s"),
        ("rate of the export / of the copy", f"{timing.share:.0%}"),
        ("largest parameter", f"{timing.largest / 2**20:,.0f} MiB"),
        ("the process grew by at most", f"{timing.grown / 2**20:,.0f} MiB"),
        ("whole files of the killed export", f"{timing.kept} of {timing.files}"),
        ("export continued", f"{timing.resumed:.1f} s"),
        ("the same files as in one go", "yes" if timing.equal else "NO"),
    ):
        table.add_row(what, value)
    return table


def rices_table(work: "RicesWork", timing: "RicesTiming") -> Table:
    """Lays out the seconds and memory of a search, and how many choices are right."""
    table = Table(
        "",
        title=(
            f"the {work.nearest} most similar of {work.rows:,} images for each of {work.queries:,}"
        ),
    )
    for heading in ("seconds", "GB/s"):
        table.add_column(heading, justify="right")
    stored = f"{timing.bytes / 1e9:.3g} GB of {work.width} numbers each"
    for what, seconds, rate in (
        (f"{stored}, stored on disk", timing.fill, f"{timing.fill_rate / 1e9:.2f}"),
        ("read and searched", timing.search, f"{timing.search_rate / 1e9:.2f}"),
        ("made, in the place of an encoder", timing.made, ""),
        ("all, by the clock", timing.whole, ""),
    ):
        table.add_row(what, f"{seconds:.1f}", rate)
    table.add_section()
    several = f" of {work.processes} processes" * (work.processes > 1)
    table.add_row(f"peak of memory{several}: {timing.peak / 2**20:,.0f} MiB")
    table.add_row(
        f"same choice as in float64: {timing.equal} of {timing.compared} queries that were compared"
    )
    return table
