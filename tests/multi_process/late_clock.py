"""`python late_clock.py --flags` is `python -m launch.train --flags` on a host whose clock is
an hour ahead.
"""

import pathlib
import runpy
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
right = time.time
time.time = lambda: right() + 3600.0
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
