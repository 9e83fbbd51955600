"""The server: who may ask, what the browser may fetch, what is left behind."""

import asyncio
import os
import pathlib
import re
import tempfile
from typing import Any

import pytest

import flamingo_jax as fj
from flamingo_jax.playground import server
from tests.launch import commands


def ask(hosts: Any, host: str) -> list[Any]:
    """What a guarded application sends that answers 200 with a policy of its own."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"Content-Security-Policy", b"none"), (b"x-own", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"page"})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"host", host.encode())]}
    asyncio.run(server.guarded(app, hosts)(scope, None, send))
    return sent


def test_only_its_own_names_are_answered_and_nothing_is_fetched_elsewhere() -> None:
    start, body = ask(server.LOOPBACK, "localhost:7860")
    headers = dict(start["headers"])
    policy = headers[b"content-security-policy"].decode()
    assert start["status"] == 200 and headers[b"x-own"] == b"1" and body["body"] == b"page"
    assert "default-src 'self'" in policy and not re.search(r"https?:|\*", policy)
    assert ask(server.LOOPBACK, "evil.example:7860")[0]["status"] == 403
    assert ask(None, "my.host")[0]["status"] == 200


def test_a_taken_port_is_one_sentence() -> None:
    with server.listen("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(fj.UserError, match=rf"--port={port} cannot be used .*another port"):
            server.listen("127.0.0.1", port)
    with pytest.raises(fj.UserError, match="--host=no.such.host.invalid"):
        server.listen("no.such.host.invalid", 0)


def test_all_temporary_files_are_in_one_folder_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("GRADIO_", "HF_HUB_"))]:
        monkeypatch.delenv(name)
    before = dict(os.environ)
    try:
        with server.private_folder() as folder:
            assert os.environ["GRADIO_TEMP_DIR"] == str(folder) == tempfile.gettempdir()
            assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
            (folder / "upload.png").write_text("")
        assert not folder.exists() and pathlib.Path(tempfile.gettempdir()).exists()
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]


def test_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(fj.UserError, match="--model is not set"):
        commands.run("playground")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(fj.UserError, match=r"needs Gradio.*pip install -e '\.\[playground\]'"):
        commands.run("playground", MODEL="runs/export")


def test_the_page_is_built_without_a_request() -> None:
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[playground]'")
    from flamingo_jax.playground.page import make_page
    from flamingo_jax.playground.playground import Playground
    from tests.playground.test_playground import EXAMPLES, FakeModel

    model: Any = FakeModel()
    page = make_page(Playground(model, EXAMPLES, pathlib.Path("/nowhere")), "tiny", "about <it>")
    config = page.get_config_file()
    assert config["analytics_enabled"] is False
    assert "about &lt;it&gt;" in str(config["components"])
    assert {call["api_visibility"] for call in config["dependencies"]} == {"private"}
    one = [fn for fn in page.fns.values() if fn.concurrency_id == "model"]
    assert [fn.queue for fn in one] == [True] and page._queue.default_concurrency_limit == 1
