"""Token sequences of text with visuals in it, the same for training and for prompts (paper 2.3,
figure 7).

Page: `<BOS>text<EOC><image>text<EOC><image>text<EOC><EOS>`; pair:
`<BOS><image>caption<EOC><EOS>`; question: `<BOS><image>prompt answer<EOC><EOS>`, of which `
answer<EOC>` is learned. `<EOC>` closes a chunk: it stands before every image tag, except
directly after <BOS>, and at the end of the document.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from flamingo_jax.processing.tokenizer import Tokenizer

Look = Literal["previous", "next"]


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """Tokens of one document.

    tokens: int32 [n].
    chunk: int32 [n], never falling: 0 before the first image, c from the first token of image
      c's tag (counted from 1) to its <EOC>; <EOS> belongs to the last chunk.
    is_text: bool [n], what a model learns to predict: all but <BOS> and the image tags; of a
      question its answer and <EOC> alone.
    """

    tokens: np.ndarray
    chunk: np.ndarray
    is_text: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def page_sequence(
    texts: Sequence[str], tokenizer: Tokenizer, *, close: bool = True
) -> TokenSequence:
    """Tokenises k + 1 texts around k visuals.

    `close=False` leaves off the last <EOC><EOS>: a prompt to be continued.
    """
    return _sequence(
        [tokenizer.encode(text) if text else [] for text in texts], tokenizer, close=close
    )


def pair_sequence(
    caption: str, tokenizer: Tokenizer, *, length: int | None = None
) -> TokenSequence:
    """Tokenises a visual and its caption; a caption too long for `length` tokens in all loses
    its end, never its <EOC><EOS>.
    """
    tokens = tokenizer.encode(caption)
    if length is not None:
        tokens = tokens[: max(length - pair_overhead(tokenizer), 0)]
    return _sequence([[], tokens], tokenizer, close=True)


def fill_prompt(prompt: str, question: str) -> str:
    """Writes what stands between a visual and the answer: `prompt` with the question at
    {question}.

    The answer follows after a space.
    """
    return prompt.replace("{question}", question)


def question_sequence(opening: str, answer: str, tokenizer: Tokenizer) -> TokenSequence:
    """Tokenises a visual, what `fill_prompt` makes of its question and the answer.

    The two are tokenised apart, since at inference the answer is yet to come.
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
    """Tokenises `<BOS>prompt answer<EOS>`, the same in the language modelling stage, where
    there is no
    visual: int32 [n].
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
    """Counts the tokens of a pair that are not its caption: <BOS>, the image tag, <EOC> and
    <EOS>.
    """
    return 3 + len(tokenizer.image_tag_ids)


def text_tokens(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Tokenises `<BOS>text<EOS>` of a document with no visuals, for the language modelling and
    the contrastive stage: int32 [n].
    """
    return np.array([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos], np.int32)


def media_index(chunk: np.ndarray, number_of_visuals: int, look: Look) -> np.ndarray:
    """Computes phi: which visual each token looks at, as its place from 0, or -1 for none;
    int32, shaped like `chunk`.

    "previous" is the last visual before the token; "next" the first after it (paper's p_next),
    none past the last visual.
    """
    index = chunk - 1 if look == "previous" else np.where(chunk < number_of_visuals, chunk, -1)
    return index.astype(np.int32, copy=False)


def _sequence(texts: list[list[int]], tokenizer: Tokenizer, *, close: bool) -> TokenSequence:
    tag = tokenizer.image_tag_ids
    tokens = [tokenizer.bos, *texts[0]]
    is_text = [False] + [True] * len(texts[0])
    chunk = [0] * len(tokens)
    for number, text in enumerate(texts[1:], start=1):
        if len(tokens) > 1:
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
