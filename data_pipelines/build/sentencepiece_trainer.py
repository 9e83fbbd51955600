"""Trains a SentencePiece tokenizer on datasets or plain text; like the paper's, it is lossless
(no text normalisation).
"""

import collections
import io
import itertools
import json
import logging
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import sentencepiece

from data_pipelines.build.input_files import files_in
from data_pipelines.build.text_files import NOT_UTF8, line_parts, unreadable
from data_pipelines.features import INFO_FILE, STATISTICS_FILE, TRAIN, VERSION
from data_pipelines.records import open_records
from data_pipelines.transforms.examples import strings
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import QUESTION_PROMPT
from flamingo_jax.folder_lock import lock_folder
from flamingo_jax.processing.sequences import fill_prompt
from flamingo_jax.processing.tokenizer import FILE_NAME, Tokenizer

IMAGE_TAG = "<image>"
THREADS = 4
"""Fixed, so that the model does not depend on the machine."""
MAX_SENTENCE = 100_000
"""The most bytes of a training sentence; SentencePiece silently skips longer ones."""
UNTAKEN = re.compile("[\0\u2585]")
NOTHING = "null characters or U+2585 alone"
TEXT_FIELDS = ("text", "texts", "captions")


def train_tokenizer(
    texts: Iterable[str],
    output: str | pathlib.Path,
    *,
    vocab_size: int = 32_000,
    model_type: str = "bpe",
    byte_fallback: bool = True,
    user_defined: Sequence[str] = (IMAGE_TAG,),
    max_sentences: int = 5_000_000,
) -> pathlib.Path:
    """Trains a tokenizer and writes `output/tokenizer.model`, and statistics.json of the lines
    used.

    Ids 0 to 3 are unknown, <BOS>, <EOS> and padding; the newline is a piece of its own.

    Args:
      texts: strings of any length; each of their lines is a training sentence.
      vocab_size: number of pieces.
      model_type: "bpe" or "unigram".
      byte_fallback: encode unknown characters as bytes, so that any text can be encoded; this
        takes 256 pieces. Without it characters that are not in `texts` become unknown.
      user_defined: strings that are always one piece.
      max_sentences: train on a random sample of at most this many lines.

    Returns: the path of the model.
    Raises: UserError where there is no text, too little for `vocab_size`, or another process
      is training in the folder.
    """
    output = pathlib.Path(output)
    with lock_folder(output, "the training of a tokenizer"):
        sentences = Sentences(texts)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                byte_fallback=byte_fallback,
                user_defined_symbols=[*user_defined, "\n"],
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                character_coverage=0.9999 if byte_fallback else 1.0,
                split_digits=True,
                input_sentence_size=max_sentences,
                max_sentence_length=MAX_SENTENCE,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                num_threads=THREADS,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise _sentence(error, sentences, vocab_size) from error
        statistics = sentences.statistics()
        if statistics["cut"] or statistics["dropped"]:
            logging.warning("of the lines of text %s", json.dumps(statistics))
        (output / STATISTICS_FILE).write_text(json.dumps(statistics, indent=2))
        file = output / FILE_NAME
        incomplete = file.with_suffix(".incomplete")
        incomplete.write_bytes(model.getvalue())
        incomplete.rename(file)
    return file


def build_tokenizer(
    paths: Sequence[str | pathlib.Path],
    output: pathlib.Path,
    *,
    vocab_size: int,
    progress: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> bool:
    """Trains `output/tokenizer.model` on all text in datasets, files or folders (see
    `texts_in`).

    Args:
      progress: is called with a description of the current step.
      options: further arguments of `train_tokenizer`.

    Returns: whether it was trained; an existing tokenizer of the same size is kept.
    Raises: UserError where one of another size exists, and as `train_tokenizer` does.
    """
    file = output / FILE_NAME
    if file.exists():
        if (pieces := Tokenizer.load(file).pieces) != vocab_size:
            raise UserError(
                f"{file} is there already, with {pieces} pieces in place of "
                f"--vocab_size={vocab_size}: remove it, or choose another --output"
            )
        return False

    def counted() -> Iterator[str]:
        count = 0
        texts = itertools.chain.from_iterable(texts_in(path) for path in paths)
        for count, text in enumerate(texts, start=1):
            if count % 1_000 == 0:
                progress(f"read {count:,} texts")
            yield text
        progress(f"choosing {vocab_size:,} pieces from {count:,} texts")

    train_tokenizer(counted(), output, vocab_size=vocab_size, **options)
    return True


class Sentences:
    """Yields the lines of texts as training sentences, and counts what was used, cut and
    dropped.

    SentencePiece silently skips sentences that are longer than its limit, or contain a null
    character or U+2585, its symbol for unknown. So longer lines are split at spaces (or within
    a word if need be), and lines are split at these characters. Blank lines are skipped.
    """

    def __init__(self, texts: Iterable[str]):
        self._texts = texts
        self._counts: collections.Counter[str] = collections.Counter()
        self._dropped: collections.Counter[str] = collections.Counter()

    def __iter__(self) -> Iterator[str]:
        for line in (line for text in self._texts for line in text.split("\n") if line.strip()):
            self._counts["read"] += 1
            try:
                line.encode()
            except UnicodeEncodeError:
                self._dropped[NOT_UTF8] += 1
                continue
            parts = [part for whole in UNTAKEN.split(line) for part in cut(whole, MAX_SENTENCE)]
            parts = [part for part in parts if part.strip()]
            if not parts:
                self._dropped[NOTHING] += 1
                continue
            self._counts["used"] += 1
            self._counts["cut"] += len(parts) > 1
            yield from parts

    def statistics(self) -> dict[str, Any]:
        """Returns how many lines were read, used, split, and dropped by reason."""
        counts = {what: self._counts[what] for what in ("read", "used", "cut")}
        dropped = dict(sorted(self._dropped.items()))
        return {"records_read": counts.pop("read"), **counts, "dropped": dropped}


def cut(text: str, size: int) -> Iterator[str]:
    """Splits a text at spaces into parts of at most `size` bytes; a part after the first
    begins with the space.
    """
    data = text.encode()
    start = 0
    while len(data) - start > size:
        end = data.rfind(b" ", start + 1, start + size + 1)
        if end < 0:
            end = start + size
            while data[end] & 0xC0 == 0x80:  # A UTF-8 continuation byte.
                end -= 1
        yield data[start:end].decode()
        start = end
    yield data[start:].decode()


def _sentence(error: Exception, sentences: Sentences, vocab_size: int) -> UserError:
    """Turns an error of SentencePiece into one that says how to fix it."""
    statistics = sentences.statistics()
    if not statistics["used"]:
        dropped = statistics["dropped"].items()
        lost = ", ".join(f"{count} lines: {reason}" for reason, count in dropped)
        return UserError(
            f"there is no text to train a tokenizer on{f' ({lost})' if lost else ''}: "
            "name text files or datasets that have some"
        )
    reason = str(error).rsplit("]", maxsplit=1)[-1].strip().rstrip(".").replace(". ", "; ")
    if most := re.search(r"Vocabulary size too high.*<= (\d+)", reason):
        return UserError(
            f"this text gives {most[1]} pieces at most: choose a --vocab_size of {most[1]} or"
            f" less, not {vocab_size}"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return UserError(
            f"this text has more characters than --vocab_size={vocab_size} holds: "
            f"choose one above {least[1]}"
        )
    why = reason or f"it stops at {' '.join(str(error).split())}"
    return UserError(
        f"SentencePiece cannot make {vocab_size} pieces of this text ({why}): "
        "choose another --vocab_size, or give it more text"
    )


def texts_in(path: str | pathlib.Path) -> Iterator[str]:
    """Yields all text of a .txt file (by line), of the .txt files below a folder, or of a
    dataset's training split, questions written with the default prompt.

    Raises: UserError where `path` is none of these, or cannot be read.
    """
    path = pathlib.Path(path)
    for folder in (path, path / VERSION):
        if (folder / INFO_FILE).is_file():
            yield from _dataset_texts(folder)
            return
    if path.is_dir():
        files = [found.path for found in files_in((str(path),), (".txt",), "text file")]
    elif path.is_file():
        files = [path]
    else:
        raise UserError(
            f"{path} is no dataset, no text file and no folder of .txt files: name one of these"
        )
    for file in files:
        try:
            yield from line_parts(file)
        except OSError as error:
            raise unreadable(file, error) from error


def _dataset_texts(folder: pathlib.Path) -> Iterator[str]:
    """Yields all texts of a dataset's training split."""
    import tensorflow_datasets as tfds

    fields = tfds.builder_from_directory(str(folder)).info.features
    texts = [name for name in TEXT_FIELDS if name in fields]
    for record in open_records(folder, TRAIN):
        if "question" in fields:
            opening = fill_prompt(QUESTION_PROMPT, *strings([record["question"]]))
            yield from (f"{opening} {answer}" for answer in strings(record["answers"]))
        for name in texts:
            yield from strings(
                [record[name]] if isinstance(fields[name], tfds.features.Text) else record[name]
            )
