"""Runs `launch.build_data` with a synthetic world of few records: for tests of the READMEs, which
build the whole of it.

    python -m tests.small_build_data quickstart --output=FOLDER
"""

import dataclasses
import runpy

from data_pipelines.synthetic_world.datasets import DATASETS

TRAINING_RECORDS = 200
"""The most records to train on; a batch of the contrastive stage takes more than half of them."""
OTHER_RECORDS = 40
"""The most records of each other split."""
SUPPORT = ("ltip", "m3w")
"""Datasets whose validation split stays whole: the suite draws 32 shots of one kind from it."""


def main() -> None:
    """Makes the datasets small and runs the command with the arguments of this one."""
    for name, dataset in DATASETS.items():
        sizes = {
            split: min(size, TRAINING_RECORDS if split == "train" else OTHER_RECORDS)
            for split, size in dataset.sizes.items()
        }
        if name in SUPPORT:
            sizes["validation"] = dataset.sizes["validation"]
        DATASETS[name] = dataclasses.replace(dataset, sizes=sizes)
    runpy.run_module("launch.build_data", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
