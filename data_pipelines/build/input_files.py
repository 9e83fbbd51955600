"""Finds a source's input files, and downloaded images by name or by URL."""

import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from data_pipelines.build import files
from data_pipelines.build.byte_ranges import ByteRange, why
from data_pipelines.build.images import UnusableImage
from data_pipelines.build.tar_samples import IMAGE_ENDINGS, TarSample, samples
from data_pipelines.build.tars import SUFFIXES, compressed_with
from data_pipelines.build.text_files import decode, parsed
from flamingo_jax.errors import UserError
from flamingo_jax.progress import Bar

ADDRESS_DIGEST = re.compile(r"(?:^|[/\\\\])[0-9a-f]{64}\.[^./\\\\]+$")


class InputFile(NamedTuple):
    """An input file; `name` is its path relative to the folder `root`."""

    root: pathlib.Path
    name: str

    @property
    def path(self) -> pathlib.Path:
        return self.root / self.name


def files_in(inputs: Sequence[str], suffixes: Sequence[str], what: str) -> list[InputFile]:
    """Lists the inputs that are files, and the files with these suffixes below those that are
    folders.

    what: the files' description in errors.
    Raises: UserError where there are none, or one may not be read.
    """
    found = []
    for name in inputs:
        path = pathlib.Path(name)
        if path.is_dir():
            listing = files.walk(path, suffixes, inputs)
            if listing.refused:
                refused = listing.refused[0]
                raise UserError(
                    f"{path / refused.name} is not read ({refused.reason}): mend it, remove it, "
                    "or name what a link leads to with --input"
                )
            found += [InputFile(path, name) for name in listing.names]
        elif path.is_file():
            found.append(InputFile(path.parent, path.name))
        else:
            raise UserError(f"there is no file or folder {path}: mend --input")
    if not found:
        raise UserError(
            f"there is no {what} ({', '.join(suffixes)}) below {', '.join(inputs)}: unpack what"
            " is compressed, or mend --input"
        )
    return found


def read_named(folders: Sequence[str], name: str) -> bytes:
    """Reads a file by name from the first of the folders that has it; raises UnusableImage."""
    return files.read(files.find(folders, name))


def folders_of(inputs: Sequence[str]) -> tuple[str, ...]:
    """Returns the inputs that are folders, and the folders of those that are files: the
    default folders of images.
    """
    return tuple(
        dict.fromkeys(
            name if os.path.isdir(name) else os.path.dirname(name) or "." for name in inputs
        )
    )


def by_address(folders: Sequence[str]) -> dict[bytes, ByteRange]:
    """Indexes downloaded images by URL: {address_key(url): byte range}.

    The folders may have

    - output of img2dataset (`output_format` webdataset or files), with the `url` in .json
    files; - files named by the SHA-256 of their URL in hexadecimal, with any image suffix.

    Raises: UserError for a compressed shard, which has no random access.
    """
    found: dict[bytes, ByteRange] = {}
    below = [
        str(pathlib.Path(folder, name))
        for folder in folders
        for name in files.walk(folder, given=folders).names
    ]
    paths = [
        pathlib.Path(file)
        for file in sorted(below)
        if file.lower().endswith((*SUFFIXES, ".json")) or ADDRESS_DIGEST.search(file)
    ]
    known = frozenset(below)
    with Bar("images by address", len(paths)) as bar:
        for path in paths:
            bar.advance()
            ending = path.suffix.lower()[1:]
            if path.name.lower().endswith(SUFFIXES):
                _enter_shard(found, path)
            elif ending == "json":
                beside = (path.with_suffix(f".{ending}") for ending in IMAGE_ENDINGS)
                if image_file := next((file for file in beside if str(file) in known), None):
                    _enter(found, ByteRange(str(path)), ByteRange(str(image_file)))
            elif ending in IMAGE_ENDINGS:
                found.setdefault(bytes.fromhex(path.stem), ByteRange(str(path)))
    return found


def _enter_shard(found: dict[bytes, ByteRange], path: pathlib.Path) -> None:
    """Indexes the images of one of img2dataset's tar shards."""
    try:
        packing = compressed_with(path)
    except OSError:
        return
    if packing:
        raise UserError(
            f"{path} is compressed ({packing.name}), and images are looked up in it one by"
            " one: unpack it to a plain .tar file"
        )
    for sample in samples(path):
        if isinstance(sample, TarSample) and sample.image and sample.about:
            _enter(found, sample.about, sample.image)


def address_key(address: str) -> bytes:
    """Hashes a URL to the key of `by_address`; a digest takes less memory than the URL."""
    return hashlib.sha256(address.encode(errors="surrogateescape")).digest()


def reader(
    folders: Sequence[str], name: object, downloaded: ByteRange | None
) -> Callable[[], bytes]:
    """Returns a function that reads an image: the one downloaded from its URL, or else the
    file of that name below the folders. The function raises UnusableImage.
    """

    def read() -> bytes:
        if downloaded is None and isinstance(name, str) and name:
            return read_named(folders, name)
        if downloaded is None:
            raise UnusableImage(files.MISSING)
        try:
            return downloaded.read()
        except OSError as error:
            raise UnusableImage(why(error)) from error

    return read


def _enter(found: dict[bytes, ByteRange], about: ByteRange, image: ByteRange) -> None:
    try:
        record = parsed(decode(about.read()))
    except OSError:
        return
    if isinstance(record, dict) and isinstance(record.get("url"), str):
        found.setdefault(address_key(record["url"]), image)
