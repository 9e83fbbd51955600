"""All benchmarks by name, and the suites that run several."""

from flamingo_jax.configuring import did_you_mean
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet
from flamingo_jax.evaluation.benchmarks.coco import COCO
from flamingo_jax.evaluation.benchmarks.fast_concepts import OPEN_MINI_IMAGENET, VL_ICL_OPEN_MI
from flamingo_jax.evaluation.benchmarks.flickr30k import FLICKR30K
from flamingo_jax.evaluation.benchmarks.hatefulmemes import HATEFUL_MEMES
from flamingo_jax.evaluation.benchmarks.imagenet import IMAGENET
from flamingo_jax.evaluation.benchmarks.ivqa import IVQA
from flamingo_jax.evaluation.benchmarks.kinetics700 import KINETICS_700
from flamingo_jax.evaluation.benchmarks.msrvttqa import MSRVTTQA
from flamingo_jax.evaluation.benchmarks.msvdqa import MSVDQA
from flamingo_jax.evaluation.benchmarks.nextqa import NEXTQA
from flamingo_jax.evaluation.benchmarks.nextqa_mc import NEXTQA_MC
from flamingo_jax.evaluation.benchmarks.nocaps import NOCAPS
from flamingo_jax.evaluation.benchmarks.okvqa import OKVQA
from flamingo_jax.evaluation.benchmarks.rareact import RARE_ACT
from flamingo_jax.evaluation.benchmarks.star import STAR
from flamingo_jax.evaluation.benchmarks.textcaps import TEXTCAPS
from flamingo_jax.evaluation.benchmarks.textvqa import TEXTVQA
from flamingo_jax.evaluation.benchmarks.vatex import VATEX
from flamingo_jax.evaluation.benchmarks.visdial import VISDIAL
from flamingo_jax.evaluation.benchmarks.vizwiz import VIZWIZ
from flamingo_jax.evaluation.benchmarks.vl_icl import VL_ICL_CLEVR
from flamingo_jax.evaluation.benchmarks.vqav2 import VQAV2
from flamingo_jax.evaluation.benchmarks.youcook2 import YOUCOOK2

BENCHMARKS: dict[str, BenchmarkSet] = {
    one.name: one
    for one in (
        COCO,
        FLICKR30K,
        NOCAPS,
        TEXTCAPS,
        VATEX,
        YOUCOOK2,
        OKVQA,
        VQAV2,
        MSVDQA,
        VIZWIZ,
        MSRVTTQA,
        IVQA,
        TEXTVQA,
        NEXTQA,
        STAR,
        VISDIAL,
        HATEFUL_MEMES,
        RARE_ACT,
        NEXTQA_MC,
        IMAGENET,
        KINETICS_700,
        *OPEN_MINI_IMAGENET,
        VL_ICL_OPEN_MI,
        VL_ICL_CLEVR,
    )
}

SUITES: dict[str, tuple[str, ...]] = {
    "paper": (
        *("okvqa", "vqav2", "coco", "msvdqa", "vatex", "vizwiz", "flickr30k", "msrvttqa", "ivqa"),
        *("youcook2", "star", "visdial", "textvqa", "nextqa", "hatefulmemes", "rareact"),
        *("imagenet", "kinetics700"),
    ),
    "open_flamingo": (
        *("coco", "flickr30k", "vqav2", "okvqa", "textvqa", "vizwiz", "hatefulmemes"),
    ),
    "captions": ("coco", "flickr30k", "nocaps", "textcaps", "vatex", "youcook2"),
    "vqa": ("okvqa", "vqav2", "vizwiz", "textvqa"),
    "video": (
        *("vatex", "youcook2", "msvdqa", "msrvttqa", "ivqa", "nextqa", "nextqa_mc", "star"),
        *("rareact", "kinetics700"),
    ),
    "video_questions": ("msvdqa", "msrvttqa", "ivqa", "nextqa"),
    "ranking": (
        *("star", "visdial", "hatefulmemes", "rareact", "nextqa_mc", "imagenet", "kinetics700"),
    ),
    "in_context": (
        *(one.name for one in OPEN_MINI_IMAGENET),
        *("vl_icl_open_mi", "vl_icl_clevr"),
    ),
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
            hint = did_you_mean(name, known) or f": name one of {', '.join(known)}"
            raise UserError(f"there is no benchmark or suite {name!r}{hint}")
        found |= {one: BENCHMARKS[one] for one in SUITES.get(name, (name,))}
    return list(found.values())
