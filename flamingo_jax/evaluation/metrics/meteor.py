"""METEOR (Denkowski and Lavie 2014), by the Java program in pycocoevalcap."""

import importlib.util
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

from flamingo_jax.errors import UserError


def meteor(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """Computes METEOR of a set, and of each image.

    Args:
      predictions: a caption of each image, tokens separated by spaces.
      references: one or more captions of each image, likewise.

    Returns: the score of the set, which is no mean of the images', and each image's; 0 to 1.
    Raises: UserError where Java or pycocoevalcap is not installed, or the program fails.
    """
    command = [_java(), "-jar", "-Xmx2G", str(_program()), "-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            encoding="utf-8",
        )  # fmt: skip
        try:
            return _ask(process, predictions, references)
        except (OSError, ValueError) as error:
            errors.seek(0)
            said = errors.read(2000).decode(errors="replace").strip().split("\n")[0]
            raise UserError(f"METEOR's program failed: {said or error}") from None
        finally:
            process.kill()
            process.communicate()


def _ask(
    process: subprocess.Popen[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """Sends the captions and reads the scores."""
    assert process.stdin is not None and process.stdout is not None
    statistics = []
    for prediction, captions in zip(predictions, references, strict=True):
        hypothesis = prediction.replace("|||", "").replace("  ", " ")
        process.stdin.write(" ||| ".join(("SCORE", *captions, hypothesis)) + "\n")
        process.stdin.flush()
        statistics.append(process.stdout.readline().strip())
    process.stdin.write(" ||| ".join(("EVAL", *statistics)) + "\n")
    process.stdin.flush()
    scores = [float(process.stdout.readline()) for _ in statistics]
    return float(process.stdout.readline()), scores


def _java() -> str:
    found = shutil.which("java")
    if found is None:
        raise UserError("METEOR needs Java: install it (Debian: default-jre-headless)")
    return found


def _program() -> pathlib.Path:
    package = importlib.util.find_spec("pycocoevalcap")
    for folder in package.submodule_search_locations or () if package else ():
        if (program := pathlib.Path(folder, "meteor", "meteor-1.5.jar")).is_file():
            return program
    raise UserError("METEOR needs pycocoevalcap: pip install 'flamingo_jax[meteor]'")
