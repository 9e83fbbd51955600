"""Source `tfds`: converts a TFDS dataset, by name or folder, to one of this library's kinds.

Its features are found by their usual names (`USUAL`), or given in `fields`, where nested
features are written as paths such as `captions/text`.

It is converted rather than trained on directly, so that its images are checked and limited
like those of other sources, unusable records are counted, and training has one record format.
The splits train, validation (val, valid, dev) and test are kept; a dataset with a single split
is split by hash like other sources.
"""

import dataclasses
import functools
import glob
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.build.captions import NO_CAPTION, Texts, why_no_text
from data_pipelines.build.files import FILLERS
from data_pipelines.build.images import ANY_IMAGE, ImageRules, UnusableImage
from data_pipelines.build.source import (
    DEFAULT_SHARES,
    Converted,
    DroppedRecord,
    SplitFractions,
    SplitRecord,
    Stream,
)
from data_pipelines.build.text_files import EMPTY, as_utf8
from data_pipelines.features import INFO_FILE, TEST, TRAIN, VALIDATION
from data_pipelines.records import left_encoded
from flamingo_jax.errors import UserError

USUAL: dict[str, dict[str, tuple[str, ...]]] = {
    "questions": {
        "frames": ("frames", "video", "image"),
        "question": ("question", "question/text"),
        "answers": (
            "answers",
            "answers/answer",
            "answers/text",
            "answer",
            "multiple_choice_answer",
            "label",
        ),
    },
    "videos": {
        "frames": ("frames", "video"),
        "captions": ("captions", "captions/text", "caption", "text", "label"),
    },
    "pairs": {
        "image": ("image",),
        "captions": ("captions", "captions/text", "caption", "text", "label"),
    },
}
"""Kind -> {field: names of features that may hold it, most likely first}. Kinds are tried in
this order.
"""
OPTIONAL = {"questions": ("type", "id"), "videos": ("id",), "pairs": ("id",)}
UNKNOWN_LABEL = "label that is none of the classes"
SPLITS = {
    TRAIN: TRAIN,
    VALIDATION: VALIDATION,
    "val": VALIDATION,
    "valid": VALIDATION,
    "dev": VALIDATION,
    TEST: TEST,
}


@dataclasses.dataclass(frozen=True)
class TfdsRecordRef:
    """A record by its index. target: the split that it goes into; None to split by hash."""

    folder: str
    split: str
    place: int
    target: str | None

    def __str__(self) -> str:
        return f"{self.split}/{self.place}"


@dataclasses.dataclass(frozen=True)
class Tfds:
    """Reads records of a TFDS dataset.

    name: of a dataset that TFDS knows, prepared under `TFDS_DATA_DIR` or by this source; or
      the folder of a prepared one.
    shares_if_one: fractions of the splits for a dataset with a single split.
    fields: (field of the kind, feature) pairs that override the usual names.
    as_kind: pairs, videos or questions; by default the first that its features fit.
    fps: frame rate of its videos, which TFDS does not store.
    """

    name: str
    fractions_if_one_split: SplitFractions = DEFAULT_SHARES
    fields: tuple[tuple[str, str], ...] = ()
    as_kind: str | None = None
    rules: ImageRules = ANY_IMAGE
    fps: float = 1.0

    @property
    def kind(self) -> str:
        return self._mapped[0]

    @property
    def about(self) -> str:
        return f"Records of the TFDS dataset {self.name}."

    @property
    def options(self) -> dict[str, Any]:
        return {"source": type(self).__name__, **dataclasses.asdict(self)}

    @property
    def shares(self) -> SplitFractions | None:
        return self.fractions_if_one_split if len(self._splits) == 1 else None

    def entries(self) -> Stream[TfdsRecordRef]:
        """Lists the records of all splits, and warns of splits that are left out."""
        builder = _builder(self.name)
        splits = self._splits
        whole = SplitFractions.whole(splits[0])
        if splits[0] in (VALIDATION, TEST) and self.shares not in (None, whole):
            logging.warning(
                "%s has the split %s alone, which is dealt to all splits: --split=%s keeps it"
                " whole",
                self.name,
                splits[0],
                splits[0],
            )
        if left := sorted(set(builder.info.splits) - set(splits)):
            logging.warning(
                "%s: the splits %s are none of train, validation and test and are left out",
                self.name,
                ", ".join(left),
            )
        sizes = {split: builder.info.splits[split].num_examples for split in splits}
        target = {split: None if len(splits) == 1 else SPLITS[split] for split in splits}
        folder = str(builder.data_path)
        _records(
            folder, next(iter(splits)), self._image
        )  # One sentence for a form that cannot be read, before work starts.

        def places() -> Iterator[TfdsRecordRef]:
            for split, size in sizes.items():
                yield from (
                    TfdsRecordRef(folder, split, place, target[split]) for place in range(size)
                )

        return Stream(sum(sizes.values()), places)

    def convert(self, entry: TfdsRecordRef) -> list[Converted]:
        """Converts one record, or gives the reason why it was dropped."""
        try:
            record = _records(entry.folder, entry.split, self._image)[entry.place]
        except Exception:  # noqa: BLE001 - readers of damaged records raise whatever they stumble on.
            return [DroppedRecord("unreadable record")]
        kind, features = self._mapped
        image = features["image" if kind == "pairs" else "frames"]
        try:
            stored = _at(record, image)
            shown = [
                self.rules.store(data)
                for data in ([stored] if isinstance(stored, bytes) else list(stored))
            ]
            found_texts = {
                field: self._texts(record, feature)
                for field, feature in features.items()
                if field not in ("image", "frames", "id")
            }
            name = "".join(self._texts(record, features["id"]).kept[:1]) if "id" in features else ""
        except UnusableImage as error:
            return [DroppedRecord(str(error))]
        except (KeyError, TypeError, ValueError):
            return [DroppedRecord("record of another form")]
        if not shown:
            return [DroppedRecord("no image")]
        record_id = f"{entry.split}/{entry.place}" + (f"/{name}" if name else "")
        # Questions are split by a hash of their image: all about one image are in one split.
        dealt = (
            record_id
            if kind != "questions"
            else hashlib.blake2b(shown[0], digest_size=16).hexdigest()
        )
        split = entry.target or self.fractions_if_one_split.split(dealt)
        texts = {field: list(found.kept) for field, found in found_texts.items()}
        field = "answers" if kind == "questions" else "captions"
        lost = found_texts[field].lost
        if kind == "questions" and not texts["question"]:
            return [
                DroppedRecord(_why_none(found_texts["question"], "no question"), texts_dropped=lost)
            ]
        if not texts[field]:
            why = _why_none(found_texts[field], "no answer" if kind == "questions" else NO_CAPTION)
            return [DroppedRecord(why, texts_dropped=lost)]
        fields: dict[str, Any] = {"id": record_id, field: texts[field]}
        if kind == "questions":
            question_type = "".join(texts.get("type", [])[:1])
            fields |= {"frames": shown, "question": texts["question"][0], "type": question_type}
        else:
            fields |= {"image": shown[0]} if kind == "pairs" else {"frames": shown, "fps": self.fps}
        return [SplitRecord(split, fields, texts_dropped=lost)]

    @functools.cached_property
    def _splits(self) -> list[str]:
        """Finds the splits that are used; raises UserError where there are none."""
        there = [
            split for split, info in _builder(self.name).info.splits.items() if info.num_examples
        ]
        known = [split for split in there if split in SPLITS]
        if not known and len(there) != 1:
            raise UserError(
                f"{self.name} has the splits {', '.join(there) or '(none)'}, and none is train,"
                " validation or test: name another dataset"
            )
        return known or there

    @functools.cached_property
    def _mapped(self) -> tuple[str, dict[str, str]]:
        """Finds (kind, {field: feature}); raises UserError where the features fit no kind."""
        paths = dict(_paths(_builder(self.name).info.features))
        given = dict(self.fields)
        if unknown := [feature for feature in given.values() if feature not in paths]:
            raise UserError(
                f"{self.name} has no feature {unknown[0]!r}; it has {', '.join(sorted(paths))}:"
                " mend --field"
            )
        missing = []
        for kind, usual in USUAL.items():
            if self.as_kind not in (None, kind):
                continue
            if wrong := [field for field in given if field not in (*usual, *OPTIONAL[kind])]:
                missing.append(f"{kind} have no {wrong[0]}")
                continue
            found = given | {
                field: next((name for name in names if name in paths), "")
                for field, names in usual.items()
                if field not in given
            }
            lacking = [field for field, feature in found.items() if not feature]
            if not lacking:
                return kind, found
            missing.append(f"{kind} need {' and '.join(lacking)}")
        raise UserError(
            f"the features of {self.name} ({', '.join(sorted(paths))}) make no record:"
            f" {'; '.join(missing)}; say what holds them, such as --field=captions=NAME"
        )

    @property
    def _image(self) -> str:
        kind, features = self._mapped
        return features["image" if kind == "pairs" else "frames"]

    def _texts(self, record: Mapping[str, Any], path: str) -> Texts:
        """Reads a feature as texts: strings, names of class labels, or numbers as text."""
        names = getattr(dict(_paths(_builder(self.name).info.features))[path], "names", None)
        values = _at(record, path)
        values = (
            values
            if isinstance(values, (list, tuple))
            else np.asarray(values, object).ravel().tolist()
        )
        found = Texts()
        for value in values:
            text: str | None
            if isinstance(value, bytes):
                text = value.decode("utf-8", "surrogateescape")
            elif names:  # TFDS uses -1 for an unknown label, as in many test splits.
                text = names[value] if 0 <= int(value) < len(names) else None
            else:
                text = str(value)
            reason = UNKNOWN_LABEL if text is None else why_no_text(text)
            found = found.and_(Texts(lost=(reason,)) if reason else Texts((as_utf8(str(text)),)))
        return found


def _why_none(texts: Texts, otherwise: str) -> str:
    """Returns why a record has no text: what is wrong with the text it has, or `otherwise`."""
    return next((reason for reason in texts.lost if reason != EMPTY), otherwise)


def _paths(features: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each feature with its path.

    A sequence of dictionaries counts as a dictionary of sequences, which is how TFDS decodes
    it.
    """
    import tensorflow_datasets as tfds

    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, tfds.features.FeaturesDict):
            yield from _paths(inner, f"{above}{name}/")
        else:
            yield above + name, inner


def _at(record: Any, path: str) -> Any:
    for name in path.split("/"):
        record = record[name]
    return record


@functools.lru_cache(maxsize=4)
def _builder(name: str) -> Any:
    """Opens a dataset, and prepares it if needed; raises UserError where that fails."""
    import tensorflow_datasets as tfds

    try:
        if os.path.isdir(name):
            if os.path.isfile(os.path.join(name, INFO_FILE)):
                return tfds.builder_from_directory(name)
            files = glob.glob(os.path.join(glob.escape(name), "*", INFO_FILE))
            versions = sorted(
                folder
                for folder in map(os.path.dirname, files)
                if os.path.basename(folder) not in FILLERS
            )
            return tfds.builder_from_directory(versions[-1] if versions else name)
        builder = tfds.builder(name)
        if not builder.is_prepared():
            builder.download_and_prepare(file_format="array_record")
        return builder
    except ImportError as error:
        raise UserError(
            f"the dataset {name} needs a package that is not installed ({error}): install it,"
            " tensorflow for most"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"TFDS has no dataset {name}, or cannot make it ({reason}): name another, or the"
            " folder of a prepared one"
        ) from error


@functools.lru_cache(maxsize=8)
def _records(folder: str, split: str, image: str) -> Sequence[Any]:
    """Opens a split for random access; raises UserError where its format has none."""
    try:
        return _builder(folder).as_data_source(
            split=split, decoders=left_encoded([image.split("/")[0]])
        )
    except (NotImplementedError, ValueError, FileNotFoundError) as error:
        raise UserError(
            f"{folder} cannot be read record by record: prepare it anew with `tfds build"
            " --file_format=array_record`, or convert it with `python -m"
            " tensorflow_datasets.scripts.convert_format`"
        ) from error
