"""Bytes per op of PyTorch's own recorders on the benchmark's workload, as one line of JSON."""

import argparse
import gzip
import json
import os
import tempfile

import torch
from torch.profiler import ExecutionTraceObserver, ProfilerActivity, profile

from worker import count
from workload import Workload


def size(path: str, calls: int) -> dict:
    with open(path, "rb") as file:
        raw = file.read()
    return {"bytes_per_op": len(raw) / calls, "gzip_bytes_per_op": len(gzip.compress(raw, 6)) / calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    workload = Workload(options.batch)
    for _ in range(5):
        workload.step()
    calls = count(workload) * options.steps
    with tempfile.TemporaryDirectory() as directory:
        kineto = os.path.join(directory, "kineto.json")
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            for _ in range(options.steps):
                workload.step()
        profiled.export_chrome_trace(kineto)
        execution = os.path.join(directory, "execution.json")
        observer = ExecutionTraceObserver().register_callback(execution)
        observer.start()
        for _ in range(options.steps):
            workload.step()
        observer.stop()
        observer.unregister_callback()
        print(json.dumps({"calls": calls, "kineto": size(kineto, calls), "execution_trace": size(execution, calls)}))


if __name__ == "__main__":
    main()
