"""What of a video file is read: the film in it, past damage, upright, and no other file."""

import itertools
import json
import pathlib
import struct
from fractions import Fraction

import av
import av.stream
import numpy as np
import pytest

from flamingo_jax.processing.video import GAP, VideoError, read_video
from flamingo_jax.processing.video_file import (
    BROKEN,
    DAMAGED,
    FOREIGN,
    NO_MOVING_IMAGES,
    UNREADABLE,
)
from tests.processing.films import (
    BLUE,
    GREEN,
    GREY,
    RED,
    SIZE,
    levels,
    quarters,
    write,
    write_two,
)


@pytest.mark.parametrize("cover", [False, True])
@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
def test_the_film_is_read_not_the_still_before_it(tmp_path: pathlib.Path, ending: str, cover: bool):
    path = tmp_path / f"a.{ending}"
    write_two(path, np.full((320, 320, 3), 250, np.uint8), [20] * 10 + [100] * 10, cover=cover)
    frames = read_video(path, fps=1).frames
    np.testing.assert_allclose(levels(frames), [20, 100], atol=6)
    assert frames[0].shape == (64, 96, 3)


def test_a_cover_alone_is_no_film(tmp_path: pathlib.Path):
    write_two(tmp_path / "a.mkv", quarters(), [20] * 3, cover=True)
    with av.open(str(tmp_path / "a.mkv")) as given, av.open(str(tmp_path / "b.mp4"), "w") as made:
        stream = made.add_stream_from_template(given.streams[0])
        stream.disposition = av.stream.Disposition.attached_pic.value
        for packet in given.demux(given.streams[0]):
            if packet.dts is not None:
                packet.stream = stream
                made.mux(packet)
    with pytest.raises(VideoError, match="no moving images") as caught:
        read_video(tmp_path / "b.mp4", fps=1)
    assert caught.value.reason == NO_MOVING_IMAGES


def noise(count: int) -> list[np.ndarray]:
    """Frames that take many bytes, all of one level."""
    drawn = np.random.default_rng(0)
    return [drawn.integers(60, 140, (*SIZE, 3), np.uint8) for _ in range(count)]


@pytest.mark.parametrize(
    "ending, codec", [("mp4", "mpeg4"), ("mkv", "mpeg4"), ("avi", "mpeg4"), ("flv", "flv")]
)
def test_a_film_goes_on_after_what_is_damaged(tmp_path: pathlib.Path, ending: str, codec: str):
    path = tmp_path / f"a.{ending}"
    write(path, noise(60), rate=10, codec=codec)
    whole = path.read_bytes()
    assert read_video(path, fps=1).lost == ()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(2_000) + whole[middle + 2_000 :])
    hurt = read_video(path, fps=1)
    # Which of both it is, is up to FFmpeg: whether it passes over packets without a word.
    assert len(hurt.frames) == 6 and hurt.lost and set(hurt.lost) <= {DAMAGED, GAP}
    path.write_bytes(whole[:middle])
    if ending != "mp4":  # Whose table of contents is at its end.
        cut = read_video(path, fps=1)
        assert 0 < len(cut.frames) < 6 and {DAMAGED, BROKEN} & set(cut.lost)


def test_frames_that_lack_leave_a_gap_that_is_told(tmp_path: pathlib.Path):
    """FFmpeg finds its way in damaged Matroska files again without a word."""
    path = tmp_path / "a.mkv"
    write(
        path,
        noise(60),
        rate=10,
        codec="mpeg4",
        stamp=lambda number: number + 12 * (number > 30),
    )
    film = read_video(path, fps=1)
    assert len(film.frames) == 8 and film.lost == (GAP,)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
def test_a_film_that_begins_late_is_whole(tmp_path: pathlib.Path, ending: str):
    """Some headers count its length from the first frame, some from the start of the clock."""
    write(tmp_path / f"a.{ending}", [20] * 30, rate=10, codec="mpeg4", stamp=lambda i: i + 100)
    film = read_video(tmp_path / f"a.{ending}", fps=1)
    assert len(film.frames) == 3 and film.lost == ()


FIXED = 1 << 16
CORNERS = (RED, GREEN, BLUE, GREY)
MATRICES = [
    (a, b, c, d)
    for a, b, c, d in itertools.product((-1, 0, 1), repeat=4)
    if abs(a * d - b * c) == 1 and abs(a) + abs(b) == 1 and abs(c) + abs(d) == 1
]


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_frames_are_turned_and_mirrored_as_the_file_says(tmp_path: pathlib.Path, matrix):
    """Each corner is where the matrix's own equations bring it: x' = a x + c y, y' = b x + d y."""
    a, b, c, d = matrix
    whole = [a * FIXED, b * FIXED, 0, c * FIXED, d * FIXED, 0, 0, 0, 1 << 30]
    write(tmp_path / "a.mp4", [quarters()], rate=1, matrix=whole)
    (frame,) = read_video(tmp_path / "a.mp4", fps=1).frames
    height, width = frame.shape[:2]
    assert (height, width) == (SIZE if a else SIZE[::-1])
    for (x, y), colour in zip(((-1, -1), (1, -1), (-1, 1), (1, 1)), CORNERS, strict=True):
        right, low = a * x + c * y > 0, b * x + d * y > 0
        shown = frame[height - 9 if low else 8, width - 9 if right else 8]
        np.testing.assert_allclose(shown.astype(int), colour, atol=12)


@pytest.mark.parametrize(
    "aspect, shape", [("2/1", (64, 192)), ("4/3", (64, 128)), ("1/2", (128, 96))]
)
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_pixels_become_square(tmp_path: pathlib.Path, ending: str, aspect: str, shape):
    write(tmp_path / f"a.{ending}", [quarters()], rate=1, aspect=Fraction(aspect))
    (frame,) = read_video(tmp_path / f"a.{ending}", fps=1).frames
    assert frame.shape[:2] == shape
    middle = (shape[0] // 2, shape[1] // 2)
    places = [(y, x) for y in (8, middle[0] + 8) for x in (8, middle[1] + 8)]
    np.testing.assert_allclose([frame[place].astype(int) for place in places], CORNERS, atol=12)


def test_square_pixels_of_a_turned_film(tmp_path: pathlib.Path):
    """The aspect is that of the pixels before they are turned."""
    turned = [0, FIXED, 0, -FIXED, 0, 0, 0, 0, 1 << 30]
    write(tmp_path / "a.mp4", [quarters()], rate=1, aspect=Fraction(2), matrix=turned)
    assert read_video(tmp_path / "a.mp4", fps=1).frames[0].shape == (192, 64, 3)
    with pytest.raises(VideoError, match="more than"):
        read_video(tmp_path / "a.mp4", fps=1, max_pixels=96 * 64 - 1)
    (small,) = read_video(tmp_path / "a.mp4", fps=1, max_pixels=96 * 64).frames
    assert small.shape == (96, 32, 3)


def playlists(film: pathlib.Path) -> dict[str, str]:
    """Descriptions of each sort that lead FFmpeg to another file."""
    url = film.resolve().as_uri()
    dash = f"""<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"
        profiles="urn:mpeg:dash:profile:isoff-main:2011" mediaPresentationDuration="PT2S"><Period>
        <AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">
        <BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>"""
    return {
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{url}\n#EXT-X-ENDLIST\n",
        "hidden.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{film}\n#EXT-X-ENDLIST\n",
        "a.ffconcat": f"ffconcat version 1.0\nfile '{film.name}'\n",
        "absolute.ffconcat": f"ffconcat version 1.0\nfile '{url}'\n",
        "a.mpd": dash,
        "a.sdp": (
            "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
            "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
        ),
        "a.asx": f'<asx version="3.0"><entry><ref href="{url}"/></entry></asx>',
        "a.json": json.dumps({"video": str(film)}),
    }


def test_no_file_but_its_own_is_read_for_a_video(tmp_path: pathlib.Path, monkeypatch):
    film = tmp_path / "film.mp4"
    write(film, [20] * 4, rate=2)
    assert len(read_video(film, fps=1).frames) == 2
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / film.name).write_bytes(film.read_bytes())
    monkeypatch.chdir(tmp_path / "lists")
    for name, text in playlists(film).items():
        (tmp_path / "lists" / name).write_text(text)
        with pytest.raises(VideoError, match=name) as caught:
            read_video(tmp_path / "lists" / name, fps=1)
        assert caught.value.reason in (FOREIGN, UNREADABLE)
    for name in ("a.m3u8", "a.ffconcat", "a.sdp"):
        with pytest.raises(VideoError) as caught:
            read_video(name, fps=1)
        assert caught.value.reason == FOREIGN
    for name in (
        "concat:film.mp4|film.mp4",
        "file:film.mp4",
        "subfile,,start,0,end,0,,:film.mp4",
    ):
        with pytest.raises(VideoError):
            read_video(name, fps=1)


BOXES = (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref")


def referring(data: bytes, path: str) -> bytes:
    """A .mov whose frames lie in the file of that absolute path: the data reference that said
    "in this file" is a Macintosh alias instead, and the frames are taken out."""
    path = path.encode()
    path += bytes(len(path) % 2)
    alias = (
        bytes(4) + bytes(10) + bytes(28) + bytes(12) + bytes(64) + bytes(16) + bytes(4) + bytes(16)
    )
    alias += struct.pack(">HH", 2, len(path)) + path + struct.pack(">HH", 0xFFFF, 0)
    entry = struct.pack(">I", len(alias) + 8) + b"alis" + alias
    moov = data.index(b"moov")
    place = data.index(b"dref", moov) + 12
    (old,) = struct.unpack_from(">I", data, place)
    made = bytearray(data[:place] + entry + data[place + old :])
    for box in BOXES:
        start = data.index(box, moov) - 4
        (size,) = struct.unpack_from(">I", made, start)
        struct.pack_into(">I", made, start, size + len(entry) - old)
    first = made.index(b"mdat") + 4
    made[first : moov - 4] = bytes(moov - 4 - first)
    return bytes(made)


def test_a_mov_that_names_another_file_is_not_followed(tmp_path: pathlib.Path):
    secret = tmp_path / "elsewhere" / "secret.mov"
    write(secret, [200] * 4, rate=2, codec="mpeg4")
    path = tmp_path / "named.mov"
    path.write_bytes(referring(secret.read_bytes(), str(secret)))
    options = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(str(path), container_options=options) as container:  # A reader that does follow.
        assert next(container.decode(video=0)).to_ndarray(format="rgb24").mean() > 150
    with pytest.raises(VideoError) as caught:
        read_video(path, fps=1)
    assert caught.value.reason == UNREADABLE
