"""All benchmarks by name, and the suites that run several."""

from flamingo_jax.configuring import did_you_mean
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet
from flamingo_jax.evaluation.benchmarks.coco import COCO

BENCHMARKS: dict[str, BenchmarkSet] = {one.name: one for one in (COCO,)}

SUITES: dict[str, tuple[str, ...]] = {"captions": ("coco",)}
"""Names of the benchmarks of a suite, in the order in which they are run."""


def find_benchmarks(names: list[str]) -> list[BenchmarkSet]:
    """Returns the benchmarks of these names, or of suites of these names.

    Raises: UserError for a name of neither.
    """
    found: dict[str, BenchmarkSet] = {}
    for name in names:
        if name not in BENCHMARKS and name not in SUITES:
            known = [*SUITES, *BENCHMARKS]
            raise UserError(
                f"there is no benchmark or suite {name!r}{did_you_mean(name, known)}: name one of"
                f" {', '.join(known)}"
            )
        found |= {one: BENCHMARKS[one] for one in SUITES.get(name, (name,))}
    return list(found.values())
