"""Frames come at the times asked for, whatever the file's own rate."""

import numpy as np
import pytest
from PIL import Image

from flamingo_jax.processing.video import VideoError, clip, middle_clip, read_frames
from tests.processing.films import levels, write


@pytest.mark.parametrize(
    "name, codec", [("a.mp4", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4")]
)
def test_frames_at_one_and_at_four_a_second(tmp_path, name, codec):
    shown = [20 * (i // 4) + 20 for i in range(16)]
    write(tmp_path / name, shown, rate=4, codec=codec)
    np.testing.assert_allclose(
        levels(read_frames(tmp_path / name, fps=1)), [20, 40, 60, 80], atol=4
    )
    np.testing.assert_allclose(levels(read_frames(tmp_path / name, fps=4)), shown, atol=4)
    np.testing.assert_allclose(
        levels(read_frames(tmp_path / name, fps=8)), np.repeat(shown, 2), atol=4
    )
    assert len(read_frames(tmp_path / name, fps=4, max_frames=5)) == 5
    assert read_frames(tmp_path / name, fps=1, resize=lambda frame: frame[:20])[0].shape == (
        20,
        64,
        3,
    )


def test_moving_gif(tmp_path):
    path = tmp_path / "a.gif"
    frames = [Image.new("RGB", (20, 10), (level,) * 3) for level in (10, 90, 170, 250)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500, loop=0)
    frames = read_frames(path, fps=2)
    assert frames[0].shape == (10, 20, 3) and frames[0].dtype == np.uint8
    np.testing.assert_allclose(levels(frames), [10, 90, 170, 250], atol=4)
    np.testing.assert_allclose(levels(read_frames(path, fps=1)), [10, 170], atol=4)


def test_a_file_that_breaks_off_gives_its_beginning(tmp_path):
    write(tmp_path / "whole.avi", range(0, 240, 4), rate=10, codec="mpeg4")
    data = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: len(data) // 2])
    whole, cut = (read_frames(tmp_path / name, fps=10) for name in ("whole.avi", "cut.avi"))
    assert 0 < len(cut) < len(whole)
    assert levels(cut)[:-1] == levels(whole)[: len(cut) - 1]


def test_bad_files_are_refused(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("text.mp4", "empty.mp4", "missing.mp4"):
        with pytest.raises(VideoError, match=name):
            read_frames(tmp_path / name, fps=1)
    write(tmp_path / "large.mp4", [1, 2], rate=1)
    with pytest.raises(VideoError, match="more than 100"):
        read_frames(tmp_path / "large.mp4", fps=1, max_pixels=100)
    write(tmp_path / "known.avi", [1, 2], rate=1, codec="mpeg4")
    (tmp_path / "unknown.avi").write_bytes(
        (tmp_path / "known.avi").read_bytes().replace(b"FMP4", b"ZZZZ")
    )
    with pytest.raises(VideoError, match=r"unknown.avi: there is no decoder"):
        read_frames(tmp_path / "unknown.avi", fps=1)


def test_clips():
    assert clip(20, 8) == range(8)
    assert clip(3, 8, np.random.default_rng(0).integers) == range(3)
    starts = {clip(10, 8, np.random.default_rng(seed).integers).start for seed in range(40)}
    assert starts == {0, 1, 2}
    assert middle_clip(5, 8) == [0, 1, 2, 3, 4]
    assert middle_clip(9, 3) == [3, 4, 5] and middle_clip(8, 3) == [3, 4, 5]
    # 20 seconds at 6 fps, shown at 3 fps: half of what is stored, ten seconds from the middle.
    assert middle_clip(120, 30, every=2) == list(range(31, 31 + 60, 2))
    assert middle_clip(20, 30, every=2) == list(range(1, 20, 2))
    steps = np.diff(middle_clip(100, 30, every=2.4))
    assert len(steps) == 29 and set(steps) == {2, 3} and abs(steps.sum() - 29 * 2.4) < 1
    assert middle_clip(1, 30, every=7) == [0]
