"""Tokenizers: SentencePiece or Hugging Face's `tokenizers`, with <EOC> as an additional id
after the vocabulary.
"""

import abc
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_jax import paths
from flamingo_jax.errors import UserError

FILE_NAME = "tokenizer.model"
"""A SentencePiece model."""
JSON_NAME = "tokenizer.json"
"""A tokenizer of Hugging Face's library `tokenizers`."""
SPECIALS_NAME = "tokenizer_config.json"
"""Names the special tokens of `tokenizer.json`."""


class Tokenizer(abc.ABC):
    """A tokenizer that encodes text exactly: it adds and removes no spaces, and does not
    interpret special tokens written in the text.

    Leading spaces matter (paper A.3.3 puts one before half of all captions), so the
    tokenizer's own dummy prefix is switched off; Unicode normalisation stays as trained.
    Thread-safe.

    Ids: 0..pieces - 1 are the tokenizer's; pieces..vocab_size - 1 are unused padding of the
    language model's vocabulary; vocab_size is <EOC>.
    """

    image_tag = "<image>"

    pieces: int
    vocab_size: int
    bos: int
    """The beginning of a document; for a model trained without one (Qwen), the token that
    separated its documents.
    """
    eos: int
    pad: int
    """Pads rows. Padding is masked everywhere, so any id will do where the model has none for
    the tokenizer's own padding token (Llama 2).
    """

    @staticmethod
    def load(path: str | pathlib.Path, vocab_size: int = 0) -> "Tokenizer":
        """Loads a tokenizer from a file, or from a folder with `tokenizer.json` or else
        `tokenizer.model`.

        Args:
          vocab_size: the language model's vocabulary size; 0 for the tokenizer's own.

        Raises: UserError where there is no tokenizer, or its size does not match the model's
          (`fits`).
        """
        file = tokenizer_file(path)
        if file is None:
            raise UserError(
                f"there is no tokenizer at {path}; name a SentencePiece model or a {JSON_NAME},"
                f" or a folder that holds {FILE_NAME} or {JSON_NAME}"
            )
        found: Tokenizer
        if file.suffix == ".json":
            found = JSONTokenizer(file.read_bytes(), special_tokens(file.parent))
        else:
            found = SentencePieceTokenizer(file.read_bytes())
        if vocab_size and not found.fits(vocab_size):
            raise UserError(
                f"the tokenizer {path} has {found.pieces} pieces, but the language model"
                f" {vocab_size}: they do not belong together"
            )
        found.vocab_size = vocab_size or found.pieces
        if found.pieces > found.vocab_size:  # A padding token that the model has no id for.
            found.pieces, found.pad = found.needed, found.bos
        return found

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the files that `load` reads, and removes those of another tokenizer."""
        files = self.files()
        for name in (FILE_NAME, JSON_NAME, SPECIALS_NAME):
            file = paths.as_path(folder) / name
            if name in files:
                file.write_bytes(files[name])
            else:
                file.unlink(missing_ok=True)

    def fits(self, vocab_size: int) -> bool:
        """Returns whether a language model of this vocabulary size can belong to the
        tokenizer: equal, or somewhat larger where the vocabulary was padded to a multiple.

        The model may lack an id for a last padding token: these are often added to a tokenizer
        after the model was trained.
        """
        return self.needed <= vocab_size <= self.pieces + max(64, self.pieces // 10)

    @property
    def needed(self) -> int:
        """Returns the least vocabulary size of a model: all ids but a last padding token."""
        return self.pieces - (self.pad == self.pieces - 1 and self.pad not in (self.bos, self.eos))

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """Returns {file name: content} of the files that `load` reads."""

    @property
    def eoc(self) -> int:
        """Returns the id of <EOC>, the end of a chunk of text (paper 3.1)."""
        return self.vocab_size

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hashes the tokenizer's files to 16 hexadecimal digits."""
        return hashlib.sha256(b"".join(self.files().values())).hexdigest()[:16]

    @functools.cached_property
    def image_tag_ids(self) -> tuple[int, ...]:
        """Returns the ids of the text `<image>`, the tag in place of a visual (paper 3.1)."""
        return tuple(self.encode(self.image_tag))

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Encodes a text to ids, without <BOS>, <EOS> or <EOC>."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids to text, leaving out <BOS>, <EOS>, padding, other special tokens and ids
        from `pieces` on, such as <EOC>.
        """


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with `add_dummy_prefix` and `remove_extra_whitespaces` off."""

    def __init__(self, model: bytes):
        """Loads a serialised model; raises UserError if it is none or lacks <BOS> or <EOS>."""
        # Imported here: a machine that loads no tokenizer need not have these libraries.
        import sentencepiece
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2

        self._model = model
        proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        try:
            proto.ParseFromString(model)
            proto.normalizer_spec.add_dummy_prefix = False
            proto.normalizer_spec.remove_extra_whitespaces = False
            self._processor = sentencepiece.SentencePieceProcessor(
                model_proto=proto.SerializeToString()
            )
        except (DecodeError, RuntimeError) as error:
            raise UserError(
                f"the tokenizer is no SentencePiece model ({error}); name a .model file that"
                " SentencePiece wrote"
            ) from error
        self.pieces = self.vocab_size = self._processor.vocab_size()
        self.bos, self.eos = self._processor.bos_id(), self._processor.eos_id()
        if self.bos < 0 or self.eos < 0:
            raise UserError(
                "the tokenizer has no <BOS> or no <EOS>; train it with bos_id and eos_id"
            )
        # 0 where the model has no padding of its own.
        self.pad = max(self._processor.pad_id(), 0)
        self._silent = {self.bos, self.eos, self._processor.pad_id()}

    def files(self) -> dict[str, bytes]:
        return {FILE_NAME: self._model}

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(
            [int(i) for i in ids if 0 <= i < self.pieces and i not in self._silent]
        )


class JSONTokenizer(Tokenizer):
    """A `tokenizer.json` with prefix spaces, truncation and padding off."""

    def __init__(self, content: bytes, specials: Mapping[str, str]):
        """Loads the content of a tokenizer.json.

        specials: {role: token} of `special_tokens`.
        Raises: UserError where `content` is not a tokenizer, or has no eos_token.
        """
        import tokenizers  # Imported here, as sentencepiece is.

        self._content = content
        try:
            document = json.loads(content)
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix(document)))
        except Exception as error:  # noqa: BLE001 - the library raises plain Exceptions
            raise UserError(
                f"the tokenizer is no tokenizer.json that can be read ({error}); name one that"
                " Hugging Face's tokenizers wrote"
            ) from error
        # "<|endoftext|>" written in a text is encoded as ordinary text, not as the special
        # token.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.pieces = self.vocab_size = 1 + max(
            self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1
        )
        ids: dict[str, int] = {}
        for role, token in specials.items():
            number = self._tokenizer.token_to_id(token)
            if number is None and role == "pad_token":
                continue
            if number is None:
                raise UserError(
                    f"the tokenizer has no token {token!r}, which its {SPECIALS_NAME} calls the"
                    f" {role}: copy both files from the same model"
                )
            ids[role] = number
        if "eos_token" not in ids:
            raise UserError(
                f"the tokenizer has no eos_token: name one in the {SPECIALS_NAME} beside it"
            )
        self.eos = ids["eos_token"]
        self.bos = ids.get("bos_token", self.eos)
        self.pad = ids.get("pad_token", self.bos)
        self._specials = dict(specials)

    def files(self) -> dict[str, bytes]:
        return {
            JSON_NAME: self._content,
            SPECIALS_NAME: ((json.dumps(self._specials, indent=1, sort_keys=True) + "\n").encode()),
        }

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        silent = {self.bos, self.eos, self.pad}
        return self._tokenizer.decode(
            [int(i) for i in ids if 0 <= i < self.pieces and i not in silent],
            skip_special_tokens=True,
        )


def tokenizer_file(path: str | pathlib.Path) -> pathlib.Path | None:
    """Finds the tokenizer file at a path, or in the folder at a path; None where there is
    none.
    """
    file = paths.as_path(path)
    places = [file / JSON_NAME, file / FILE_NAME] if file.is_dir() else [file]
    return next((place for place in places if place.is_file()), None)


def special_tokens(folder: pathlib.Path) -> dict[str, str]:
    """Reads {role: token} for the roles bos_token, eos_token and pad_token, as far as the
    model in a folder has them.

    They are in tokenizer_config.json or special_tokens_map.json, where null, false and "" mean
    none; otherwise in config.json by id. There a model without <BOS> has as its bos_token_id
    the token that separated its documents.
    """
    found: dict[str, str] = {}
    for name in (SPECIALS_NAME, "special_tokens_map.json"):
        for role, token in _json(folder / name).items():
            if role in ("bos_token", "eos_token", "pad_token"):
                text = token.get("content") if isinstance(token, dict) else token
                if isinstance(text, str) and text:
                    found.setdefault(role, text)
                elif text:
                    raise UserError(
                        f"{folder / name} has {role} = {token!r}, which is no text: copy it"
                        " from the model again"
                    )
    config = _json(folder / "config.json")
    config = config if isinstance(config.get("model_type"), str) else {}
    names = {
        entry["id"]: entry["content"] for entry in _json(folder / JSON_NAME).get("added_tokens", [])
    }
    for role in ("bos_token", "eos_token", "pad_token"):
        number = config.get(f"{role}_id")
        number = number[0] if isinstance(number, list) and number else number
        if number in names:
            found.setdefault(role, names[number])
    return found


def _json(file: pathlib.Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file} is no JSON document ({error}): copy it again") from error
    return document if isinstance(document, dict) else {}


def _without_prefix(part: Any) -> Any:
    """Removes, recursively, the parts of a tokenizer.json that add a space before a text when
    encoding or strip one when decoding.
    """
    if isinstance(part, list):
        return [_without_prefix(item) for item in part]
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    part = {
        key: _without_prefix(value) if key not in ("model", "added_tokens") else value
        for key, value in part.items()
    }
    if kind == "Metaspace":
        part |= (
            {"prepend_scheme": "never", "add_prefix_space": False}
            if "add_prefix_space" in part
            else {"prepend_scheme": "never"}
        )
    elif kind == "ByteLevel" and "add_prefix_space" in part:
        part["add_prefix_space"] = False
    for key, inside in (("normalizers", "Prepend"), ("decoders", "Strip")):
        if kind == "Sequence" and key in part:
            part[key] = [item for item in part[key] if item["type"] != inside]
    for key, outer in (("normalizer", "Prepend"), ("decoder", "Strip")):
        if isinstance(part.get(key), dict) and part[key].get("type") == outer:
            part[key] = None
    return part
