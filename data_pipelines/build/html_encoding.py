"""The text of an HTML page from its bytes, by the labels and rules that browsers follow.

The order is that of the HTML standard, section 13.2.3.2, with two departures for pages that
come
from a folder rather than with the header of a server, which would have told: bytes beyond ASCII
that are all UTF-8 are UTF-8, whatever single label the page carries (text in another encoding
is practically never that by chance), and a page that claims UTF-8, or nothing, and is mostly
none is windows-1252.
"""

import re

import webencodings

SCANNED = 64 << 10
"""Bytes in which a page may name its encoding. The standard scans 1,024 and lets the parser
start anew at a later <meta>, which most browsers do.
"""
UTF_8, WINDOWS_1252 = webencodings.UTF8, webencodings.lookup("windows-1252")
UTF_16 = ("utf-16le", "utf-16be")
NOT_DECODED = "replacement"
"""What the table calls encodings that browsers do not decode, since they let scripts hide."""
MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16le"), (b"\xfe\xff", "utf-16be"))
STARTS = ((b"<\0", "utf-16le"), (b"\0<", "utf-16be"))
"""How a page begins in two bytes a character without a byte order mark."""

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
    """Decodes a page; what is no text in the page's encoding becomes U+FFFD.

    Raises LookupError for an encoding that browsers do not decode.
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
    if page.isascii():  # ISO-2022-JP writes all that it has in ASCII's bytes.
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
    """Finds the encoding that a page claims: the standard's prescan of a byte stream,
    13.2.3.2.
    """
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
    """By the table of labels. A page whose ASCII could be read to here is not in UTF-16."""
    encoding = webencodings.lookup(label.decode("latin-1"))
    if encoding is not None and encoding.name in UTF_16:
        return UTF_8
    if encoding is not None and encoding.name == "x-user-defined":
        return WINDOWS_1252
    return encoding


def _decoded(page: bytes, encoding: webencodings.Encoding) -> str:
    text: str = encoding.codec_info.decode(page, "replace")[0]
    return text
