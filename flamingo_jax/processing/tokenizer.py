"""Text to token ids and back: SentencePiece, with <EOC> as one more id after its vocabulary."""

import functools
import hashlib
import pathlib

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from flamingo_jax.errors import UserError

FILE_NAME = "tokenizer.model"


class Tokenizer:
    """A SentencePiece model read so that text is taken exactly: no space put in front, none removed.

    A leading space is information here (paper A.3.3 puts one before half of all paired text), so the model's `add_dummy_prefix` and
    `remove_extra_whitespaces` are switched off; its Unicode normalisation stays as it was trained.
    Ids 0..V-1 are SentencePiece's, V is <EOC>. Safe to use from several threads.
    """

    image_tag = "<image>"

    def __init__(self, model: bytes):
        """Raises UserError where `model` is no SentencePiece model or has no <BOS> or <EOS>."""
        self._model = model
        proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        try:
            proto.ParseFromString(model)
            proto.normalizer_spec.add_dummy_prefix = False
            proto.normalizer_spec.remove_extra_whitespaces = False
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        except (DecodeError, RuntimeError) as error:
            raise UserError(f"the tokenizer is no SentencePiece model ({error}); name a .model file that SentencePiece wrote") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos: int = self._processor.bos_id()
        self.eos: int = self._processor.eos_id()
        if self.bos < 0 or self.eos < 0:
            raise UserError("the tokenizer has no <BOS> or no <EOS>; train it with bos_id and eos_id")
        self.pad: int = max(self._processor.pad_id(), 0)
        """Fills the end of a row, which is masked everywhere; 0 where the model has no padding of its own."""
        self.eoc: int = self.vocab_size

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Tokenizer":
        """From a model file, or a folder that holds `tokenizer.model`. Raises UserError where there is none."""
        file = pathlib.Path(path)
        file = file / FILE_NAME if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"there is no tokenizer at {file}; name a SentencePiece model file, or a folder that holds {FILE_NAME}")
        return cls(file.read_bytes())

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the model, unchanged, as `tokenizer.model`."""
        (pathlib.Path(folder) / FILE_NAME).write_bytes(self._model)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name these exact model bytes."""
        return hashlib.sha256(self._model).hexdigest()[:16]

    @functools.cached_property
    def image_tag_ids(self) -> tuple[int, ...]:
        return tuple(self.encode(self.image_tag))

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no <BOS>, <EOS> or <EOC>."""
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; <BOS>, <EOS>, padding and everything from <EOC> up are left out."""
        dropped = {self.bos, self.eos, self._processor.pad_id()}
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size and i not in dropped])
