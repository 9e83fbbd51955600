"""Writes a source as a TFDS dataset in the ArrayRecord format, with statistics.json and
samples.html.

Any TFDS user can open it: `tfds.builder_from_directory(folder /
"1.0.0").as_data_source(split=...)`. It is written to a temporary folder that is renamed at the
end, so a dataset that exists is complete.
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
"""Fields with several texts, of which a record may lose some; their texts are counted."""
NAMED = 5
"""How many dropped entries are named for each reason."""
RECORDS_PER_SHARD = 5_000
RECORDS_PER_FLUSH = 200
BYTES_PER_FLUSH = 64 << 20
"""Limits on the records of a split, and the bytes of their images, that are buffered before a
flush: TFDS rewrites its metadata at each flush.
"""
FAILED = "the reader failed"


def write_dataset(
    output: str | pathlib.Path, source: Source, executor: Executor | None = None
) -> tuple[dict[str, Any], bool]:
    """Writes a source's records to `output/1.0.0`.

    A finished dataset with the same options is kept; an interrupted build starts again.

    Args:
      executor: converts the entries; None to do so in this process.

    Returns: (statistics, whether the dataset was built by this call).
    Raises: UserError where the folder's name is not valid for TFDS, the folder has a dataset
      with other options, another process is building in it, or no record is left to train on.
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
        if (final / INFO_FILE).is_file():  # Finished by another process while we waited.
            return _finished(final, source), False
        return _build(output, source, executor), True


def _build(output: pathlib.Path, source: Source, executor: Executor | None) -> dict[str, Any]:
    """Builds the dataset, with the output folder locked, and returns its statistics."""
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
    """Wraps a source's `convert`: adds the entry's name, and turns exceptions into dropped
    records.

    A class, not a closure, so that it can be pickled for worker processes.
    """

    def __init__(self, convert: Callable[[Any], list[Converted]]):
        self._convert = convert

    def __call__(self, entry: Any) -> tuple[str, list[Converted]]:
        try:
            return _name(entry), self._convert(entry)
        except UserError:
            raise
        except Exception as error:
            # One bad record in millions must not fail the build: drop and count it.
            _log_once(type(error).__name__, _name(entry))
            return _name(entry), [DroppedRecord(f"{FAILED} ({type(error).__name__})")]


def _name(entry: Any) -> str:
    return str(entry[-1] if isinstance(entry, tuple) else entry)


def _log_once(kind: str, name: str) -> None:
    """Logs the traceback of the first exception of each type in this process."""
    if kind not in _LOGGED:
        _LOGGED.add(kind)
        logging.exception("reading %s failed with %s: it is left out", name, kind)


_LOGGED: set[str] = set()


def _died(entry: Any) -> tuple[str, list[Converted]]:
    """Returns the outcome of an entry that killed its worker process."""
    logging.warning("%s %s: it is left out", _name(entry), DIED)
    return _name(entry), [DroppedRecord(DIED)]


def _watched(
    converted: Iterable[tuple[str, list[Converted]]], bar: Bar
) -> Iterator[tuple[str, Converted]]:
    """Flattens the outcomes of entries and advances the progress bar."""
    for name, outcomes in converted:
        for outcome in outcomes:
            yield name, outcome
        bar.advance()


def _finished(final: pathlib.Path, source: Source) -> dict[str, Any]:
    """Returns the statistics of a finished dataset; raises UserError if its options differ."""
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
    """Writes the records, counts every outcome; returns (statistics, sampled records)."""
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
    # TFDS's low-level writer: records arrive one by one, of any split, and a
    # GeneratorBasedBuilder would first shuffle all of them on disk.
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
    """Returns all encoded images of a record of any kind."""
    fields = example.fields
    return [
        *([fields["image"]] if "image" in fields else []),
        *fields.get("images", ()),
        *fields.get("frames", ()),
    ]
