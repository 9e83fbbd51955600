"""Lays runs of `launch.evaluate --suite` side by side.

    python -m launch.compare RUN_A RUN_B ... [--output=FOLDER]

A run is the folder of its --output. Every other run is compared with the first, by benchmark and
number of shots (random shots also with those of RICES, where each run has one of them), on the
queries that both answered: the difference, its 95 % interval, and p of the paired test, with errors
over images where several questions are about one. A warning says where the runs differ in more than
the model. Prints Markdown; --output writes comparison.md and comparison.html too. It reads results
and stored predictions, and needs neither a GPU nor a model.
"""

from absl import flags

from flamingo_jax import paths
from flamingo_jax.errors import UserError
from launch import command

OUTPUT = flags.DEFINE_string("output", "", "Folder for comparison.md and comparison.html.")
WORDNET = flags.DEFINE_string(
    "wordnet", "", "Folder of WordNet 3.0's files, which OK-VQA and NExT-QA are scored with."
)
_FLAGS = ("output", "wordnet")
_RUNS: list[str] = []
"""The words of the command line that are no flags."""


def main() -> int:
    """Compares the runs."""
    return compare(_RUNS)


def compare(runs: list[str]) -> int:
    """Compares the runs in these folders, by the flags."""
    if len(runs) < 2:
        raise UserError(
            "name two runs or more: python -m launch.compare RUN_A RUN_B, each a folder that"
            " launch.evaluate --suite wrote"
        )
    # Imported here: --help does not wait for it.
    from flamingo_jax.evaluation.results.comparison import read_runs
    from flamingo_jax.evaluation.results.comparison_report import compare_runs

    found = compare_runs(read_runs([paths.as_path(run) for run in runs]), WORDNET.value)
    if not found.rows:
        raise UserError(f"{runs[0]} has no benchmark at a number of shots that another run has")
    print(found.markdown(), end="")
    if OUTPUT.value:
        folder = paths.as_path(OUTPUT.value)
        paths.make_folder(folder)
        (folder / "comparison.md").write_text(found.markdown())
        (folder / "comparison.html").write_text(found.page())
        print(f"\nwrote {folder}/comparison.md and {folder}/comparison.html")
    return 0


def take_runs(argv: list[str]) -> command.Help:
    """Takes the words that are no flags from the command line."""
    words = []
    for place in range(len(argv) - 1, 0, -1):
        before = argv[place - 1].lstrip("-") if argv[place - 1].startswith("-") else ""
        if not argv[place].startswith("-") and before not in _FLAGS:
            words.append(argv.pop(place))
    _RUNS[:] = reversed(words)
    return command.Help((__doc__ or "").strip(), _FLAGS)


if __name__ == "__main__":
    command.run(main, prepare=take_runs)
