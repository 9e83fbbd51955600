"""All benchmarks by name, and the suites that run several."""

from flamingo_jax.configuring import did_you_mean
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet
from flamingo_jax.evaluation.benchmarks.coco import COCO
from flamingo_jax.evaluation.benchmarks.ivqa import IVQA
from flamingo_jax.evaluation.benchmarks.msrvttqa import MSRVTTQA
from flamingo_jax.evaluation.benchmarks.msvdqa import MSVDQA
from flamingo_jax.evaluation.benchmarks.nextqa import NEXTQA
from flamingo_jax.evaluation.benchmarks.okvqa import OKVQA
from flamingo_jax.evaluation.benchmarks.textvqa import TEXTVQA
from flamingo_jax.evaluation.benchmarks.vizwiz import VIZWIZ
from flamingo_jax.evaluation.benchmarks.vqav2 import VQAV2

BENCHMARKS: dict[str, BenchmarkSet] = {
    one.name: one
    for one in (
        COCO,
        OKVQA,
        VQAV2,
        MSVDQA,
        VIZWIZ,
        MSRVTTQA,
        IVQA,
        TEXTVQA,
        NEXTQA,
    )
}

SUITES: dict[str, tuple[str, ...]] = {
    "captions": ("coco",),
    "vqa": ("okvqa", "vqav2", "vizwiz", "textvqa"),
    "video_questions": ("msvdqa", "msrvttqa", "ivqa", "nextqa"),
}
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
