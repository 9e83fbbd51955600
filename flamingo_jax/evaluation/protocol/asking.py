"""Asks a model about all queries of a benchmark, a chunk at a time: while it answers one, the
images and clips of the next are decoded.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.media import MediaPool, MediaRef, Preprocessing
from flamingo_jax.evaluation.prompts import WrittenPrompt
from flamingo_jax.evaluation.protocol.benchmark import Prediction, as_text
from flamingo_jax.evaluation.protocol.journal import Journal
from flamingo_jax.inference.prompts import Prompt
from flamingo_jax.progress import Bar

BATCHES = 16
"""A chunk has as many prompts as this many batches, so that the end of each chunk, where the
batch is not full, is a small part of it."""
CHUNK_BYTES = 256 << 20
"""Size of the decoded visuals of a chunk; two chunks are in memory."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A query as it is asked.

    prompts: one, or one for each order of its shots.
    shots: ids of the shots.
    """

    query: BenchmarkExample
    prompts: tuple[WrittenPrompt, ...]
    shots: tuple[str, ...]

    @property
    def media(self) -> list[MediaRef]:
        """Returns the images and clips of its prompts."""
        return [part for prompt in self.prompts for part in prompt if isinstance(part, MediaRef)]

    def predict(self, text: str, **more: object) -> Prediction:
        """Returns the prediction of this query with an answer."""
        query = self.query
        fields: dict[str, object] = {
            "question_type": query.question_type,
            "cluster": query.cluster,
            "media": query.media,
            "shots": self.shots,
            "details": query.details,
            **more,
        }
        return Prediction(query.id, as_text(self.prompts[0]), text, query.answers, **fields)  # type: ignore[arg-type]


Answer = Callable[[Sequence[Asked], list[list[Prompt]]], list[Prediction]]
"""(queries of a chunk, {order: their prompts}) -> their predictions."""


def ask_all(
    title: str,
    asked: Sequence[Asked],
    answer: Answer,
    pool: MediaPool,
    journal: Journal,
    batch_size: int,
) -> list[Prediction]:
    """Asks about every query, and keeps each chunk's predictions in the journal.

    Queries with the same shots are asked one after the other, since the model reads what their
    prompts have in common once. Chunks depend on the prompts alone: a run that goes on where it
    was killed asks the same ones, and answers to the bit as it would have.

    Returns: the predictions in the order of `asked`.
    Raises: UserError for an image or clip that cannot be decoded.
    """
    kept = {one.id: one for one in map(Prediction.from_json, journal.earlier())}
    media = {one.query.id: one.query.media for one in asked}
    found = {
        key: dataclasses.replace(one, media=media[key]) for key, one in kept.items() if key in media
    }
    chunks = [
        chunk
        for chunk in _chunks(_grouped(asked), pool.how, batch_size)
        if any(one.query.id not in found for one in chunk)
    ]
    with Bar(title, len(asked), start=len(found)) as bar:
        for number, chunk in enumerate(chunks):
            # Its own media first, where nothing was prefetched.
            pool.prefetch(_media(chunk))
            following = _media(chunks[number + 1]) if number + 1 < len(chunks) else []
            resolved = [_resolved(one, pool) for one in chunk]
            pool.prefetch(following)
            orders = [list(prompts) for prompts in zip(*resolved, strict=True)]
            made = [one for one in answer(chunk, orders) if one.id not in found]
            journal.append([one.to_json() for one in made])
            found |= {one.id: one for one in made}
            pool.drop_unused(following)
            bar.advance(len(made))
    return [found[one.query.id] for one in asked]


def _grouped(asked: Sequence[Asked]) -> list[Asked]:
    """Puts queries of the same shots next to each other, in the order of their first ones."""
    first: dict[tuple[str, ...], int] = {}
    for one in asked:
        first.setdefault(one.shots, len(first))
    return sorted(asked, key=lambda one: first[one.shots])


def _chunks(
    asked: Sequence[Asked], how: Preprocessing, batch_size: int
) -> Iterator[Sequence[Asked]]:
    """Splits queries so that the different visuals of a chunk fit in `CHUNK_BYTES`. The first
    chunk is one batch, since nothing can be done while its visuals are decoded.
    """
    most = batch_size
    pixels = 3 * how.vision.image_size**2
    chunk: list[Asked] = []
    seen: set[str] = set()
    size = 0
    for one in asked:
        new = {part.key: pixels * (1 if part.still else how.frames) for part in one.media}
        added = sum(nbytes for key, nbytes in new.items() if key not in seen)
        if chunk and (len(chunk) >= most or size + added > CHUNK_BYTES):
            yield chunk
            most = BATCHES * batch_size
            chunk, seen, size = [], set(), 0
            added = sum(new.values())
        chunk.append(one)
        seen |= new.keys()
        size += added
    if chunk:
        yield chunk


def _media(chunk: Sequence[Asked]) -> list[MediaRef]:
    return list({part.key: part for one in chunk for part in one.media}.values())


def _resolved(one: Asked, pool: MediaPool) -> list[Prompt]:
    """Returns a query's prompts with decoded visuals."""
    visuals = dict(zip((part.key for part in one.media), pool.read(one.media), strict=True))
    return [
        [visuals[part.key] if isinstance(part, MediaRef) else part for part in prompt]
        for prompt in one.prompts
    ]
