"""Decodes an HTML page's bytes by the rules that browsers follow (HTML standard, 13.2.3.2).

Two rules differ, since a file has no HTTP header with the encoding. A page that is valid UTF-8
with non-ASCII characters is UTF-8 whatever it declares: text in another encoding is
practically never valid UTF-8. A page that declares UTF-8 or nothing, but mostly is not, is
windows-1252.
"""

import re

import webencodings

SCANNED = 64 << 10
"""Bytes that are scanned for a declared encoding. The standard scans 1,024, but lets the
parser start again at a later <meta>.
"""
UTF_8, WINDOWS_1252 = webencodings.UTF8, webencodings.lookup("windows-1252")
UTF_16 = ("utf-16le", "utf-16be")
NOT_DECODED = "replacement"
"""The standard's name for encodings that browsers refuse for security."""
MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16le"), (b"\xfe\xff", "utf-16be"))
STARTS = ((b"<\0", "utf-16le"), (b"\0<", "utf-16be"))
"""The first bytes of a page in UTF-16 without a byte order mark."""

TOKEN = re.compile(
    rb"<!--(?:>|->|.*?(?:-->|\Z))|<(meta)(?=[\t\n\f\r /])|</?[a-z][^\t\n\f\r >]*"
    rb"|<[!/?][^>]*(?:>|\Z)",
    re.DOTALL | re.IGNORECASE,
)
ATTRIBUTE = re.compile(
    rb"[\t\n\f\r /]*([^\t\n\f\r />][^\t\n\f\r />=]*)"
    rb"(?:[\t\n\f\r ]*=[\t\n\f\r ]*(?:\"([^\"]*)\"|'([^']*)'|([^\t\n\f\r >]*)))?"
)
CHARSET = re.compile(
    rb"(?i)charset[\t\n\f\r ]*=[\t\n\f\r ]*(?:\"([^\"]*)\"|'([^']*)'|([^\t\n\f\r ;\"']+))"
)
XML = re.compile(rb"<\?xml[^>]*?\sencoding\s*=\s*(?:\"([^\"]*)\"|'([^']*)')")


def decode(page: bytes) -> str:
    """Decodes a page; bytes that are invalid in its encoding become U+FFFD.

    Raises: LookupError for an encoding that browsers refuse.
    """
    for mark, name in MARKS:
        if page.startswith(mark):
            return _decoded(page[len(mark) :], webencodings.lookup(name))
    for start, name in STARTS:
        if page.startswith(start):
            return _decoded(page, webencodings.lookup(name))
    claimed = declared(page[:SCANNED])
    if claimed is not None and claimed.name == NOT_DECODED:
        raise LookupError("an encoding that is not decoded")
    if page.isascii():  # Not always ASCII: ISO-2022-JP uses 7-bit bytes alone.
        return _decoded(page, claimed or UTF_8)
    text = page.decode("utf-8", "replace")
    damaged = text.count("\ufffd")
    if not damaged or page.count("\ufffd".encode()) == damaged:
        return text
    if claimed is None or claimed.name == "utf-8":
        mostly = 2 * damaged < len(re.findall(r"[^\0-\x7f]", text))
        return text if mostly else _decoded(page, WINDOWS_1252)
    return _decoded(page, claimed)


def declared(beginning: bytes) -> webencodings.Encoding | None:
    """Finds the encoding that a page declares: the standard's prescan of a byte stream."""
    xml = XML.match(beginning)
    if xml and (encoding := _lookup(xml[1] or xml[2] or b"")):
        return encoding
    place = 0
    while token := TOKEN.search(beginning, place):
        place = token.end()
        if token[0][:2] in (b"<!", b"<?") or token[0].endswith(b">"):
            continue
        attributes: dict[bytes, bytes] = {}
        while beginning[place : place + 1] != b">" and (found := ATTRIBUTE.match(beginning, place)):
            value = found[2] or found[3] or found[4] or b""
            attributes.setdefault(found[1].lower(), value)
            place = found.end()
        if token[1] and (encoding := _of_meta(attributes)):
            return encoding
    return None


def _of_meta(attributes: dict[bytes, bytes]) -> webencodings.Encoding | None:
    if b"charset" in attributes:
        return _lookup(attributes[b"charset"])
    found = CHARSET.search(attributes.get(b"content", b""))
    if attributes.get(b"http-equiv", b"").lower() != b"content-type" or not found:
        return None
    return _lookup(found[1] or found[2] or found[3] or b"")


def _lookup(label: bytes) -> webencodings.Encoding | None:
    """Looks up an encoding by its label."""
    encoding = webencodings.lookup(label.decode("latin-1"))
    # The label was found by scanning bytes as ASCII, so the page is not UTF-16.
    if encoding is not None and encoding.name in UTF_16:
        return UTF_8
    if encoding is not None and encoding.name == "x-user-defined":
        return WINDOWS_1252
    return encoding


def _decoded(page: bytes, encoding: webencodings.Encoding) -> str:
    text: str = encoding.codec_info.decode(page, "replace")[0]
    return text
