"""Reads uploaded files into visuals: bounded in bytes, pixels and seconds, and known by their
content, whatever their name.
"""

import dataclasses
import io
import pathlib

import av
import PIL.Image

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.processing import images
from flamingo_jax.processing.video_file import VideoError, declared_duration, opened
from flamingo_jax.processing.visuals import Image, Video, Visual

MEGABYTE = 1 << 20


@dataclasses.dataclass(frozen=True)
class UploadLimits:
    """The largest files that are taken.

    megabytes: of a file.
    pixels: of an image, or of a frame of a clip.
    seconds: of a clip, where its file declares how long it lasts.
    """

    megabytes: int = 32
    pixels: int = images.MAX_PIXELS
    seconds: float = 600.0


def read_upload(
    path: str | pathlib.Path,
    folder: pathlib.Path,
    config: FlamingoConfig,
    limits: UploadLimits,
    *,
    fps: float | None = None,
    frames: int | None = None,
) -> Visual:
    """Reads an uploaded image or clip as the model will see it, and deletes the file.

    Args:
      path: as the browser names it, and so not to be trusted: it must be inside `folder`.
      folder: where uploads are kept.
      fps, frames: how clips are sampled, see `Video`.

    Raises: UserError, in one sentence with the file's name, for anything that is not an image
      or a clip within the limits.
    """
    file = pathlib.Path(path).resolve()
    if not file.is_relative_to(folder.resolve()) or not file.is_file():
        raise UserError("the uploaded file is no longer there: add it again")
    try:
        return _read(file, config, limits, fps, frames)
    finally:
        file.unlink(missing_ok=True)


def _read(
    file: pathlib.Path,
    config: FlamingoConfig,
    limits: UploadLimits,
    fps: float | None,
    frames: int | None,
) -> Visual:
    size = file.stat().st_size
    if size > limits.megabytes * MEGABYTE:
        raise UserError(
            f"{file.name} has {size / MEGABYTE:.1f} MB, but {limits.megabytes} are the most: give"
            " a smaller one"
        )
    try:
        if _is_still(file):
            data = file.read_bytes()
            images.check(data, max_pixels=limits.pixels)
            # Made from bytes, since the message of a path would name the folder of uploads.
            return Image(data).visual(config.vision, config.resampler.frames)
        _check_clip(file, limits)
        clip = Video(file, fps=fps, frames=frames)
        return clip.visual(config.vision, config.resampler.frames)
    except images.ImageError as error:
        raise UserError(f"{file.name}: {error}: give a smaller or a whole image") from error
    except (VideoError, av.FFmpegError, OSError) as error:
        raise UserError(
            f"{file.name} is neither an image nor a clip that can be read: give a PNG, JPEG, WebP,"
            " GIF, MP4 or WebM file"
        ) from error
    except UserError as error:
        raise UserError(str(error).replace(str(file), file.name)) from error


def _is_still(file: pathlib.Path) -> bool:
    """Returns whether a file's content is a single image; animations are clips.

    Raises: ImageError for an image so large that PIL does not open it.
    """
    try:
        with PIL.Image.open(io.BytesIO(file.read_bytes())) as image:
            return getattr(image, "n_frames", 1) == 1
    except PIL.Image.DecompressionBombError as error:
        raise images.ImageError("it has far more pixels than are taken") from error
    except Exception:  # noqa: BLE001 - as `images.decode`: PIL's readers raise whatever they stumble on
        return False


def _check_clip(file: pathlib.Path, limits: UploadLimits) -> None:
    """Checks a clip by its header, before its frames are decoded.

    Raises: UserError for one that is too long or too large; VideoError for what is none.
    """
    with opened(file) as (container, stream):
        width, height, seconds = stream.width, stream.height, declared_duration(container, stream)
    if width * height > limits.pixels:
        raise UserError(
            f"{file.name} has frames of {width} x {height} pixels, but {limits.pixels:,} are the"
            " most: give a smaller clip"
        )
    if seconds > limits.seconds:
        raise UserError(
            f"{file.name} lasts {seconds:.0f} s, but {limits.seconds:.0f} are the most: cut it"
        )
