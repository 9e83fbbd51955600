"""Messages over a socket that never blocks."""

import socket

from flamingo_jax.distributed.json_socket import MOST_BYTES, JsonSocket


def pair() -> tuple[JsonSocket, JsonSocket]:
    return tuple(JsonSocket(end) for end in socket.socketpair())  # type: ignore[return-value]


def test_messages_arrive_whole_and_in_order_however_large() -> None:
    one, other = pair()
    large = {"text": "ä\n" * 300_000}
    one.send({"number": 1})
    one.send(large)
    found = []
    while len(found) < 2:
        found += other.receive()
        one.receive()
    assert found == [{"number": 1}, large] and one.open and other.open


def test_what_was_sent_before_the_end_is_still_heard() -> None:
    one, other = pair()
    one.send({"last": True})
    one.close()
    assert other.receive() == [{"last": True}] and not other.open
    other.send({"nobody": "hears"})
    assert not other.open


def test_what_is_no_message_closes_the_line() -> None:
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b'{"a": \xff}\n'):
        raw, ours = socket.socketpair()
        line = JsonSocket(ours)
        raw.sendall(noise)
        assert line.receive() == [] and not line.open
    raw, ours = socket.socketpair()
    line = JsonSocket(ours)
    raw.setblocking(False)
    sent = 0
    while line.open and sent <= 2 * MOST_BYTES:
        try:
            sent += raw.send(b"x" * (1 << 20))
        except BlockingIOError:
            line.receive()
    assert not line.open and sent < 2 * MOST_BYTES
