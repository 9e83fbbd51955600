"""Reads a profiler trace: which operations took the time of the device."""

import collections
import gzip
import json
import pathlib
from typing import Any

OF_DEVICES = ("/device:GPU", "/device:TPU")
OF_HOST = "/host:CPU"


def top_operations(folder: pathlib.Path, count: int) -> list[dict[str, Any]]:
    """Sums the newest trace below a folder by operation.

    Returns: the `count` that took most, [{"name", "milliseconds", "times", "share"}], of the
      devices' time, or on CPUs of the host's threads that run XLA's thunks; [] without a trace.
    """
    files = sorted(folder.rglob("*.trace.json.gz"), key=lambda file: file.stat().st_mtime)
    if not files:
        return []
    with gzip.open(files[-1], "rt") as file:
        events = json.load(file).get("traceEvents", [])
    processes = {
        event["pid"]: event["args"]["name"]
        for event in events
        if event.get("name") == "process_name"
    }
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event.get("name") == "thread_name"
    }

    def counts(event: dict[str, Any]) -> bool:
        process = processes.get(event.get("pid"), "")
        thread = threads.get((event.get("pid"), event.get("tid")), "")
        if process.startswith(OF_DEVICES):
            # TPUs have lines of modules and steps beside that of operations; GPUs streams.
            return "XLA Ops" in thread or "Stream" in thread
        # The executor's own events span those of the operations that it runs.
        return process == OF_HOST and "XLA" in thread and "Executor" not in event["name"]

    durations: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    of_device = any(name.startswith(OF_DEVICES) for name in processes.values())
    for event in events:
        if event.get("ph") != "X" or not counts(event):
            continue
        if of_device and processes[event["pid"]] == OF_HOST:
            continue
        durations[event["name"]] += event.get("dur", 0)
        times[event["name"]] += 1
    total = sum(durations.values())
    return [
        {
            "name": name,
            "milliseconds": taken / 1e3,
            "times": times[name],
            "share": taken / total if total else 0.0,
        }
        for name, taken in durations.most_common(count)
    ]
