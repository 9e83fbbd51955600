"""Tokenises prompts (lists of text and visuals in any order), and pads them to batches.

The layout is that of web pages in training (processing/sequences.py),
`<BOS>text<EOC><image>text<EOC><image>text`, without an <EOC> at the end.
"""

import dataclasses
import enum
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flamingo_jax.errors import UserError
from flamingo_jax.processing.sequences import media_index
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.processing.visuals import Image, Visual, VisualSource

if TYPE_CHECKING:
    # Importing it takes jax, which a user's mistake must not wait for.
    from flamingo_jax.inference.prefill import Prefix

LENGTH_STEP = 32
"""Prompts are padded to certain multiples of this, so that few shapes are compiled."""


class SpecialToken(enum.Enum):
    """Special tokens that a prompt may contain besides text and visuals."""

    END_OF_CHUNK = "<EOC>"


END_OF_CHUNK = SpecialToken.END_OF_CHUNK
"""An <EOC> where no visual follows, for example between the text-only examples of a zero-shot
prompt. Before a visual it is added automatically.
"""

PromptPart = str | Visual | SpecialToken
Prompt = Sequence[PromptPart]


@dataclasses.dataclass(frozen=True)
class TokenisedPrompt:
    """A prompt as tokens.

    tokens: int32 [n], beginning with <BOS>.
    media_index: int32 [n], which of `visuals` each token attends to, -1 for none.
    prefix: what comes before `tokens` and was read already; None for nothing.
    """

    tokens: np.ndarray
    media_index: np.ndarray
    visuals: list[Visual]
    prefix: "Prefix | None" = None

    @property
    def padded_length(self) -> int:
        """Returns how many slots of a cache the prompt takes in a batch of its own."""
        return bucket_length(len(self.tokens)) + (0 if self.prefix is None else self.prefix.slots)


def fill_image_tags(
    prompt: Sequence[PromptPart | VisualSource], tag: str = Tokenizer.image_tag
) -> list[Any]:
    """Moves a prompt's visuals, in order, to the image tags in its texts.

    Without any tag, visuals stay where they are in the list. A tag after a backslash
    (`escape_image_tags`) is plain text.
    Raises: UserError where tags and visuals differ in number.
    """
    visuals = [part for part in prompt if isinstance(part, (Visual, VisualSource))]
    unescaped = _unescaped(tag)
    tags = count_image_tags(prompt, tag)
    if not tags:
        return list(prompt)
    if tags != len(visuals):
        more, fewer = ("image tags", "images") if tags > len(visuals) else ("images", "image tags")
        raise UserError(
            f"more {more} than {fewer} in a prompt ({tags} {tag}, {len(visuals)} images):"
            f" write one {tag} for each image, or none at all, and \\{tag} where text only"
            " mentions it"
        )
    left = iter(visuals)
    parts: list[Any] = []
    for part in prompt:
        if isinstance(part, SpecialToken):
            parts.append(part)
        elif isinstance(part, str):
            first, *others = unescaped.split(part)
            parts.append(first)
            for text in others:
                parts += [next(left), text]
    return [part for part in parts if part != ""]


def count_image_tags(prompt: Sequence[Any], tag: str = Tokenizer.image_tag) -> int:
    """Counts the image tags in the texts of a prompt."""
    return sum(len(_unescaped(tag).findall(part)) for part in prompt if isinstance(part, str))


def _unescaped(tag: str) -> re.Pattern[str]:
    """Makes the pattern of a tag that no backslash precedes."""
    return re.compile(r"(?<!\\)" + re.escape(tag))


def escape_image_tags(text: str, tag: str = Tokenizer.image_tag) -> str:
    """Escapes image tags in a text, so that they are plain text: for texts from elsewhere,
    such as a dataset's questions.
    """
    return text.replace(tag, f"\\{tag}")


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Encodes a text. An escaped image tag is encoded in two parts, so that it does not become
    the tokenizer's own piece for the tag, which would stand for a visual.
    """
    tag = tokenizer.image_tag
    first, *others = (tokenizer.encode(part) for part in text.split(f"\\{tag}"))
    spelled = [*tokenizer.encode(tag[:1]), *tokenizer.encode(tag[1:])]
    return first + [number for ids in others for number in (*spelled, *ids)]


def tokenise(prompt: Prompt, tokenizer: Tokenizer) -> TokenisedPrompt:
    """Tokenises a prompt. An <EOC> is added before every visual, except directly after <BOS>
    or another <EOC>.
    """
    tokens, chunk = [tokenizer.bos], [0]
    visuals: list[Visual] = []

    def add(ids: Sequence[int]) -> None:
        tokens.extend(ids)
        chunk.extend([len(visuals)] * len(ids))

    # Adjacent texts are joined first: a piece of the tokenizer may span them.
    for part in _joined(fill_image_tags(prompt)):
        if isinstance(part, str):
            add(_encode(part, tokenizer))
        elif isinstance(part, Visual):
            if tokens[-1] not in (tokenizer.bos, tokenizer.eoc):
                add([tokenizer.eoc])
            visuals.append(part)
            add(tokenizer.image_tag_ids)
        else:
            add([tokenizer.eoc])
    index = media_index(np.array(chunk, np.int32), len(visuals), "previous")
    return TokenisedPrompt(np.array(tokens, np.int32), index, visuals)


def _joined(prompt: Prompt) -> list[PromptPart]:
    """Joins adjacent texts of a prompt."""
    parts: list[PromptPart] = []
    for part in prompt:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    return parts


def as_batch(prompt: Any) -> tuple[list[list[Any]], bool]:
    """Normalises a prompt, or a list of prompts, to a list of lists of parts; also returns
    whether it was a list of prompts.

    Raises: UserError for an empty prompt, and for a list that mixes parts and prompts.
    """
    if isinstance(prompt, (str, VisualSource, Visual, SpecialToken)):
        return [[prompt]], False
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)) or not prompt:
        what = "empty" if isinstance(prompt, Sequence) else f"a {type(prompt).__name__}"
        raise UserError(f'a prompt is {what}: give a list such as [fj.Image("a.png"), "Output:"]')
    lists = [isinstance(one, (list, tuple)) for one in prompt]
    if not any(lists):
        return [list(prompt)], False
    if not all(lists):
        raise UserError(
            "a list of prompts holds a part beside whole prompts: give one prompt as a list of"
            " parts, or several as a list of such lists"
        )
    if not all(prompt):
        raise UserError("a prompt of the batch is empty: leave it out")
    return [list(one) for one in prompt], True


def with_images(batch: list[list[Any]], images: Sequence[Any]) -> list[list[Any]]:
    """Appends to each prompt as many of `images` as its texts have image tags."""
    if any(isinstance(part, (VisualSource, Visual)) for parts in batch for part in parts):
        raise UserError(
            "prompts hold images, and images= gives more: give them in the prompts alone, or all"
            " as images= with an <image> for each in the texts"
        )
    given: list[Any] = list(images)
    if given and all(isinstance(some, (list, tuple)) for some in given):
        given = [image for some in given for image in some]
    counts = [count_image_tags(parts) for parts in batch]
    if sum(counts) != len(given):
        raise UserError(
            f"images= has {len(given)} images, but the prompts have {sum(counts)} <image> tags:"
            " give one for each tag"
        )
    left = iter(
        [image if isinstance(image, (VisualSource, Visual)) else Image(image) for image in given]
    )
    return [
        [*parts, *(next(left) for _ in range(count))]
        for parts, count in zip(batch, counts, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """B prompts, right-padded to L tokens, with N slots for visuals.

    tokens, media_index: int32 [B, L].
    lengths: int32 [B], tokens of each prompt.
    visuals: int32 [B, N], indices into `distinct`, -1 for none.
    distinct: the distinct visuals of the batch.
    prefix: what comes before `tokens` in every prompt; None for nothing.
    """

    tokens: np.ndarray
    media_index: np.ndarray
    lengths: np.ndarray
    visuals: np.ndarray
    distinct: list[Visual]
    prefix: "Prefix | None" = None


def collate(
    prompts: Sequence[TokenisedPrompt], *, rows: int, length: int, slots: int, pad_token: int
) -> PromptBatch:
    """Pads prompts to a batch of `rows` rows of `length` tokens and `slots` visuals.

    Rows beyond the prompts repeat the first one: they end generation when it does, and no
    further visual is encoded for them. All prompts have the same prefix.
    """
    tokens = np.full((rows, length), pad_token, np.int32)
    index = np.full((rows, length), -1, np.int32)
    lengths = np.zeros(rows, np.int32)
    visuals = np.full((rows, slots), -1, np.int32)
    number: dict[bytes, int] = {}
    distinct: list[Visual] = []
    for row in range(rows):
        prompt = prompts[row] if row < len(prompts) else prompts[0]
        size = len(prompt.tokens)
        tokens[row, :size], index[row, :size], lengths[row] = (
            prompt.tokens,
            prompt.media_index,
            size,
        )
        for slot, visual in enumerate(prompt.visuals):
            if visual.digest not in number:
                number[visual.digest] = len(distinct)
                distinct.append(visual)
            visuals[row, slot] = number[visual.digest]
    return PromptBatch(tokens, index, lengths, visuals, distinct, prompts[0].prefix)


def common_prefix(prompts: Sequence[TokenisedPrompt]) -> int:
    """Counts the tokens that all prompts begin with, each with the same visual. At least one
    token of every prompt is left.
    """
    first, *others = prompts
    count = min(len(prompt.tokens) for prompt in prompts) - 1
    for prompt in others:
        pairs = zip(first.visuals, prompt.visuals, strict=False)
        alike = [a.digest == b.digest for a, b in pairs] + [False]
        same = (
            (prompt.tokens[:count] == first.tokens[:count])
            & (prompt.media_index[:count] == first.media_index[:count])
            & (first.media_index[:count] < alike.index(False))
        )
        count = int(np.argmin(np.append(same, False)))
    return count


def after_prefix(
    prompt: TokenisedPrompt, count: int, prefix: "Prefix", *, attend_to_media: str
) -> TokenisedPrompt:
    """Cuts the first `count` tokens, which are in `prefix`, from a prompt, and the visuals that
    no token attends to any more.
    """
    index, visuals = prompt.media_index[count:], prompt.visuals
    if attend_to_media == "last" and (unseen := max(int(index.min()), 0)):
        index, visuals = index - unseen, visuals[unseen:]
    return TokenisedPrompt(prompt.tokens[count:], index, visuals, prefix)


def answered_batch(
    prompts: Sequence[TokenisedPrompt],
    answers: Sequence[Sequence[int]],
    *,
    frames: int,
    image_size: int,
    pad_token: int,
) -> dict[str, np.ndarray]:
    """Collates prompts and the token ids of their answers as a batch for
    `tasks.flamingo.FlamingoTask`, whose loss is on the answers alone.

    frames: clips are padded to at least this many frames, which are masked.
    """
    rows, slots = len(prompts), max(len(prompt.visuals) for prompt in prompts)
    lengths = [
        len(prompt.tokens) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    length = bucket_length(max(lengths))
    shown = [len(visual.frames) for prompt in prompts for visual in prompt.visuals]
    frames = 1 if max(shown, default=1) == 1 else max(frames, *shown)
    tokens = np.full((rows, length), pad_token, np.int32)
    index = np.full((rows, length), -1, np.int32)
    segments, loss_mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    visuals = np.full((rows, slots), -1, np.int32)
    images = np.zeros((rows * slots, frames, image_size, image_size, 3), np.uint8)
    frame_mask = np.zeros((rows * slots, frames), bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        first, end = len(prompt.tokens), lengths[row]
        tokens[row, :first], tokens[row, first:end] = prompt.tokens, answer
        index[row, :first], index[row, first:end] = prompt.media_index, prompt.media_index[-1]
        segments[row, :end], loss_mask[row, first:end] = 1, True
        for number, visual in enumerate(prompt.visuals):
            place = visuals[row, number] = row * slots + number
            images[place, : len(visual.frames)] = visual.frames
            frame_mask[place, : len(visual.frames)] = True
    positions = np.where(segments, np.arange(length, dtype=np.int32), 0)
    text = {
        "tokens": tokens,
        "positions": positions,
        "segments": segments,
        "media_index": index,
        "loss_mask": loss_mask,
    }
    if not slots:
        return text
    return text | {"visuals": visuals, "images": images, "frame_mask": frame_mask}


def bucket_length(count: int) -> int:
    """Rounds `count` up to one of 32, 64, 96, 128, 192, 256, 384, ...: few lengths to compile,
    little padding.
    """
    length = LENGTH_STEP * next_power(2, -(-count // LENGTH_STEP))
    return length * 3 // 4 if length >= 4 * LENGTH_STEP and length * 3 // 4 >= count else length


def visual_slots(count: int) -> int:
    """Rounds a number of visuals up to one of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: each further
    shape costs a compilation, an empty slot as much as a visual's cross-attention.
    """
    power = next_power(2, count)
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= count else power


def next_power(base: int, count: int) -> int:
    """Rounds `count` up to a power of `base`; 0 stays 0."""
    power = min(count, 1)
    while power < count:
        power *= base
    return power
