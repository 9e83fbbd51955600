"""A real object store on this machine: moto's S3 behind a server that fails now and then."""

import contextlib
import itertools
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest

BUCKET = "models"
Application = Callable[[dict[str, Any], Any], Iterable[bytes]]
FAILURES = (
    ("500 Internal Server Error", "InternalError"),
    ("503 Service Unavailable", "SlowDown"),
)


class ObjectStore(NamedTuple):
    """address: of the folder that a test has there, s3://models/<number>. environment: what a
    process needs to reach it. faults: counts answers, and says how many of them fail.
    """

    address: str
    environment: dict[str, str]
    faults: "Faults"


class Faults:
    """Answers one request in `one_in` with an error of the server, none while that is 0."""

    def __init__(self, application: Application):
        self._application, self._random = application, random.Random(0)
        self._lock = threading.Lock()
        self.one_in = self.requests = self.failed = 0

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        with self._lock:
            self.requests += 1
            fails = bool(self.one_in) and self._random.randrange(self.one_in) == 0
            self.failed += fails
            status, code = self._random.choice(FAILURES)
        if not fails:
            return self._application(environ, start)
        # A connection is used again: what the client sent must be taken off it.
        length = int(environ.get("CONTENT_LENGTH") or 0)
        while length > 0 and (part := environ["wsgi.input"].read(min(length, 1 << 20))):
            length -= len(part)
        body = f"<Error><Code>{code}</Code><Message>not now</Message></Error>".encode()
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]


@contextlib.contextmanager
def serve() -> Iterator[tuple[dict[str, str], Faults]]:
    """Within, S3 answers; tests that ask for it are skipped where `.[bucket,bucket-test]` is not
    installed.
    """
    for package in ("s3fs", "boto3"):
        pytest.importorskip(package)
    server_module = pytest.importorskip("moto.server")
    from werkzeug.serving import make_server

    application = server_module.DomainDispatcherApplication(server_module.create_backend_app)
    faults = Faults(application)
    server = make_server("127.0.0.1", 0, faults, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        yield environment, faults
    finally:
        server.shutdown()
        thread.join()


_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[dict[str, str], Faults]]:
    with serve() as served, pytest.MonkeyPatch.context() as patch:
        for name, value in served[0].items():
            patch.setenv(name, value)
        import boto3

        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield served


@pytest.fixture
def object_store(s3_server: tuple[dict[str, str], Faults]) -> Iterator[ObjectStore]:
    """An empty folder of the store, which answers every request unless a test sets `one_in`."""
    environment, faults = s3_server
    faults.one_in = 0
    yield ObjectStore(f"s3://{BUCKET}/{next(_numbers)}", environment, faults)
    faults.one_in = 0
