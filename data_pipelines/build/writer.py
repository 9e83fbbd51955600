"""Writes a source as a TFDS dataset in the ArrayRecord format: shards, features, splits with
counts, statistics.json, samples.html.

Any TFDS user opens it with `tfds.builder_from_directory(folder /
"1.0.0").as_data_source(split=...)`. It is written into a folder beside its own and renamed at
the end, so that a dataset that is there is whole.
"""

import collections
import json
import logging
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Any

from data_pipelines.build.samples_page import RecordSampler, samples_page
from data_pipelines.build.source import Converted, DroppedRecord, Source, SplitRecord
from data_pipelines.build.workers import DIED, ordered_map
from data_pipelines.features import INFO_FILE, STATISTICS_FILE, TRAIN, VERSION, features
from flamingo_jax.errors import UserError
from flamingo_jax.folder_lock import lock_folder
from flamingo_jax.progress import Bar

SAMPLES_FILE = "samples.html"
TEXT_FIELDS = ("captions", "answers", "texts")
"""Fields of which a record may lose some texts and keep others; statistics count these."""
NAMED = 5
"""Entries named of each reason to drop."""
RECORDS_PER_SHARD = 5_000
RECORDS_PER_FLUSH = 200
BYTES_PER_FLUSH = 64 << 20
"""Records of a split, or bytes of their images, that wait in memory to be written together:
TFDS writes its metadata anew at every flush.
"""
FAILED = "the reader failed"


def write_dataset(
    output: str | pathlib.Path, source: Source, executor: Executor | None = None
) -> tuple[dict[str, Any], bool]:
    """Writes `source` to `output/1.0.0` and returns its statistics, and whether it had to be
    built.

    A finished dataset of the same options is left as it is; what an interrupted build left is
    made again. Raises UserError where the folder's name is none for TFDS, it holds a dataset of
    other options, another build works in it, or no record is left to train on.
    """
    output = pathlib.Path(output)
    name = output.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"{name!r} cannot name a dataset: end --output in small letters, digits and"
            " underscores, with a letter first"
        )
    final = output / VERSION
    if (final / INFO_FILE).is_file():
        return _finished(final, source), False
    with lock_folder(output, "a build"):
        if (final / INFO_FILE).is_file():  # Since the look above.
            return _finished(final, source), False
        return _build(output, source, executor), True


def _build(output: pathlib.Path, source: Source, executor: Executor | None) -> dict[str, Any]:
    """Writes the dataset into an output folder that is held, and returns its statistics."""
    name, final, building = output.name, output / VERSION, output / f"{VERSION}.incomplete"
    entries = source.entries()
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    with Bar(name, len(entries)) as bar:
        outcomes = _watched(ordered_map(_Named(source.convert), entries, executor, _died), bar)
        statistics, sampler = _write(building, name, source, outcomes)
    statistics["options"] = source.options
    lacking = source.shares.lacking(statistics["splits"]) if source.shares else []
    if not statistics["splits"] or TRAIN in lacking:
        shutil.rmtree(building)
        counts = statistics["dropped"] | {
            f"for {split}": count for split, count in statistics["splits"].items()
        }
        reasons = (
            ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "there were none"
        )
        raise UserError(
            f"no record is left for {output} to train on ({reasons}): look at the input folder,"
            " or loosen the options or the shares"
        )
    for split in lacking:
        logging.warning(
            "%s is too small for its share of %s: remove it and build it again with a larger"
            " --%s_share",
            output,
            split,
            split,
        )
    (building / STATISTICS_FILE).write_text(json.dumps(statistics, indent=2))
    (building / SAMPLES_FILE).write_text(
        samples_page(name, source.about, statistics, sampler.examples()), "utf-8"
    )
    if final.exists():
        shutil.rmtree(final)
    building.rename(final)
    return statistics


class _Named:
    """A source's `convert` with the name of each entry beside its outcomes."""

    def __init__(self, convert: Callable[[Any], list[Converted]]):
        self._convert = convert

    def __call__(self, entry: Any) -> tuple[str, list[Converted]]:
        try:
            return _name(entry), self._convert(entry)
        except UserError:
            raise
        except Exception as error:
            # One record in millions that a library stumbles on must not cost the others.
            _log_once(type(error).__name__, _name(entry))
            return _name(entry), [DroppedRecord(f"{FAILED} ({type(error).__name__})")]


def _name(entry: Any) -> str:
    return str(entry[-1] if isinstance(entry, tuple) else entry)


def _log_once(kind: str, name: str) -> None:
    """The traceback of the first failure of each kind in each process."""
    if kind not in _LOGGED:
        _LOGGED.add(kind)
        logging.exception("reading %s failed with %s: it is left out", name, kind)


_LOGGED: set[str] = set()


def _died(entry: Any) -> tuple[str, list[Converted]]:
    """The outcome of an entry that kills the process that works on it."""
    logging.warning("%s %s: it is left out", _name(entry), DIED)
    return _name(entry), [DroppedRecord(DIED)]


def _watched(
    converted: Iterable[tuple[str, list[Converted]]], bar: Bar
) -> Iterator[tuple[str, Converted]]:
    for name, outcomes in converted:
        for outcome in outcomes:
            yield name, outcome
        bar.advance()


def _finished(final: pathlib.Path, source: Source) -> dict[str, Any]:
    try:
        statistics: dict[str, Any] = json.loads((final / STATISTICS_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{final} holds a dataset without a readable {STATISTICS_FILE}: remove it, or"
            " choose another --output"
        ) from error
    if statistics.get("options") != json.loads(json.dumps(source.options)):
        raise UserError(
            f"{final} was built from another source or with other options: remove it, or choose"
            " another --output"
        )
    if "pictures" in statistics:  # What older versions of this file call them.
        statistics["images"] = statistics.pop("pictures")
    return statistics


def _write(
    folder: pathlib.Path, name: str, source: Source, outcomes: Iterable[tuple[str, Converted]]
) -> tuple[dict[str, Any], RecordSampler]:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    identity = DatasetIdentity(
        name=name,
        version=tfds.core.Version(VERSION),
        data_dir=str(folder),
        module_name=__name__,
    )
    info = tfds.core.DatasetInfo(
        builder=identity, description=source.about, features=features(source.kind)
    )
    writer = tfds.core.SequentialWriter(info, RECORDS_PER_SHARD, file_format="array_record")
    counts: collections.Counter[str] = collections.Counter()
    dropped: collections.Counter[str] = collections.Counter()
    names: dict[str, list[str]] = {}
    sampler = RecordSampler()
    parts: collections.Counter[str] = collections.Counter()
    texts_dropped: collections.Counter[str] = collections.Counter()
    images = texts = 0
    waiting: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    size: collections.Counter[str] = collections.Counter()

    def flush(split: str) -> None:
        writer.initialize_splits([split], fail_if_exists=False)
        writer.add_examples({split: waiting.pop(split)})
        del size[split]

    for entry, outcome in outcomes:
        parts.update(outcome.parts_dropped)
        texts_dropped.update(outcome.texts_dropped)
        if isinstance(outcome, DroppedRecord):
            dropped[outcome.reason] += 1
            known = names.setdefault(outcome.reason, [])
            if entry and entry not in known and len(known) < NAMED:
                known.append(entry.encode(errors="backslashreplace").decode())
            continue
        sampler.offer(outcome)
        counts[outcome.split] += 1
        shown = _images(outcome)
        images += len(shown)
        texts += sum(len(outcome.fields.get(field, ())) for field in TEXT_FIELDS)
        waiting[outcome.split].append(outcome.fields)
        size[outcome.split] += sum(map(len, shown))
        if (
            len(waiting[outcome.split]) == RECORDS_PER_FLUSH
            or size[outcome.split] >= BYTES_PER_FLUSH
        ):
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
    if images or parts:
        statistics["images"] = {"used": images, "dropped": dict(sorted(parts.items()))}
    if texts_dropped:
        statistics["texts"] = {"used": texts, "dropped": dict(sorted(texts_dropped.items()))}
    return statistics, sampler


def _images(example: SplitRecord) -> list[bytes]:
    fields = example.fields
    return [
        *([fields["image"]] if "image" in fields else []),
        *fields.get("images", ()),
        *fields.get("frames", ()),
    ]
