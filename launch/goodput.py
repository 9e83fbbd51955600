"""Shows which share of a run's wall time went into steps that counted, and where the rest
went, for every start of the run.

    python -m launch.goodput --workdir=runs/quickstart/flamingo [--json]

The run may still be training. `lost` is the time of steps that a later start had to repeat,
`down` the time before a start in which nothing ran.
"""

import json

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from flamingo_jax.checkpointing.manifest import unreadable
from flamingo_jax.errors import UserError
from flamingo_jax.paths import as_path
from flamingo_jax.training.goodput import KINDS, GoodputReport, read_goodput, share
from launch import command

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the training run.")
JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")
WIDEST = 400
"""Width of the table in characters, however narrow the window is."""


def main() -> int:
    if not WORKDIR.value:
        raise UserError("--workdir is not set: name the folder of a training run")
    workdir = as_path(WORKDIR.value)
    try:
        breakdown = read_goodput(workdir)
    except OSError as error:
        raise unreadable(workdir, error) from error
    if JSON.value:
        starts = [start._asdict() for start in breakdown.starts]
        print(
            json.dumps({"goodput": breakdown.share, "seconds": breakdown.seconds, "starts": starts})
        )
    else:
        # In a narrow window the lines wrap; rich would cut off numbers, which would look
        # smaller.
        Console(width=WIDEST).print(_table(breakdown))
        print(breakdown.sentence())
    return 0


def _table(breakdown: GoodputReport) -> Table:
    table = Table(
        "start",
        title="where the time went, in seconds",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in ("from step", "to", *KINDS, "goodput"):
        table.add_column(column, justify="right")

    def row(name: str, first: str, last: str, seconds: dict[str, float]) -> None:
        table.add_row(
            name,
            first,
            last,
            *(f"{seconds[kind]:,.1f}" for kind in KINDS),
            f"{share(seconds):.1%}",
        )

    for number, start in enumerate(breakdown.starts, 1):
        row(str(number), f"{start.resume:,}", f"{start.step:,}", start.seconds)
    table.add_section()
    row("all", "", "", breakdown.seconds)
    return table


if __name__ == "__main__":
    command.run(main)
