"""A part of a video has the frames of the whole one, but is read from its nearest key frame on."""

import itertools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flamingo_jax.errors import UserError
from flamingo_jax.processing import video
from flamingo_jax.processing.video import middle_clip, read_frames, read_middle
from flamingo_jax.processing.video_index import index_frames
from flamingo_jax.processing.visuals import Video
from tests.inference.tiny_models import tiny_config
from tests.processing.films import write

RATE, FRAMES = 10, 120
MOVING = [
    np.roll(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8), 2 * n, axis=1)
    for n in range(FRAMES)
]


def slides(number: int) -> int:
    return number + 3 * (number // 10)


def jump(number: int) -> int:
    return number + (400 if number >= 40 else 0)


FILMS: dict[str, dict[str, Any]] = {
    "b_frames.mp4": {"options": {"g": "12", "bf": "3", "sc_threshold": "0"}},
    "one_gop.mp4": {"options": {"g": "1000", "sc_threshold": "0"}},
    "open_gops.mkv": {"options": {"g": "15", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}},
    "varying.mkv": {"options": {"g": "12", "sc_threshold": "0"}, "stamp": slides},
    "jump.mkv": {"options": {"g": "12", "bf": "0"}, "stamp": jump},
    "late.mp4": {"options": {"g": "12", "bf": "2"}, "stamp": lambda number: number + 77},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "10"}},
    "stream.ts": {"form": "mpegts", "options": {"g": "12", "bf": "2", "sc_threshold": "0"}},
    "flash.flv": {"codec": "flv", "options": {"g": "12"}},
    "old.avi": {"codec": "mpeg4", "options": {"g": "12"}},
    "b_frames.avi": {"options": {"g": "12", "bf": "2"}},
    "raw.h264": {"form": "h264", "options": {"g": "12"}},
}
INDEXED = [name for name in FILMS if not name.endswith((".avi", ".h264"))]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("films")
    for name, how in FILMS.items():
        write(folder / name, MOVING, rate=RATE, **how)
    (folder / "twice.ts").write_bytes(2 * (folder / "stream.ts").read_bytes())
    data = (folder / "open_gops.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(data[: 2 * len(data) // 3])
    late = (folder / "stream.ts").read_bytes()
    (folder / "begins_amid_a_gop.ts").write_bytes(late[188 * 60 :])
    stills = [Image.fromarray(frame) for frame in MOVING[::6]]
    stills[0].save(folder / "a.gif", save_all=True, append_images=stills[1:], duration=300, loop=0)
    return folder


ALL = [*FILMS, "twice.ts", "cut.mkv", "begins_amid_a_gop.ts", "a.gif"]
PARTS = [(0.0, None), (0.0, 2.0), (3.7, 5.2), (7.24, None), (5.0, 5.0), (11.6, 30.0), (90.0, 95.0)]


def sliced(whole: list[np.ndarray], fps: float, start: float, end: float | None) -> Any:
    first = math.ceil(start * fps - 1e-6)
    stop = len(whole) if end is None else math.ceil(end * fps - 1e-6)
    return whole[first:stop] or [whole[min(first, len(whole) - 1)]]


@pytest.mark.parametrize("fps", [3.0, 24.0])
@pytest.mark.parametrize("name", ALL)
def test_a_part_has_the_frames_of_the_whole(films: pathlib.Path, name: str, fps: float) -> None:
    whole = read_frames(films / name, fps=fps)
    for (start, end), most in itertools.product(PARTS, (4, 1000)):
        expected = sliced(whole, fps, start, end)
        expected = [expected[place] for place in middle_clip(len(expected), most)]
        found = read_middle(films / name, fps=fps, frames=most, start=start, end=end).frames
        assert len(found) == len(expected), (start, end, most)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=f"{start} {end} {most}")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times of the frames that are decoded to be shown."""
    times: list[float] = []
    reading: Callable[..., Any] = video.decoded_frames

    def counted(*args: Any) -> Any:
        for frame in reading(*args):
            times.append(frame.time)
            yield frame

    monkeypatch.setattr(video, "decoded_frames", counted)
    return times


@pytest.mark.parametrize("name", ["b_frames.mp4", "vp8.webm", "stream.ts"])
def test_decoding_begins_at_a_key_frame_and_ends_with_the_part(
    films: pathlib.Path, decoded: list[float], name: str
) -> None:
    """Whose 12 frames at most are decoded besides the part's, and those that decoders hold."""
    resized = []
    read_middle(
        films / name, fps=3, frames=4, start=5.0, end=9.0, resize=lambda one: resized.append(1)
    )
    # The middle of 12 frames from 5 s to 9 s: 6.33 to 7.33 s.
    assert len(resized) == 4 and len(decoded) <= 12 + 11 + 8


@pytest.mark.parametrize("name", INDEXED)
def test_packets_tell_when_frames_are_shown(films: pathlib.Path, name: str) -> None:
    index = index_frames(films / name, math.inf)
    assert index is not None
    ends = video._decoded_until(films / name, math.inf, 10_000)
    assert index.end == pytest.approx(ends, abs=1e-9)
    assert not index.keys if name == "one_gop.mp4" else len(index.keys) >= 5


@pytest.mark.parametrize("name", ["old.avi", "raw.h264", "twice.ts", "a.gif"])
def test_no_index_where_only_decoding_tells(films: pathlib.Path, name: str) -> None:
    assert index_frames(films / name, math.inf) is None


def test_a_clip_in_a_prompt_is_the_middle_of_its_part(films: pathlib.Path) -> None:
    config = tiny_config(40)
    clip = Video(films / "b_frames.mp4", fps=3, start=2, end=9, frames=6)
    whole = Video(films / "b_frames.mp4", fps=3, frames=1000).visual(config.vision, 4).frames
    # 21 frames from number 6 on: the middle six are numbers 14 to 19.
    np.testing.assert_array_equal(clip.visual(config.vision, 4).frames, whole[14:20])
    assert len(whole) == 36
    for start, end in ((-1.0, 2.0), (3.0, 2.0), (math.nan, None)):
        with pytest.raises(UserError, match=f"from {start} to {end} seconds: give a start of 0"):
            Video(films / "b_frames.mp4", start=start, end=end)
