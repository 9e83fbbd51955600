"""A film's frames come at their own times, whatever becomes of its clock."""

import pathlib

import numpy as np
import pytest

from flamingo_jax.processing.video import read_frames, read_video
from flamingo_jax.processing.video_clock import FrameClock
from tests.processing.films import levels, write

SHOWN = [20 * (i // 10) + 20 for i in range(60)]
"""Second s, at 10 a second, is grey of level 20 s + 20."""
SECONDS = [20, 40, 60, 80, 100, 120]


@pytest.mark.parametrize(
    "form, codec", [("h264", "libx264"), ("m4v", "mpeg4"), ("mpeg2video", "mpeg2video")]
)
@pytest.mark.parametrize("rate", [10, 24])
def test_films_without_time_stamps(tmp_path: pathlib.Path, form: str, codec: str, rate: int):
    if form == "mpeg2video":
        rate += {10: 15, 24: 0}[rate]  # MPEG-2 knows some rates alone.
    shown = [20 * (i // rate) + 20 for i in range(3 * rate)]
    write(tmp_path / "a.bin", shown, rate=rate, codec=codec, form=form)
    film = read_video(tmp_path / "a.bin", fps=1)
    np.testing.assert_allclose(levels(film.frames), [20, 40, 60], atol=6)
    assert film.lost == ()


@pytest.mark.parametrize(
    "ending, codec",
    [("mp4", "libx264"), ("mkv", "libx264"), ("ts", "libx264"), ("avi", "mpeg4")],
)
def test_a_clock_that_jumps_forwards(tmp_path: pathlib.Path, ending: str, codec: str):
    form = {"ts": "mpegts", "mkv": "matroska"}.get(ending)

    def jump(number):
        return number + (10_000 if number >= 20 else 0)

    path = tmp_path / f"a.{ending}"
    write(path, SHOWN, rate=10, codec=codec, form=form, stamp=jump, options={"bf": "0"})
    film = read_video(path, fps=1, max_frames=64)
    np.testing.assert_allclose(levels(film.frames), SECONDS, atol=6)
    assert film.lost == ()


@pytest.mark.parametrize(
    "ending, form, codec, rate",
    [
        ("ts", "mpegts", "libx264", 10),
        ("mpg", "mpeg", "mpeg2video", 25),
        ("mkv", "matroska", "libx264", 10),
    ],
)
def test_a_clock_that_jumps_backwards(
    tmp_path: pathlib.Path, ending: str, form: str, codec: str, rate: int
):
    """Two recordings in one file, one after the other."""
    path = tmp_path / f"a.{ending}"
    write(
        path,
        [20 * (i // rate) + 20 for i in range(3 * rate)],
        rate=rate,
        codec=codec,
        form=form,
    )
    path.write_bytes(2 * path.read_bytes())
    np.testing.assert_allclose(levels(read_frames(path, fps=1)), 2 * [20, 40, 60], atol=6)


def test_stills_up_to_the_bound_keep_their_time(tmp_path: pathlib.Path):
    """Slides at 0, 8, 16 and 17 s."""
    path = tmp_path / "a.mkv"
    write(path, [20, 60, 100, 140], rate=1, stamp=lambda number: (0, 8, 16, 17)[number])
    np.testing.assert_allclose(
        levels(read_frames(path, fps=1)), 8 * [20] + 8 * [60] + [100, 140], atol=6
    )
    write(tmp_path / "slow.mp4", [20, 60, 100], rate=1, stamp=lambda number: 15 * number)
    shown = levels(read_frames(tmp_path / "slow.mp4", fps=1))
    np.testing.assert_allclose(shown[:31], 15 * [20] + 15 * [60] + [100], atol=6)


def test_moving_frames_without_a_clock_stay_as_long_as_they_say(tmp_path: pathlib.Path):
    from PIL import Image

    frames = [Image.new("RGB", (20, 10), (level,) * 3) for level in (10, 90, 170)]
    frames[0].save(
        tmp_path / "a.gif",
        save_all=True,
        append_images=frames[1:],
        duration=[500, 20_000, 500],
    )
    np.testing.assert_allclose(
        levels(read_frames(tmp_path / "a.gif", fps=2)), [10, *(40 * [90]), 170], atol=4
    )


def seconds(
    clock: FrameClock, stamps: list[float | None], lasted: float | None = None
) -> list[float]:
    return [round(clock(stamp, lasted), 6) for stamp in stamps]


def test_the_clock():
    assert seconds(FrameClock(10), [5, 5.1, 5.3, 5.4]) == [0, 0.1, 0.3, 0.4]
    assert seconds(FrameClock(10), [None] * 4) == [0, 0.1, 0.2, 0.3]
    assert seconds(FrameClock(0), [None] * 3) == [0, 0.04, 0.08]
    assert seconds(FrameClock(10), [None] * 3, lasted=0.5) == [0, 0.5, 1]
    assert seconds(FrameClock(10), [0.0] * 4) == [0, 0.1, 0.2, 0.3]
    assert seconds(FrameClock(10), [0, 0.1, 1e6, 1e6 + 0.1, 3, 3.1]) == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert seconds(FrameClock(10), [0, None, 0.2, 0.3]) == [0, 0.1, 0.2, 0.3]
    assert seconds(FrameClock(10), [None, 7, 7.1]) == [0, 0.1, 0.2]
    assert seconds(FrameClock(10), [0, 0.2, 0.1, 0.4, 0.3, 0.5]) == [0, 0.2, 0.2, 0.4, 0.4, 0.5]
    assert seconds(FrameClock(10), [0, 9.9, 20], lasted=1e9) == [0, 9.9, 19.8]
    assert seconds(FrameClock(10, trusted=True), [0, 100, 5_000]) == [0, 100, 5_000]
    assert seconds(FrameClock(1, 1 / 20), [0, 20, 40, 41]) == [0, 20, 40, 41]


def test_a_clock_that_goes_to_and_fro_still_goes_on():
    times = seconds(FrameClock(10), [0.1 * (number % 2) for number in range(200)])
    assert times == sorted(times) and times[-1] > 0.5


def test_gaps_are_those_of_a_steady_rate():
    steady, varying = FrameClock(10), FrameClock(10)
    seconds(steady, [number / 10 for number in range(80) if number not in (40, 41)])
    seconds(varying, list(np.cumsum([0.1, 0.3, 0.1, 0.2] * 20)))
    assert steady.gaps == 1 and varying.gaps == 0
    assert steady.last(None) == pytest.approx(8) and steady.stamp == pytest.approx(7.9)
