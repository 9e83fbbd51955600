"""The page, on Gradio: which part shows what, and what a click calls. What it does is in
`playground.py`; this is the only file that names Gradio's components.
"""

import html
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gradio as gr

from flamingo_jax.errors import UserError
from flamingo_jax.playground import fragments, script
from flamingo_jax.playground.playground import (
    DECODINGS,
    AnswerView,
    Playground,
    choice_of,
)
from flamingo_jax.playground.session import Session
from flamingo_jax.playground.uploads import MEGABYTE

WAITING = 32
"""How many clicks may wait in the queue; further ones are refused."""
SESSIONS = 256
"""How many visitors' prompts are kept, the oldest are forgotten."""
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]


def make_page(playground: Playground, title: str, about: str) -> gr.Blocks:
    """Builds the page of a playground.

    Everything that runs the model goes through one queue, one visitor after the other. Edits
    do not wait for it, but for one another; Stop waits for nothing.

    Args:
      title: the model's name. about: a line about it.
    """
    start = playground.start()
    shared: dict[str, Any] = {"apply_default_css": False}
    with gr.Blocks(title=f"{title} · playground", analytics_enabled=False, fill_width=True) as page:
        session = gr.State(start)
        gr.HTML(
            f'<div class="fj-title"><h1>{html.escape(title)}</h1>'
            f"<span>{html.escape(about)}</span></div>",
            **shared,
        )
        with gr.Row():
            with gr.Column(scale=5, min_width=380):
                editor = gr.HTML(
                    fragments.editor(start, playground.examples),
                    js_on_load=script.EDITOR,
                    most=playground.limits.megabytes * MEGABYTE,
                    elem_id="editor",
                    **shared,
                )
                status = gr.HTML(fragments.status(""), elem_id="status", **shared)
                with gr.Accordion("Decoding", open=False, elem_id="decoding"):
                    decoding = _decoding_fields()
                gallery = gr.HTML(
                    fragments.gallery(start, playground.examples),
                    js_on_load=script.GALLERY,
                    elem_id="gallery",
                    **shared,
                )
            with gr.Column(scale=6, min_width=420):
                answer = gr.HTML(
                    fragments.tokens([]), js_on_load=script.ANSWER, elem_id="answer", **shared
                )
                look = gr.HTML("", js_on_load=script.LOOK, elem_id="look", **shared)
        _wire(playground, session, editor, gallery, status, answer, look, decoding)
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    page.state_session_capacity = SESSIONS
    return page


def theme() -> gr.themes.Base:
    """Makes the page's look, with fonts that every machine has."""
    return gr.themes.Soft(font=FONTS, font_mono=["ui-monospace", "monospace"], text_size="md")


def _decoding_fields() -> list[Any]:
    """Makes the fields of `choice_of`, in its order."""
    kind = gr.Radio(list(DECODINGS), value=DECODINGS[0], label="Method", elem_id="method")
    with gr.Row():
        most = gr.Slider(1, 1024, value=32, step=1, label="Most tokens", elem_id="most")
        seed = gr.Number(0, precision=0, label="Seed")
    with gr.Row():
        temperature = gr.Slider(0.05, 2.0, value=1.0, step=0.05, label="Temperature")
        top_p = gr.Slider(0.05, 1.0, value=0.9, step=0.05, label="Top p (nucleus)")
    stop = gr.Textbox("", lines=1, label="Stop at these texts, one a line")
    return [kind, most, temperature, top_p, seed, stop]


def _wire(
    playground: Playground,
    session: gr.State,
    editor: gr.HTML,
    gallery: gr.HTML,
    status: gr.HTML,
    answer: gr.HTML,
    look: gr.HTML,
    decoding: list[Any],
) -> None:
    """Connects the parts' events with the playground."""

    def on_edit(state: Session, event: gr.EventData) -> tuple[str, str, str]:
        data = _data(event)
        said = _write(state, data) or playground.edit(state, str(data.get("what")), data)
        examples = playground.examples
        return fragments.editor(state, examples), fragments.gallery(state, examples), said

    # Gradio finds the event by its annotation among the positional arguments.
    def on_answer(state: Session, event: gr.EventData, *given: Any) -> Iterator[tuple[Any, ...]]:
        try:
            state.write(_texts(_data(event)))
            choice = choice_of(*given)
        except UserError as error:
            yield gr.skip(), gr.skip(), fragments.status(str(error), error=True)
            return
        for view in playground.answer(state, choice):
            yield _updates(view)

    def on_look(state: Session, event: gr.EventData) -> tuple[Any, ...]:
        return _updates(playground.look(state, _data(event)))

    def on_stop(state: Session) -> str:
        return playground.stop(state)

    views, changed = [answer, look, status], [editor, gallery, status]
    # Each kind of click waits its turn, so that a later one is also shown later.
    _listen(editor.edit, on_edit, [session], changed, concurrency_id="edit")
    _listen(gallery.edit, on_edit, [session], changed, concurrency_id="edit")
    _listen(editor.answer, on_answer, [session, *decoding], views, concurrency_id="model")
    _listen(editor.stop, on_stop, [session], [status], queue=False)
    _listen(answer.look, on_look, [session], views, concurrency_id="look")
    _listen(look.look, on_look, [session], views, concurrency_id="look")


def _listen(
    event: Any, call: Callable[..., Any], inputs: list[Any], outputs: list[Any], **options: Any
) -> None:
    event(
        call,
        inputs,
        outputs,
        show_progress="hidden",
        api_visibility="private",
        trigger_mode="multiple",
        **options,
    )


def _updates(view: AnswerView) -> tuple[Any, ...]:
    return tuple(gr.skip() if part is None else part for part in view)


def _data(event: gr.EventData) -> Mapping[str, Any]:
    """Returns what the page sent with an event."""
    return event._data if isinstance(event._data, dict) else {}


def _texts(data: Mapping[str, Any]) -> dict[int, str]:
    """Returns the texts of the prompt as the page sent them, by their index."""
    texts = data.get("texts")
    found = texts.items() if isinstance(texts, dict) else ()
    return {
        int(index): text for index, text in found if str(index).isdigit() and isinstance(text, str)
    }


def _write(state: Session, data: Mapping[str, Any]) -> str:
    """Stores the texts; returns the HTML of the status line where one is refused, else ""."""
    try:
        state.write(_texts(data))
    except UserError as error:
        return fragments.status(str(error), error=True)
    return ""
