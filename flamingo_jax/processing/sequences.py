"""Token sequences of interleaved text and visuals, the same in training and inference (paper
2.3, figure 7).

    page:     <BOS>text<EOC><image>text<EOC><image>text<EOC><EOS>
    pair:     <BOS><image>caption<EOC><EOS>
    question: <BOS><image>prompt answer<EOC><EOS>    (targets: " answer<EOC>")

`<EOC>` (end of chunk) is before each image tag, except directly after <BOS>, and at the end of
the document.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from flamingo_jax.processing.tokenizer import Tokenizer

Look = Literal["previous", "next"]


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """The tokens of one document.

    tokens: int32 [n].
    chunk: int32 [n], nondecreasing: 0 before the first image, c from the first token of the
      c-th image tag (from 1) to its <EOC>; <EOS> belongs to the last chunk.
    is_text: bool [n], True for prediction targets: all tokens but <BOS> and the image tags;
      for a question its answer and <EOC> alone.
    """

    tokens: np.ndarray
    chunk: np.ndarray
    is_text: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def page_sequence(
    texts: Sequence[str], tokenizer: Tokenizer, *, close: bool = True
) -> TokenSequence:
    """Tokenises a page of k + 1 texts, with an image tag between each two.

    close: False leaves off the last <EOC><EOS>, for a prompt to be continued.
    """
    return _sequence(
        [tokenizer.encode(text) if text else [] for text in texts], tokenizer, close=close
    )


def pair_sequence(
    caption: str, tokenizer: Tokenizer, *, length: int | None = None
) -> TokenSequence:
    """Tokenises a visual and its caption, truncated so that the whole sequence, with
    <EOC><EOS>, has at most `length` tokens.
    """
    tokens = tokenizer.encode(caption)
    if length is not None:
        tokens = tokens[: max(length - pair_overhead(tokenizer), 0)]
    return _sequence([[], tokens], tokenizer, close=True)


def fill_prompt(prompt: str, question: str) -> str:
    """Fills the question into a prompt at {question}: the text between a visual and its
    answer, which follows after a space.
    """
    return prompt.replace("{question}", question)


def question_sequence(opening: str, answer: str, tokenizer: Tokenizer) -> TokenSequence:
    """Tokenises a visual, a question and its answer.

    Question and answer are tokenised separately, as at inference, where the answer is not
    known: a token across their border would never occur there.

    opening: the text that `fill_prompt` returns.
    """
    before = [*tokenizer.image_tag_ids, *tokenizer.encode(opening)]
    learned = [*tokenizer.encode(f" {answer}"), tokenizer.eoc]
    tokens = [tokenizer.bos, *before, *learned, tokenizer.eos]
    is_text = [False] * (1 + len(before)) + [True] * len(learned) + [False]
    return TokenSequence(
        np.array(tokens, np.int32),
        np.array([0] + [1] * (len(tokens) - 1), np.int32),
        np.array(is_text, bool),
    )


def question_tokens(opening: str, answer: str, tokenizer: Tokenizer) -> np.ndarray:
    """Tokenises a question without its visual, `<BOS>prompt answer<EOS>`, for language
    modelling: int32 [n].
    """
    return np.array(
        [
            tokenizer.bos,
            *tokenizer.encode(opening),
            *tokenizer.encode(f" {answer}"),
            tokenizer.eos,
        ],
        np.int32,
    )


def pair_overhead(tokenizer: Tokenizer) -> int:
    """Counts a pair's tokens besides its caption: <BOS>, the image tag, <EOC> and <EOS>."""
    return 3 + len(tokenizer.image_tag_ids)


def text_tokens(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Tokenises a text without visuals, `<BOS>text<EOS>`, for language modelling and
    contrastive training: int32 [n].
    """
    return np.array([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos], np.int32)


def media_index(chunk: np.ndarray, number_of_visuals: int, look: Look) -> np.ndarray:
    """Computes phi (paper 2.3): the index from 0 of the visual that each token attends to, -1
    for none.

    Args:
      chunk: int32 [n] of a TokenSequence.
      look: "previous" is the last visual before the token; "next" the first one after it
        (chosen with probability p_next in training), none after the last visual.

    Returns: int32 [n].
    """
    index = chunk - 1 if look == "previous" else np.where(chunk < number_of_visuals, chunk, -1)
    return index.astype(np.int32, copy=False)


def _sequence(texts: list[list[int]], tokenizer: Tokenizer, *, close: bool) -> TokenSequence:
    """Joins tokenised texts with <EOC> and image tags between them."""
    tag = tokenizer.image_tag_ids
    tokens = [tokenizer.bos, *texts[0]]
    is_text = [False] + [True] * len(texts[0])
    chunk = [0] * len(tokens)
    for number, text in enumerate(texts[1:], start=1):
        if len(tokens) > 1:  # No <EOC> directly after <BOS>.
            tokens.append(tokenizer.eoc)
            is_text.append(True)
            chunk.append(number - 1)
        tokens += [*tag, *text]
        is_text += [False] * len(tag) + [True] * len(text)
        chunk += [number] * (len(tag) + len(text))
    if close:
        tokens += [tokenizer.eoc, tokenizer.eos]
        is_text += [True, True]
        chunk += [len(texts) - 1] * 2
    return TokenSequence(
        np.array(tokens, np.int32), np.array(chunk, np.int32), np.array(is_text, bool)
    )
