"""Messages between processes: JSON objects, one a line, over a socket that never blocks."""

import json
import socket
from typing import Any

MOST_BYTES = 16 << 20
"""Of one message: what is longer is no message of ours."""
Message = dict[str, Any]


class JsonSocket:
    """Sends and receives messages over one end of a connection. `open` is False once the other
    end is gone.
    """

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        self._socket = connection
        self._received, self._unsent = bytearray(), bytearray()
        self.open = True

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Sends as much as goes at once, the rest with the next `send` or `take`."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self._flush()

    def receive(self) -> list[Message]:
        """Returns what has arrived whole. What is no message of ours closes the connection."""
        self._flush()
        while self.open:
            try:
                part = self._socket.recv(1 << 16)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                part = b""
            self.open = bool(part)
            self._received += part
            if len(self._received) > MOST_BYTES:
                self.open = False
        *whole, rest = bytes(self._received).split(b"\n")
        self._received = bytearray(rest)
        try:
            messages = [json.loads(line) for line in whole]
        except ValueError:
            self.open = False
            return []
        if not all(isinstance(message, dict) for message in messages):
            self.open = False
            return []
        return messages

    def _flush(self) -> None:
        while self.open and self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.open = False
                return
            del self._unsent[:sent]

    def close(self) -> None:
        self.open = False
        self._socket.close()
