"""Trains a SentencePiece tokenizer on datasets or plain text, as the paper's language model has it: text is kept exactly."""

import io
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece

from data_pipelines.features import INFO_FILE, TRAIN, VERSION
from data_pipelines.records import open_records
from data_pipelines.transforms.examples import strings
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import QUESTION_PROMPT
from flamingo_jax.processing.sequences import asked
from flamingo_jax.processing.tokenizer import FILE_NAME

IMAGE_TAG = "<image>"
THREADS = 4
"""Fixed, so that the model does not depend on the machine."""
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
    """Writes `output/tokenizer.model` and returns it; ids 0 to 3 are unknown, <BOS>, <EOS> and padding.

    texts: any strings; each of their lines is a sentence to learn from. The line end is a piece of its own. With `byte_fallback` any
    text can be written in pieces, which takes 256 of the vocabulary; without, characters that are not in `texts` are lost.
    Raises UserError where there is no text, or not enough for `vocab_size`.
    """
    sentences = (line for text in texts for line in text.split("\n") if line.strip())
    first = next(sentences, None)
    if first is None:
        raise UserError("there is no text to train a tokenizer on: name text files or datasets that have some")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chain(first, sentences), model_writer=model, vocab_size=vocab_size, model_type=model_type,
            byte_fallback=byte_fallback, user_defined_symbols=[*user_defined, "\n"],
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            character_coverage=0.9999 if byte_fallback else 1.0, split_digits=True,
            input_sentence_size=max_sentences, max_sentence_length=100_000,
            unk_id=0, bos_id=1, eos_id=2, pad_id=3, num_threads=THREADS, minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).rsplit("] ", maxsplit=1)[-1].rstrip(".").replace(". ", "; ")
        if most := re.search(r"Vocabulary size too high.*<= (\d+)", reason):
            raise UserError(f"this text gives {most[1]} pieces at most: choose a --vocab_size of {most[1]} or less, not {vocab_size}") from error
        raise UserError(f"SentencePiece cannot make {vocab_size} pieces of this text ({reason}): choose another --vocab_size") from error
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    file = output / FILE_NAME
    incomplete = file.with_suffix(".incomplete")
    incomplete.write_bytes(model.getvalue())
    incomplete.rename(file)
    return file


def texts_in(path: str | pathlib.Path) -> Iterator[str]:
    """All text of a .txt file, of the .txt files below a folder, or of the training split of a dataset, questions within the prompt.

    Raises UserError where `path` is none of these.
    """
    path = pathlib.Path(path)
    for folder in (path, path / VERSION):
        if (folder / INFO_FILE).is_file():
            yield from _dataset_texts(folder)
            return
    files = [path] if path.is_file() else sorted(path.rglob("*.txt"))
    if not files:
        raise UserError(f"{path} is no dataset, no text file and no folder of .txt files: name one of these")
    for file in files:
        yield file.read_text("utf-8", errors="replace")


def _dataset_texts(folder: pathlib.Path) -> Iterator[str]:
    import tensorflow_datasets as tfds

    fields = tfds.builder_from_directory(str(folder)).info.features
    texts = [name for name in TEXT_FIELDS if name in fields]
    for record in open_records(folder, TRAIN):
        if "question" in fields:
            opening = asked(QUESTION_PROMPT, *strings([record["question"]]))
            yield from (f"{opening} {answer}" for answer in strings(record["answers"]))
        for name in texts:
            yield from strings([record[name]] if isinstance(fields[name], tfds.features.Text) else record[name])


def _chain(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest
