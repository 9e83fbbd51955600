"""`SECONDS_A_SAVE=30 python slow_save.py --flags` is `python -m launch.train --flags` on a host
that takes so long to digest a checkpoint; SECONDS_TO_PLAN that takes so long to plan its rows.
"""

import os
import pathlib
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from data_pipelines import iterators  # noqa: E402
from flamingo_jax.checkpointing import manifest  # noqa: E402


def slowed(quick: Callable[..., Any], variable: str) -> Callable[..., Any]:
    def slow(*arguments: Any) -> Any:
        time.sleep(float(os.environ.get(variable, "0")))
        return quick(*arguments)

    return slow


manifest.write_manifest = slowed(manifest.write_manifest, "SECONDS_A_SAVE")
iterators.make_iterators = slowed(iterators.make_iterators, "SECONDS_TO_PLAN")
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
