"""Text survives the tokenizer exactly, and its specials stay out of it."""

import io

import pytest
import sentencepiece

from flamingo_jax.errors import UserError
from flamingo_jax.processing.tokenizer import SentencePieceTokenizer, Tokenizer


def train(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle at the top left", "Question: what colour? Answer: blue"] * 20),
        model_writer=model, vocab_size=320, hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity",
        minloglevel=2, **{"pad_id": 3, "user_defined_symbols": ["<image>"], **options},
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return SentencePieceTokenizer(train())


@pytest.mark.parametrize(
    "text", ["a red circle", " a red circle", "two  spaces, an end ", "one\nline\tand more\n", "naïve 光 🙂", "x<image>y", ""]
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
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eoc, tokenizer.eos, tokenizer.pad, tokenizer.eoc + 1]) == "a red circle"
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
    assert SentencePieceTokenizer(train(user_defined_symbols=[])).fingerprint != tokenizer.fingerprint


def test_bad_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no SentencePiece model"):
        SentencePieceTokenizer(b"hello, this is no model")
    with pytest.raises(UserError, match="<BOS>"):
        SentencePieceTokenizer(train(bos_id=-1))
