"""Which runs a suite consists of: every benchmark at every number of shots and seed, with its
control; and what identifies each of them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import PAPER_SHOTS, BenchmarkSet
from flamingo_jax.evaluation.protocol.benchmark import Benchmark, EvaluationSettings

CLIP_FRAMES, CLIP_FPS = 30, 3.0
"""How the paper evaluates clips (paper 3.2)."""


@dataclasses.dataclass(frozen=True)
class SuiteBenchmark:
    """A benchmark whose files were read.

    asked: asks a model its queries.
    title: in reports.
    scorer, scorer_options: the metric, see `scoring.predictions`.
    drawn: how queries and support set were chosen, among it "split" and "support_split".
    references: {annotation file: SHA-256}.
    missing: {"policy", "queries", "support"}: what was done about examples whose image is not
      there, and how many there were.
    shots: the numbers of shots that it is run at by default.
    text_examples: of zero-shot prompts.
    max_tokens: of an answer.
    video: whether its visuals are clips.
    generates: whether answers are generated; otherwise candidates are ranked.
    official: the benchmark, if it has official files; None for an own dataset.
    """

    asked: Benchmark
    title: str
    scorer: str
    scorer_options: Mapping[str, Any]
    drawn: Mapping[str, Any]
    references: Mapping[str, str]
    missing: Mapping[str, Any]
    shots: Sequence[int]
    text_examples: int
    max_tokens: int
    video: bool
    generates: bool
    official: BenchmarkSet | None = None


@dataclasses.dataclass(frozen=True)
class SuiteOptions:
    """How all benchmarks of a suite are run.

    settings: the selection, decoding and so on; shots, seed and control are a cell's.
    shots: the numbers of shots; None for each benchmark's own.
    seeds: of the shots.
    control: whether to run few-shot cells again without the images of the shots.
    wordnet: folder of WordNet 3.0's files, where a metric reads them; "" for one that is found.
    """

    settings: EvaluationSettings
    shots: Sequence[int] | None = None
    seeds: Sequence[int] = (0,)
    control: bool = True
    wordnet: str = ""


@dataclasses.dataclass(frozen=True)
class SuiteCell:
    """One benchmark at one number of shots, with one seed."""

    benchmark: SuiteBenchmark
    settings: EvaluationSettings

    @property
    def name(self) -> str:
        """Returns the name of its files."""
        how = self.settings
        parts = [self.benchmark.asked.name, f"{how.shots}_shots"]
        parts += [how.selection] if how.shots else []
        parts += [] if how.shot_images else ["control"]
        return ".".join([*parts, *([f"seed{how.seed}"] if how.seed else [])])

    @property
    def protocol(self) -> dict[str, Any]:
        """Returns all choices that its score depends on, besides the model and the files."""
        how, benchmark = self.settings, self.benchmark
        template = getattr(benchmark.asked, "template", None)
        return json.loads(
            json.dumps(
                {
                    "benchmark": benchmark.asked.name,
                    **benchmark.drawn,
                    "missing_media": benchmark.missing["policy"],
                    "template": template.text if template else "",
                    "shots": how.shots,
                    "selection": how.selection if how.shots else "",
                    "shot_images": how.shot_images,
                    "text_examples": 0 if how.shots else how.text_examples,
                    "permutations": how.permutations if how.shots > 1 else 1,
                    "seed": how.seed,
                    "decoding": dataclasses.asdict(how.decoding) if benchmark.generates else {},
                    "frames": how.frames,
                    "fps": how.fps,
                    "scorer": benchmark.scorer,
                    "scorer_options": dict(benchmark.scorer_options),
                }
            )
        )


def cells(benchmark: SuiteBenchmark, options: SuiteOptions) -> list[SuiteCell]:
    """Lists the runs of a benchmark, fewest shots first, each control after its run.

    What does not depend on the seed, such as RICES, is run with the first one alone. Shots that
    the benchmark is not run at, such as 32 of VisDial's long prompts, are left out where others
    remain.
    Raises: UserError where it has too few examples, or none of the numbers of shots.
    """
    given = benchmark.shots if options.shots is None else options.shots
    most = max(benchmark.shots)
    found = []
    for count in dict.fromkeys(given):
        if count > most and most < max(PAPER_SHOTS):
            continue
        how = _settings(benchmark, options.settings, count)
        seeded = how.selection != "rices" if count else how.text_examples > 0
        for seed in options.seeds if seeded else options.seeds[:1]:
            for images in (True, False) if count and options.control else (True,):
                cell = SuiteCell(benchmark, dataclasses.replace(how, seed=seed, shot_images=images))
                benchmark.asked.check(cell.settings)
                found.append(cell)
    if not found:
        raise UserError(
            f"{benchmark.asked.name} is run with {most} shots at most, and --shots asks for more:"
            " add a smaller number"
        )
    return found


def _settings(
    benchmark: SuiteBenchmark, settings: EvaluationSettings, shots: int
) -> EvaluationSettings:
    clips: dict[str, Any] = {}
    if benchmark.video:
        clips = {"frames": settings.frames or CLIP_FRAMES, "fps": settings.fps or CLIP_FPS}
    return dataclasses.replace(
        settings,
        shots=shots,
        text_examples=benchmark.text_examples,
        permutations=1 if benchmark.generates else settings.permutations,
        decoding=dataclasses.replace(settings.decoding, max_tokens=benchmark.max_tokens),
        **clips,
    )


def digest(value: Any) -> str:
    """Identifies a JSON value."""
    told = json.dumps(value, sort_keys=True).encode()
    return hashlib.blake2b(told, digest_size=16).hexdigest()
