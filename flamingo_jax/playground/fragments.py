"""The HTML of the page's parts; all text is escaped. `script.py` has what a click does."""

import html
import math
from collections.abc import Iterable, Sequence

import numpy as np

from flamingo_jax.inference.attention_maps import EOC, EOS, AttentionMaps, TokenProbability
from flamingo_jax.playground.heat_map import enlarge, overlay
from flamingo_jax.playground.session import Example, Part, Session
from flamingo_jax.processing.visuals import Visual
from flamingo_jax.web_page import strip

THUMBNAIL, SMALL, LARGE = 72, 56, 232
"""Heights of images in pixels: in the prompt, below a token, and of the heat map."""
MOST_SMALL = 48
"""The most tokens that get a heat map each below them."""
SHOT_COUNTS = (0, 2, 4, 8)
ENDS = {EOC: "end of the answer", EOS: "end of the document"}
"""Special tokens that may be predicted -> how they are called on the page."""


def editor(session: Session, examples: Sequence[Example]) -> str:
    """Writes the prompt as cards to edit, with the buttons that add to it and answer it."""
    shots = "".join(_shot(index, examples[index]) for index in session.shots)
    parts = "".join(_part(index, part) for index, part in enumerate(session.parts))
    above = f'<div class="fj-label">Shots</div><div class="fj-row">{shots}</div>' if shots else ""
    return (
        f'<div class="fj-editor" data-version="{session.version}">{above}'
        f'<div class="fj-label">Prompt</div><div class="fj-parts">{parts}</div>'
        '<div class="fj-row fj-tools">'
        '<button data-do="text">+ Text</button>'
        '<label class="fj-button">+ Image or clip<input type="file" multiple data-files'
        ' accept="image/*,video/*"></label>'
        '<button data-do="clear">Clear</button><span class="fj-grow"></span>'
        '<button data-do="stop">Stop</button>'
        '<button data-do="answer" class="fj-primary">Answer</button></div></div>'
    )


def gallery(session: Session, examples: Sequence[Example]) -> str:
    """Writes the examples as cards: ask about one, or show it as a shot."""
    if not examples:
        return ""
    counts = "".join(
        f'<button data-do="shots" data-index="{count}">{count}</button>'
        for count in SHOT_COUNTS
        if count < len(examples)
    )
    cards = "".join(
        f'<figure class="fj-card{" fj-on" if index in session.shots else ""}">'
        f"{_pictures(example.parts)}"
        f"<figcaption>{html.escape(_words(example.shot))}</figcaption>"
        f'<div class="fj-row"><button data-do="ask" data-index="{index}">Ask</button>'
        f'<button data-do="shot" data-index="{index}">'
        f"{'Shown' if index in session.shots else 'Shot'}</button></div></figure>"
        for index, example in enumerate(examples)
    )
    return (
        f'<div class="fj-gallery"><div class="fj-row fj-tools"><span class="fj-label">Shots drawn'
        f' at random</span>{counts}</div><div class="fj-cards">{cards}</div></div>'
    )


def tokens(
    texts: Sequence[tuple[str, float]],
    *,
    maps: AttentionMaps | None = None,
    chosen: int | None = None,
    running: bool = False,
    truth: str = "",
) -> str:
    """Writes an answer as its tokens, each the darker the likelier it was.

    Args:
      texts: (text, log-probability) of each token.
      maps: draws a small heat map below each token; None while the answer is written.
      chosen: the token that is looked at.
      running: a cursor follows.
      truth: the known answer, "" for none.
    """
    small = _small_maps(maps) if maps is not None else [""] * len(texts)
    found = "".join(
        _token(index, text, value, below, index == chosen, maps is not None)
        for index, ((text, value), below) in enumerate(zip(texts, small, strict=True))
    )
    cursor = '<span class="fj-cursor"></span>' if running else ""
    known = (
        f'<div class="fj-truth">The example says: <b>{html.escape(truth.strip())}</b></div>'
        if truth.strip()
        else ""
    )
    hint = (
        '<div class="fj-hint">Click a token to see what it looked at.</div>'
        if maps is not None
        else ""
    )
    return (
        f'<div class="fj-label">Answer</div><div class="fj-answer" data-done="{int(not running)}">'
        f"{found}{cursor}{known}{hint}</div>"
    )


def look(maps: AttentionMaps, token: int, block: int | None) -> str:
    """Writes what a token looked at: the visual that phi names as a heat map, frame by frame,
    the visuals of the prompt, and the likeliest tokens at this place.
    """
    seen = maps.tokens[token]
    name = f"<b>{html.escape(_visible(seen.text))}</b>"
    phi = int(maps.media_index[token])
    head = f"{name}, probability {percent(seen.log_probability)}, "
    if phi < 0:
        head += "attends to no image: there is none before it."
    else:
        head += f"reads {_kind(maps.visuals[phi])} {phi + 1} of {len(maps.visuals)} (phi)."
    body = _heat(maps, token, phi, block) if phi >= 0 else ""
    return (
        f'<div class="fj-look" data-token="{token}"><div class="fj-head">{head}</div>{body}'
        f'<div class="fj-columns">{_alternatives(maps, token)}{_visuals(maps, token, phi, block)}'
        "</div></div>"
    )


def status(text: str, *, error: bool = False) -> str:
    """Writes the line that says what happens, or what is wrong."""
    role = 'class="fj-status fj-error" role="alert"' if error else 'class="fj-status" role="status"'
    return f"<div {role}>{html.escape(text)}</div>"


def percent(log_probability: float) -> str:
    """Formats a probability."""
    share = 100 * math.exp(log_probability)
    return f"{share:.0f} %" if share >= 9.5 else f"{share:.1f} %" if share >= 0.05 else "< 0.1 %"


def _shot(index: int, example: Example) -> str:
    return (
        f'<div class="fj-shot">{_pictures(example.parts)}<span>{html.escape(_words(example.shot))}'
        f'</span><button data-do="shot" data-index="{index}" title="Remove">✕</button></div>'
    )


def _part(index: int, part: Part) -> str:
    if isinstance(part, Visual):
        what = _kind(part) + (f", {len(part.frames)} frames" if len(part.frames) > 1 else "")
        inner = f'{_picture(part, THUMBNAIL)}<span class="fj-what">{what}</span>'
    else:
        # The value is an attribute too, which tells the page that the text was replaced.
        shown = html.escape(part)
        inner = (
            f'<textarea data-part="{index}" rows="{_rows(part)}"'
            f' placeholder="Text, such as Output:" value="{shown}">{shown}</textarea>'
        )
    return (
        f'<div class="fj-part">{inner}<span class="fj-moves">'
        f'<button data-do="up" data-index="{index}" title="Up">↑</button>'
        f'<button data-do="down" data-index="{index}" title="Down">↓</button>'
        f'<button data-do="remove" data-index="{index}" title="Remove">✕</button></span></div>'
    )


def _rows(text: str) -> int:
    """Counts the rows of a text's field: a long text scrolls."""
    return min(sum(1 + len(line) // 60 for line in text.split("\n")), 8)


def _pictures(parts: Iterable[Part]) -> str:
    visuals = [part for part in parts if isinstance(part, Visual)]
    return "".join(_picture(visual, THUMBNAIL) for visual in visuals[:4])


def _picture(visual: Visual, height: int) -> str:
    return f'<img alt="{_kind(visual)}" src="{strip(visual.frames, height)}">'


def _kind(visual: Visual) -> str:
    return "image" if len(visual.frames) == 1 else "clip"


def _words(parts: Iterable[Part]) -> str:
    return " ".join(part.strip() for part in parts if isinstance(part, str))


def _token(index: int, text: str, value: float, below: str, chosen: bool, clickable: bool) -> str:
    share = math.exp(value)
    does = f' data-do="token" data-index="{index}"' if clickable else " disabled"
    return (
        f'<button class="fj-token{" fj-on" if chosen else ""}"{does} title="{percent(value)}">'
        f'<span style="--share:{share:.3f}">{html.escape(_line(text))}</span>{below}</button>'
    )


def _line(text: str) -> str:
    """Shows a token's line ends, and that a token has no text of its own."""
    return text.replace("\n", "⏎").replace("\t", "⇥") or "∅"


def _visible(text: str) -> str:
    """Shows a token's spaces too, which tell it from others."""
    return _line(text).replace(" ", "␣")


def _small_maps(maps: AttentionMaps) -> list[str]:
    """Draws a small heat map for each token, of the frame that it looked at most."""
    found = []
    for token in range(len(maps.tokens)):
        phi = int(maps.media_index[token])
        if phi < 0 or len(maps.tokens) > MOST_SMALL:
            found.append("")
            continue
        heat = maps.heat(token, phi)
        frame = int(np.argmax(heat.sum((1, 2))))
        drawn = overlay(maps.visuals[phi].frames[frame], heat[frame], heat.max(), SMALL)
        found.append(f'<img alt="" src="{strip([drawn], SMALL)}">')
    return found


def _heat(maps: AttentionMaps, token: int, phi: int, block: int | None) -> str:
    heat, visual = maps.heat(token, phi, block), maps.visuals[phi]
    total, side = float(heat.sum()), LARGE if len(heat) == 1 else LARGE // 2
    figures = [
        f'<figure><img alt="frame {number + 1}" src="{strip([enlarge(frame, side)], side)}">'
        f'<img alt="where the token looked" src="'
        f'{strip([overlay(frame, each, heat.max(), side)], side)}">'
        f"<figcaption>{_frame_caption(heat, number, total)}</figcaption></figure>"
        for number, (frame, each) in enumerate(zip(visual.frames, heat, strict=True))
    ]
    selected = 0 if block is None else block + 1
    choices = "".join(
        f'<option value="{value}"{" selected" if value == selected else ""}>'
        f"{f'block {value} of {maps.blocks}' if value else 'mean of all blocks'}</option>"
        for value in range(maps.blocks + 1)
    )
    return (
        '<label class="fj-block">Cross-attention <select data-block>'
        f'{choices}</select></label><div class="fj-heat">{"".join(figures)}</div>'
    )


def _frame_caption(heat: np.ndarray, number: int, total: float) -> str:
    """Says how much of the token's attention went to a frame, or to an image's brightest cell."""
    if len(heat) > 1:
        share = float(heat[number].sum()) / max(total, 1e-12)
        return f"frame {number + 1}: {100 * share:.0f} %"
    cells = heat[0].size
    most = float(heat.max()) / max(total, 1e-12)
    return f"brightest of {cells} cells: {100 * most:.0f} % (even: {100 / cells:.1f} %)"


def _alternatives(maps: AttentionMaps, token: int) -> str:
    chosen = maps.tokens[token].token
    rows = "".join(_alternative(other, other.token == chosen) for other in maps.alternatives[token])
    return (
        '<div class="fj-alternatives"><div class="fj-label">What could have been here</div>'
        f"<table>{rows}</table></div>"
    )


def _alternative(other: TokenProbability, chosen: bool) -> str:
    text = ENDS.get(other.text) or _visible(other.text)
    width = 100 * math.exp(other.log_probability)
    return (
        f"<tr{' class=fj-on' if chosen else ''}><td>{html.escape(text)}</td>"
        f'<td><span class="fj-bar" style="width:{width:.1f}%"></span></td>'
        f"<td>{percent(other.log_probability)}</td></tr>"
    )


def _visuals(maps: AttentionMaps, token: int, phi: int, block: int | None) -> str:
    if len(maps.visuals) < 2:
        return ""
    shares = maps.shares(token, block)
    cards = "".join(
        f'<figure class="fj-card{" fj-on" if index == phi else ""}">{_picture(visual, SMALL)}'
        f"<figcaption>{index + 1}: {100 * shares[index]:.0f} %</figcaption></figure>"
        for index, visual in enumerate(maps.visuals)
    )
    return (
        '<div class="fj-visuals"><div class="fj-label">The prompt\'s images, and their share of'
        f' the attention</div><div class="fj-row">{cards}</div></div>'
    )
