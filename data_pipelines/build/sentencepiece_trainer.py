"""Trains a SentencePiece tokenizer on datasets or plain text, as the paper's language model has
it: text is kept exactly.
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
"""Bytes of a line that SentencePiece is given at once."""
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
    """Writes `output/tokenizer.model` and returns it; ids 0 to 3 are unknown, <BOS>, <EOS> and
    padding.

    texts: any strings; each of their lines is a sentence to learn from. The line end is a piece
    of its own. With `byte_fallback` any text can be written in pieces, which takes 256 of the
    vocabulary; without, characters that are not in `texts` are lost. Beside it statistics.json
    says what became of the lines. Raises UserError where there is no text, not enough for
    `vocab_size`, or another process trains there.
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
    """Trains `output/tokenizer.model` on all text of the paths (see `texts_in`).

    options: as `train_tokenizer` has them. progress: called with what is being done.

    Returns whether it was trained: one of the same size that is there is left as it is. Raises
    UserError where one of another size is there, and as `train_tokenizer` does.
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
    """Yields the lines of texts as SentencePiece takes them, with a count of what became of
    each.

    It skips without a word what is longer than MAX_SENTENCE bytes, so that longer lines are cut
    at spaces, at worst within a word; and what holds a null character or its own sign for the
    unknown, so that lines are cut there, and these characters are not learned. Blank lines are
    none.
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
        """Lines read, used (those that were cut among them) and dropped, by the reason."""
        counts = {what: self._counts[what] for what in ("read", "used", "cut")}
        dropped = dict(sorted(self._dropped.items()))
        return {"records_read": counts.pop("read"), **counts, "dropped": dropped}


def cut(text: str, size: int) -> Iterator[str]:
    """Yields the text in parts of at most `size` bytes, each but the first with the space
    before it.
    """
    data = text.encode()
    start = 0
    while len(data) - start > size:
        end = data.rfind(b" ", start + 1, start + size + 1)
        if end < 0:
            end = start + size
            while data[end] & 0xC0 == 0x80:  # Within a character.
                end -= 1
        yield data[start:end].decode()
        start = end
    yield data[start:].decode()


def _sentence(error: Exception, sentences: Sentences, vocab_size: int) -> UserError:
    """What SentencePiece failed with, for people."""
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
    """Yields all text of a .txt file, of the .txt files below a folder, or of the training
    split of a dataset, questions within the prompt.

    Files come line by line. Raises UserError where `path` is none of these, or cannot be read.
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
