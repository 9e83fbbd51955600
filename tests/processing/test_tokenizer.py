"""Text survives the tokenizer exactly, and its specials stay out of it."""

import io
import json

import pytest
import sentencepiece
import tokenizers

from flamingo_jax.errors import UserError
from flamingo_jax.inference.device_model import token_constraints
from flamingo_jax.processing.tokenizer import JSONTokenizer, SentencePieceTokenizer, Tokenizer


def train(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            ["a red circle at the top left", "Question: what colour? Answer: blue"] * 20
        ),
        model_writer=model,
        vocab_size=320,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
        **{"pad_id": 3, "user_defined_symbols": ["<image>"], **options},
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return SentencePieceTokenizer(train())


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        " a red circle",
        "two  spaces, an end ",
        "one\nline\tand more\n",
        "naïve 光 🙂",
        "x<image>y",
        "",
    ],
)
def test_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_leading_space_changes_the_first_token(tokenizer):
    assert tokenizer.encode("a red circle") != tokenizer.encode(" a red circle")


def test_specials(tokenizer):
    assert len({tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.eoc}) == 4
    assert tokenizer.eoc == tokenizer.vocab_size
    ids = tokenizer.encode("a red circle")
    assert max(ids) < tokenizer.vocab_size
    assert (
        tokenizer.decode(
            [
                tokenizer.bos,
                *ids,
                tokenizer.eoc,
                tokenizer.eos,
                tokenizer.pad,
                tokenizer.eoc + 1,
            ]
        )
        == "a red circle"
    )
    assert len(tokenizer.image_tag_ids) == 1


def test_a_model_without_an_image_piece_spells_the_tag_out():
    spelled = SentencePieceTokenizer(train(user_defined_symbols=[]))
    assert len(spelled.image_tag_ids) > 1
    assert spelled.decode(list(spelled.image_tag_ids)) == "<image>"


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        assert Tokenizer.load(path).fingerprint == tokenizer.fingerprint
    assert len(tokenizer.fingerprint) == 16
    assert (
        SentencePieceTokenizer(train(user_defined_symbols=[])).fingerprint != tokenizer.fingerprint
    )


def test_bad_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no SentencePiece model"):
        SentencePieceTokenizer(b"hello, this is no model")
    with pytest.raises(UserError, match="<BOS>"):
        SentencePieceTokenizer(train(bos_id=-1))


def byte_level(**specials: str) -> tuple[bytes, dict[str, str]]:
    """A tokenizer.json as Qwen's and Llama 3's are: bytes, no normalisation, special tokens
    behind the vocabulary.
    """
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["a red circle at the top left"] * 20, trainer)
    made.add_special_tokens([*dict.fromkeys(specials.values()), "<|im_start|>"])
    # As published ones have them: both would change what is trained on.
    made.enable_truncation(5)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {specials['eos_token']}", special_tokens=[(specials["eos_token"], 270)]
    )
    return made.to_str().encode(), specials


def metaspace() -> bytes:
    """One as Llama 2's is: a normaliser puts a space in front of every text and a decoder takes
    it away.
    """
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, show_progress=False
    )
    made.train_from_iterator(["a red circle", "Question: what colour? Answer: blue"] * 20, trainer)
    document = json.loads(made.to_str())
    document["added_tokens"] = document["added_tokens"][:3]
    return json.dumps(document).encode()


QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
JSONS = {
    "bytes": byte_level(**QWEN),
    "metaspace": (metaspace(), {"bos_token": "<s>", "eos_token": "</s>"}),
}


@pytest.mark.parametrize("kind", JSONS)
@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        " a red circle",
        "two  spaces, an end ",
        "one\nline\tand more\n",
        "naïve 光 🙂",
        "x<image>y",
        "<|im_end|> and </s> are text",
        "",
    ],
)
def test_text_comes_back_exactly_from_json(kind, text):
    found = JSONTokenizer(*JSONS[kind])
    ids = found.encode(text)
    assert found.decode(ids) == text
    assert not {found.eos, found.bos, found.pad} & set(ids)


def test_specials_of_json(tmp_path):
    content, specials = JSONS["bytes"]
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "eos_token": {"content": "<|im_end|>"},
                "bos_token": None,
                "pad_token": "<|endoftext|>",
            }
        )
    )
    # No beginning of text: what stood between documents begins one here.
    found = Tokenizer.load(tmp_path)
    assert (found.eos, found.bos, found.pad, found.pieces) == (270, 270, 271, 273)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3", "bos_token_id": 271, "eos_token_id": [270, 271]})
    )
    found = Tokenizer.load(tmp_path)
    assert (found.eos, found.bos, found.pad) == (270, 271, 271)
    assert (
        found.decode(
            [found.bos, *found.encode("a red circle"), 272, found.eoc, found.eos, found.pad]
        )
        == "a red circle"
    )
    found.save(tmp_path / "..")
    again = Tokenizer.load(tmp_path / ".." / "tokenizer.json")
    assert (
        again.fingerprint
        == found.fingerprint
        != JSONTokenizer(content, specials | {"bos_token": "<|im_start|>"}).fingerprint
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|nothing|>"}))
    with pytest.raises(UserError, match="has no token '<|nothing|>'"):
        Tokenizer.load(tmp_path)


def test_a_padded_vocabulary(tmp_path, tokenizer):
    content, specials = JSONS["bytes"]
    JSONTokenizer(content, specials).save(tmp_path)
    found = Tokenizer.load(tmp_path, 320)
    assert (found.pieces, found.vocab_size, found.eoc) == (273, 320, 320)
    never = token_constraints(found).suppressed
    assert set(range(273, 320)) <= set(never) and found.eoc not in never and found.eos not in never
    for size in (272, 500):
        with pytest.raises(UserError, match=f"has 273 pieces, but the language model {size}"):
            Tokenizer.load(tmp_path, size)
    # A folder holds one tokenizer.
    tokenizer.save(tmp_path)
    assert (
        isinstance(Tokenizer.load(tmp_path), SentencePieceTokenizer)
        and len(list(tmp_path.iterdir())) == 1
    )


@pytest.mark.parametrize("named", ["pad_token", "in the file alone"])
def test_a_padding_token_that_the_model_lacks(named, tmp_path):
    """Llama 2 has 32,000 ids, and its tokenizers are often saved with a 32,001st for padding."""
    made = tokenizers.Tokenizer.from_str(metaspace().decode())
    pieces = made.get_vocab_size()
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    if named == "pad_token":
        made.add_special_tokens(["<pad>"])
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(specials))
    found = Tokenizer.load(tmp_path, pieces)
    assert (found.pieces, found.eoc) == (pieces, pieces)
    assert found.pad == found.bos < pieces
    assert found.decode([*found.encode("a red circle"), found.eoc]) == "a red circle"
    found.save(tmp_path / "..")
    again = Tokenizer.load(tmp_path / ".." / "tokenizer.json", pieces)
    assert (again.pad, again.fingerprint) == (found.pad, found.fingerprint)
    # A model that was given an id for it keeps it.
    if named == "pad_token":
        assert Tokenizer.load(tmp_path, pieces + 1).pad == pieces


@pytest.mark.parametrize("none", [False, None, ""])
def test_special_tokens_that_are_none(none, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(JSONS["bytes"][0])
    specials = {"eos_token": "<|im_end|>", "pad_token": none, "bos_token": none}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(specials))
    found = Tokenizer.load(tmp_path)
    assert found.pad == found.bos == found.eos == 270
    for wrong in (7, ["<pad>"], True):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(specials | {"pad_token": wrong}))
        with pytest.raises(UserError, match="pad_token = .*, which is no text"):
            Tokenizer.load(tmp_path)


def test_bad_json_is_refused():
    for content in (b"{", b"[1]", b'{"model": 3}'):
        with pytest.raises(UserError, match=r"no tokenizer\.json that can be read"):
            JSONTokenizer(content, {})
    with pytest.raises(UserError, match="no eos_token"):
        JSONTokenizer(JSONS["bytes"][0], {})
