"""`python slow_reader.py --flags` is `python -m launch.train --flags` on a host whose storage
is slow.
"""

import pathlib
import runpy
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from data_pipelines.batches import BatchIterator  # noqa: E402

quick = BatchIterator.__next__


def slow(self: BatchIterator) -> dict:
    time.sleep(0.5)
    return quick(self)


BatchIterator.__next__ = slow  # type: ignore[method-assign]
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
