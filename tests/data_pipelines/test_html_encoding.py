"""Pages are decoded as browsers decode them, to their last byte, in every encoding of the
table.
"""

import time

import bs4
import pytest

from data_pipelines.build.html_encoding import declared, decode
from data_pipelines.build.html_walk import walk
from data_pipelines.build.interleaved import joined

LATIN = "“Grüße”, Señor – naïve €"
SAMPLES = {
    "iso-8859-1": ("cp1252", LATIN),  # The table's: latin-1 is windows-1252, quotes and all.
    "latin1": ("cp1252", LATIN),
    "us-ascii": ("cp1252", LATIN),
    "windows-1252": ("cp1252", LATIN),
    "iso-8859-2": ("iso8859_2", "Zażółć gęślą jaźń"),
    "iso-8859-9": ("cp1254", "İstanbul “çay” ğışö"),
    "iso-8859-15": ("iso8859_15", "œuvre à 5 €"),
    "windows-1251": ("cp1251", "Съешь ещё этих булок"),
    "koi8-r": ("koi8_r", "Съешь ещё этих булок"),
    "koi8-u": ("koi8_u", "Їжак і ґава"),
    "x-mac-cyrillic": ("mac_cyrillic", "Съешь ещё этих булок"),
    "windows-1253": ("cp1253", "Γειά σου Κόσμε"),
    "windows-1255": ("cp1255", "שלום עולם"),
    "windows-1256": ("cp1256", "مرحبا بالعالم"),
    "tis-620": ("cp874", "สวัสดีชาวโลก"),
    "shift_jis": ("cp932", "日本語の①と～"),
    "x-sjis": ("cp932", "日本語の①と～"),
    "euc-jp": ("euc_jp", "日本語のテキスト"),
    "iso-2022-jp": ("iso2022_jp", "日本語のテキスト"),
    "gb2312": ("gbk", "简体中文網頁"),  # The table's: more than the label says.
    "gbk": ("gbk", "简体中文網頁"),
    "gb18030": ("gb18030", "简体中文𠀀"),
    "big5": ("big5hkscs", "繁體中文嘅嘢"),
    "euc-kr": ("cp949", "한국어 텍스트 뷁"),
    "ks_c_5601-1987": ("cp949", "한국어 텍스트 뷁"),
    "utf-8": ("utf-8", LATIN + "日本語"),
    "utf-16": ("utf-8", LATIN),  # Whoever could read this label does not read UTF-16.
    "x-user-defined": ("cp1252", LATIN),
}
META = (
    '<meta charset="{}">',
    "<META HTTP-EQUIV='Content-Type' content='text/html; charset={}'>",
    "<!-- <meta charset=big5> --><script src='<meta charset=big5>'></script><meta charset={} >",
    '<?xml version="1.0" encoding="{}"?>',
    "<title>" + "x" * 2_000 + "</title><meta charset={}>",
)


def page_text(page: bytes) -> str:
    return joined(item for item in walk(page).items if isinstance(item, str))


@pytest.mark.parametrize("label", SAMPLES)
def test_a_page_is_read_in_the_encoding_that_it_names(label: str) -> None:
    codec, text = SAMPLES[label]
    for meta in META:
        page = meta.format(label).encode() + b"<p>" + text.encode(codec) + b"<p>end"
        assert page_text(page) == f"{text}\nend"
        torn = page + b"<p>torn \xff\xff<p>" + text.encode(codec) + b"<p>last"
        found = page_text(torn).split("\n")
        assert found[0] == text and found[-2:] == [text, "last"]


@pytest.mark.parametrize("label", [label for label in SAMPLES if label != "x-user-defined"])
def test_claims_are_found_where_beautiful_soup_finds_them(label: str) -> None:
    for meta in META[:2]:
        page = meta.format(label).encode()
        theirs = bs4.dammit.EncodingDetector.find_declared_encoding(page, is_html=True)
        assert theirs == label and declared(page) is not None


@pytest.mark.parametrize(
    "beginning, name",
    [
        (b"<meta charset=koi8-r charset=big5>", "koi8-r"),
        (b"<meta charset=nonsense><meta charset=koi8-r>", "koi8-r"),
        (b"<meta name=x content='charset=big5'><meta charset=koi8-r>", "koi8-r"),
        (b"<meta http-equiv=refresh content='charset=big5'>", None),
        (b"<meta http-equiv=content-type content='text/html;charset=\"koi8-r\"'>", "koi8-r"),
        (b"<meta http-equiv=content-type content='charset; charset = koi8-r'>", "koi8-r"),
        (b"<meta http-equiv=content-type content='charset=\"koi8-r'>", None),
        (b"<meta http-equiv=content-type content='charset=big5' charset=koi8-r>", "koi8-r"),
        (b"<!--><meta charset=koi8-r>-->", "koi8-r"),
        (b"<!-- <meta charset=koi8-r>", None),
        (b"<metal charset=big5>", None),
        (b"<meta/charset=koi8-r>", "koi8-r"),
        (b"<?php <meta charset=big5> ?><a b='<meta charset=big5>'>", None),
        (b"<p a=b c='d>' e=\">\"><meta charset=koi8-r>", "koi8-r"),
        (b"1 < 2 </ <meta charset=big5><meta charset=koi8-r>", "koi8-r"),
    ],
)
def test_the_prescan_is_the_standard_s(beginning: bytes, name: str | None) -> None:
    found = declared(beginning)
    assert (found and found.name) == name


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_marks_and_two_bytes_a_character_tell_the_encoding(codec: str) -> None:
    text = f"<meta charset=koi8-r><p>{LATIN}"
    page = text.encode(codec)
    assert page_text(page) == LATIN
    if codec == "utf-16-be":
        assert page_text(b"\xfe\xff" + page) == LATIN


def test_text_that_is_utf_8_is_read_as_that_and_most_other_as_windows_1252() -> None:
    assert page_text(b"<meta charset=iso-8859-1>" + LATIN.encode()) == LATIN
    assert page_text(LATIN.encode() + b" \x93") == LATIN + " \ufffd"
    assert page_text(b"<meta charset=utf-8>" + LATIN.encode("cp1252")) == LATIN
    assert page_text(LATIN.encode("cp1252")) == LATIN
    assert page_text("a \ufffd b – c".encode()) == "a \ufffd b – c"


@pytest.mark.parametrize("label", ["iso-2022-kr", "hz-gb-2312", "replacement"])
def test_encodings_that_hide_text_are_not_decoded(label: str) -> None:
    with pytest.raises(LookupError):
        decode(f"<meta charset={label}>x".encode())


@pytest.mark.parametrize("part", [b"<!--", b"<!", b"<meta ", b"<a b='", b'<meta content="', b"<a "])
def test_a_claim_is_looked_for_in_linear_time(part: bytes) -> None:
    began = time.process_time()
    declared(part * ((1 << 20) // len(part)))
    assert time.process_time() - began < 5  # Each to the end would take minutes.
