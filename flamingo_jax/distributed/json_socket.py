"""Sends JSON messages between processes, one per line, over a non-blocking socket."""

import json
import socket
from typing import Any

MOST_BYTES = 16 << 20
"""The largest message; a longer one was not sent by this project and closes the connection."""
Message = dict[str, Any]


class JsonSocket:
    """Sends and receives messages over one end of a connection. `open` becomes False when the
    other end has closed it.
    """

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        self._socket = connection
        self._received, self._unsent = bytearray(), bytearray()
        self.open = True

    def fileno(self) -> int:
        """Returns the file descriptor, so that `selectors` can wait for this socket."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Sends as much as possible without blocking, the rest at the next `send` or
        `receive`.
        """
        self._unsent += json.dumps(message).encode() + b"\n"
        self._flush()

    def receive(self) -> list[Message]:
        """Returns the messages that have arrived completely. Closes the connection if a line
        is not a JSON object."""
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
        # The bytes after the last newline are the beginning of the next message.
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
        """Closes the connection; unsent messages are lost."""
        self.open = False
        self._socket.close()
