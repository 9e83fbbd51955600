"""RareAct (Miech et al. 2020): unusual actions, such as hammering a phone, zero-shot only."""

import pathlib

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import (
    NO_SUPPORT,
    BenchmarkSet,
    SplitContent,
)
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.metrics.mwap import POSITIVE, RareActSegment
from flamingo_jax.evaluation.prompts import PromptTemplate
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.scoring.ranked import RAREACT, read_rareact

ANNOTATIONS = "rareact.csv"
CAPTION_OF_ACTION = PromptTemplate("Caption: a person")


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads all rows: the queries. A row has a true answer where its annotation is positive; the
    metric needs the score of every action for every row.
    """
    place = str(folder / ANNOTATIONS)
    segments = read_rareact(place)
    rows = files.read_csv(place, ("id", "start", "end", *RAREACT))
    videos = MediaFolder(folder / "videos")
    examples = []
    for number, (row, segment) in enumerate(zip(rows, segments, strict=True), 2):
        where = f"{place}, row {number},"
        start, end = files.number(row, "start", where), files.number(row, "end", where)
        positive = segment.annotation == POSITIVE
        examples.append(
            BenchmarkExample(
                row["id"],
                videos.clip(segment.video, start, end),
                (action(segment.verb, segment.noun),) if positive else (),
                cluster=segment.video,
                details=segment._asdict(),
            )
        )
    return SplitContent(examples, [folder / ANNOTATIONS], classes(segments, place))


def classes(segments: list[RareActSegment], place: str) -> list[str]:
    """Returns the actions by class_id, as they follow "Caption: a person".

    Raises: UserError where the ids do not go from 0 on, or one has several actions.
    """
    actions = dict(sorted({(row.class_id, (row.verb, row.noun)) for row in segments}))
    pairs = {(row.class_id, row.verb, row.noun) for row in segments}
    if list(actions) != list(range(len(pairs))):
        raise UserError(
            f"{place} must number its {len(set(actions.values())):,} actions from 0 on, each with"
            " one class_id"
        )
    return [action(verb, noun) for verb, noun in actions.values()]


def action(verb: str, noun: str) -> str:
    """Writes an action as the paper does (B.1.5): the verb in the third person, an article and
    the noun. A plural, such as "carrots", has no article.
    """
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        verb = f"{verb}es"
    elif verb.endswith("y") and verb[-2:-1] not in "aeiou":
        verb = f"{verb[:-1]}ies"
    else:
        verb = f"{verb}s"
    if noun.endswith("s") and not noun.endswith(("ss", "us")):
        return f"{verb} {noun}"
    return f"{verb} {'an' if noun[:1] in 'aeiou' else 'a'} {noun}"


RARE_ACT = BenchmarkSet(
    name="rareact",
    title="RareAct",
    layout={
        ANNOTATIONS: "segments of videos and whether they show an action",
        "videos/": "videos by their YouTube ids 7frRY7aGwMU.mp4, ...",
    },
    kind="rank",
    template=CAPTION_OF_ACTION,
    scorer="mwap",
    read=read,
    splits=("test",),
    support=NO_SUPPORT,
    shots=(0,),
    video=True,
)
