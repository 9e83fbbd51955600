"""A supervisor shows that it lives, whatever the storage does."""

import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from flamingo_jax.distributed import supervisor
from flamingo_jax.distributed.coordinator import Timeouts
from flamingo_jax.distributed.json_socket import JsonSocket, Message
from flamingo_jax.distributed.process_info import ProcessInfo
from flamingo_jax.errors import EXIT_LOST


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts back what a supervisor does with signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_storage_that_does_not_answer_leaves_it_heard(
    handlers: None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = threading.Event(), threading.Event()

    def stuck(*_: object) -> str:
        asked.set()
        answer.wait()
        return ""

    monkeypatch.setattr(supervisor, "_check_storage", stuck)
    monkeypatch.setattr(supervisor, "HEARTBEAT_EVERY", 0.05)
    heard: list[tuple[bool, Message]] = []
    with socket.create_server(("localhost", 0)) as server:

        def desk() -> None:
            line = JsonSocket(server.accept()[0])
            line.send({"check_storage": "write"})
            asked.wait(10)
            for seconds in (0.5, 0.5):
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    heard.extend((answer.is_set(), message) for message in line.receive())
                    time.sleep(0.01)
                answer.set()
            line.close()

        thread = threading.Thread(target=desk)
        thread.start()
        process_info = ProcessInfo(1, 2, f"localhost:{server.getsockname()[1] - 1}")
        sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
        code = supervisor.supervise(
            process_info, Timeouts(start=30, lost=20, step=30), sleeps, tmp_path
        )
        thread.join()
    assert code == EXIT_LOST
    assert sum("heartbeat" in message for answered, message in heard if not answered) >= 3
    probed = [(answered, message) for answered, message in heard if "storage_checked" in message]
    assert probed == [(True, {"storage_checked": "write", "problem": ""})]
