"""Resolves an image address on an HTML page to bytes: of a file below the folder, or of a
data: URL.

References to the web, or to files outside the folder, are refused.
"""

import base64
import binascii
import pathlib
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence

from data_pipelines.build.files import MISSING, FileRefused, find, read
from data_pipelines.build.images import UnusableImage

ELSEWHERE = "on another machine"
NO_ADDRESS = "no address"
NO_FILE = "address of no file"
BAD_DATA = "data address that cannot be decoded"
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
"""At least two letters: a single one is a Windows drive."""


def read_address(
    root: pathlib.Path,
    page: pathlib.Path,
    address: str,
    base: str = "",
    given: Sequence[str] = (),
) -> bytes:
    """Reads the image at an address on `page`, a file below `root`.

    base: the page's <base href>. given: other folders that symbolic links may lead to.
    Raises: UnusableImage with the reason.
    """
    address = re.sub(r"[\t\n\r]", "", address).strip()
    if not address:
        raise UnusableImage(NO_ADDRESS)
    if scheme := _scheme(address):
        if scheme == "data":
            return _within(address)
        if scheme != "file":
            raise UnusableImage(ELSEWHERE if scheme in ("http", "https", "ftp", "//") else NO_FILE)
        address = re.sub(r"(?i)^file:(//(localhost)?(?=/))?", "", address)
        return _first(root, [address, urllib.parse.unquote(address)], given)
    here = page.parent.relative_to(root).as_posix()
    return _first(root, dict.fromkeys(_names(address, here, base)), given)


def _scheme(address: str) -> str:
    """Returns a URL's scheme, lower case; "//" if protocol-relative, "" for a path."""
    if address.replace("\\", "/").startswith("//"):
        return "//"
    found = SCHEME.match(address)
    return found[1].lower() if found else ""


def _names(address: str, here: str, base: str) -> Iterator[str]:
    """Yields candidate file names below the folder: relative to the page's base, if that was
    copied too, and to the page; as written, without query, and percent-decoded.
    """
    path = _path(base)
    folder = path[: path.rfind("/") + 1]
    starts = [_joined(here, folder)] if folder else []
    bare = re.split(r"[?#]", address)[0]
    for start in (*starts, here):
        for name in (address, bare, urllib.parse.unquote(bare, errors="surrogateescape")):
            yield _joined(start, name)


def _path(base: str) -> str:
    """Returns the path of a base URL without its host: copies of sites keep their folders."""
    try:
        return urllib.parse.unquote(urllib.parse.urlsplit(base.replace("\\", "/")).path)
    except ValueError:  # No address.
        return ""


def _joined(start: str, name: str) -> str:
    return name.lstrip("/\\") if name.startswith(("/", "\\")) else f"{start}/{name}"


def _first(root: pathlib.Path, names: Iterable[str], given: Sequence[str]) -> bytes:
    reasons = []
    for name in names:
        try:
            return read(find((root,), name, given))
        except FileRefused as error:
            reasons.append(error)
    raise next((reason for reason in reasons if str(reason) != MISSING), reasons[0])


def _within(address: str) -> bytes:
    """Decodes a data: URL (RFC 2397), ignoring whitespace as browsers do; raises UnusableImage."""
    about, comma, held = address[len("data:") :].partition(",")
    data = urllib.parse.unquote_to_bytes(held)
    try:
        if not comma:
            raise ValueError("nothing held")
        if about.replace(" ", "").lower().endswith(";base64"):
            data = re.sub(rb"[\t\n\f\r ]", b"", data).rstrip(b"=")
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (ValueError, binascii.Error) as error:
        raise UnusableImage(BAD_DATA) from error
    return data
