"""Captions every image of a folder.

python -m launch.examples.caption my_photos --model=runs/quickstart/flamingo/export
"""

import argparse
import pathlib
import sys

import flamingo_jax as fj

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="images, in any depth")
    parser.add_argument("--model", default="runs/quickstart/flamingo/export")
    parser.add_argument("--prompt", default="Output:", help="what stands behind an image")
    parser.add_argument("--batch_size", type=int, default=16)
    options = parser.parse_args()

    paths = sorted(
        path for path in pathlib.Path(options.folder).rglob("*") if path.suffix.lower() in SUFFIXES
    )
    if not paths:
        raise fj.UserError(f"{options.folder} holds no images: name a folder that does")
    model = fj.load(options.model)
    for start in range(0, len(paths), options.batch_size):
        some = paths[start : start + options.batch_size]
        prompts = [[fj.Image(path), options.prompt] for path in some]
        for path, completion in zip(some, model.generate(prompts), strict=True):
            print(f"{path}: {completion.text.strip()}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except fj.UserError as error:
        sys.exit(f"error: {error}")
