"""Writes a source as a TFDS dataset in the ArrayRecord format: shards, features, splits with counts, statistics.json, samples.html.

Any TFDS user opens it with `tfds.builder_from_directory(folder / "1.0.0").as_data_source(split=...)`. It is written into a folder
beside its own and renamed at the end, so that a dataset that is there is whole.
"""

import collections
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from data_pipelines.build.samples import Drawn, samples_page
from data_pipelines.build.source import Dropped, Example, Outcome, Source
from data_pipelines.features import INFO_FILE, STATISTICS_FILE, TRAIN, VERSION, features
from flamingo_jax.errors import UserError
from flamingo_jax.progress import Bar

A = TypeVar("A")
B = TypeVar("B")

SAMPLES_FILE = "samples.html"
NAMES = 5
"""Entries named of each reason to drop."""
RECORDS_PER_SHARD = 5_000
RECORDS_PER_FLUSH = 200
BYTES_PER_FLUSH = 64 << 20
"""Records of a split, or bytes of their pictures, that wait in memory to be written together: TFDS writes its metadata anew at every flush."""
ENTRIES_PER_CALL = 8
CALLS_AHEAD = min(32, 4 * (os.cpu_count() or 1))
"""Calls whose results may wait in memory for the writer: enough that no core is idle during a flush."""


def write_dataset(output: str | pathlib.Path, source: Source, executor: Executor | None = None) -> tuple[dict[str, Any], bool]:
    """Writes `source` to `output/1.0.0` and returns its statistics, and whether it had to be built.

    A finished dataset of the same options is left as it is; what an interrupted build left is made again.
    Raises UserError where the folder's name is none for TFDS, it holds a dataset of other options, or no record is left to train on.
    """
    output = pathlib.Path(output)
    name = output.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"{name!r} cannot name a dataset: end --output in small letters, digits and underscores, with a letter first")
    final = output / VERSION
    if (final / INFO_FILE).is_file():
        return _finished(final, source), False
    entries = source.entries()
    building = output / f"{VERSION}.incomplete"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    with Bar(name, len(entries)) as bar:
        outcomes = _watched(ordered_map(_Named(source.convert), entries, executor), bar)
        statistics, drawn = _write(building, name, source, outcomes)
    statistics["options"] = source.options
    lacking = source.shares.lacking(statistics["splits"]) if source.shares else []
    if not statistics["splits"] or TRAIN in lacking:
        shutil.rmtree(building)
        counts = statistics["dropped"] | {f"for {split}": count for split, count in statistics["splits"].items()}
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "there were none"
        raise UserError(f"no record is left for {output} to train on ({reasons}): look at the input folder, or loosen the options or the shares")
    for split in lacking:
        logging.warning("%s is too small for its share of %s: remove it and build it again with a larger --%s_share", output, split, split)
    (building / STATISTICS_FILE).write_text(json.dumps(statistics, indent=2))
    (building / SAMPLES_FILE).write_text(samples_page(name, source.about, statistics, drawn.examples()), "utf-8")
    if final.exists():
        shutil.rmtree(final)
    building.rename(final)
    return statistics, True


def ordered_map(function: Callable[[A], B], items: Iterable[A], executor: Executor | None) -> Iterator[B]:
    """`map` on an executor: results in order, and only so many of them in memory."""
    if executor is None:
        yield from map(function, items)
        return
    waiting: collections.deque[Future[list[B]]] = collections.deque()
    left = iter(items)
    while call := list(itertools.islice(left, ENTRIES_PER_CALL)):
        waiting.append(executor.submit(_each, function, call))
        if len(waiting) >= CALLS_AHEAD:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _each(function: Callable[[A], B], items: Iterable[A]) -> list[B]:
    return [function(item) for item in items]


class _Named:
    """A source's `convert` with the name of each entry beside its outcomes."""

    def __init__(self, convert: Callable[[Any], list[Outcome]]):
        self._convert = convert

    def __call__(self, entry: Any) -> tuple[str, list[Outcome]]:
        return str(entry[-1] if isinstance(entry, tuple) else entry), self._convert(entry)


def _watched(converted: Iterable[tuple[str, list[Outcome]]], bar: Bar) -> Iterator[tuple[str, Outcome]]:
    for name, outcomes in converted:
        for outcome in outcomes:
            yield name, outcome
        bar.advance()


def _finished(final: pathlib.Path, source: Source) -> dict[str, Any]:
    try:
        statistics: dict[str, Any] = json.loads((final / STATISTICS_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{final} holds a dataset without a readable {STATISTICS_FILE}: remove it, or choose another --output") from error
    if statistics.get("options") != json.loads(json.dumps(source.options)):
        raise UserError(f"{final} was built from another source or with other options: remove it, or choose another --output")
    return statistics


def _write(folder: pathlib.Path, name: str, source: Source, outcomes: Iterable[tuple[str, Outcome]]) -> tuple[dict[str, Any], Drawn]:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    identity = DatasetIdentity(name=name, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=__name__)
    info = tfds.core.DatasetInfo(builder=identity, description=source.about, features=features(source.kind))
    writer = tfds.core.SequentialWriter(info, RECORDS_PER_SHARD, file_format="array_record")
    counts: collections.Counter[str] = collections.Counter()
    dropped: collections.Counter[str] = collections.Counter()
    names: dict[str, list[str]] = {}
    drawn = Drawn()
    parts: collections.Counter[str] = collections.Counter()
    pictures = 0
    waiting: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    size: collections.Counter[str] = collections.Counter()

    def flush(split: str) -> None:
        writer.initialize_splits([split], fail_if_exists=False)
        writer.add_examples({split: waiting.pop(split)})
        del size[split]

    for entry, outcome in outcomes:
        parts.update(outcome.parts_dropped)
        if isinstance(outcome, Dropped):
            dropped[outcome.reason] += 1
            known = names.setdefault(outcome.reason, [])
            if entry and entry not in known and len(known) < NAMES:
                known.append(entry.encode(errors="backslashreplace").decode())
            continue
        drawn.offer(outcome)
        counts[outcome.split] += 1
        shown = _pictures(outcome)
        pictures += len(shown)
        waiting[outcome.split].append(outcome.fields)
        size[outcome.split] += sum(map(len, shown))
        if len(waiting[outcome.split]) == RECORDS_PER_FLUSH or size[outcome.split] >= BYTES_PER_FLUSH:
            flush(outcome.split)
    for split in list(waiting):
        flush(split)
    if counts:
        writer.close_all()
    used = counts.total()
    statistics: dict[str, Any] = {
        "splits": dict(sorted(counts.items())),
        "records_read": used + dropped.total(),
        "used": used,
        "dropped": dict(sorted(dropped.items())),
        "dropped_names": {reason: known for reason, known in sorted(names.items()) if known},
    }
    if pictures or parts:
        statistics["pictures"] = {"used": pictures, "dropped": dict(sorted(parts.items()))}
    return statistics, drawn


def _pictures(example: Example) -> list[bytes]:
    fields = example.fields
    return [*([fields["image"]] if "image" in fields else []), *fields.get("images", ()), *fields.get("frames", ())]
