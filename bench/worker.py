"""One row of the benchmark: runs steps of the workload, under a tool or bare, whenever it is asked to.

Speaks lines on stdin and stdout. When it is warm it prints `bench {"ready": ...}`; each `run N` is answered by
`bench {"seconds": ...}`, the time that N steps took, without what the tool needs to be switched on and off; `quit` or
the end of stdin ends it. Everything else on stdout is somebody else's.
"""

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", choices=sorted(TOOLS), default="bare")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--core", type=int, help="run on this core only")
    parser.add_argument("--warm-up", type=int, default=10, metavar="STEPS")
    options = parser.parse_args()
    if options.core is not None:
        # Before torch starts its threads, so that they inherit it.
        os.sched_setaffinity(0, {options.core})

    import torch

    from workload import Workload

    torch.set_num_threads(options.threads)
    workload = Workload(options.batch, options.device)
    wait = torch.cuda.synchronize if options.device == "cuda" else nothing
    tool = TOOLS[options.tool]()
    with tool():
        for _ in range(options.warm_up):
            workload.step()
    wait()
    say(ready=True, torch=torch.__version__, threads=torch.get_num_threads())

    for line in sys.stdin:
        match line.split():
            case ["run", steps]:
                say(seconds=timed(workload, tool, int(steps), wait))
            case ["count"]:
                say(ops=count(workload))
            case ["quit"]:
                break
            case _:
                sys.exit(f"unknown request {line!r}")


def nothing():
    pass


def timed(workload, tool, steps: int, wait) -> float:
    """With what a GPU has still to do in the end, and after a step that brings back what another process took from the caches."""
    gc.collect()
    with tool():
        workload.step()
        wait()
        started = time.perf_counter()
        for _ in range(steps):
            workload.step()
        wait()
        return time.perf_counter() - started


def count(workload) -> int:
    """How many op calls a step makes, as a dispatch mode sees them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    with Count() as counted:
        workload.step()
    return counted.calls


def say(**fields) -> None:
    print("bench " + json.dumps(fields), flush=True)


# Each tool imports what it needs and returns what makes its context manager.


def bare():
    return contextlib.nullcontext


def dispatch_mode():
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoOp(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    return NoOp


def flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    return lambda: FlopCounterMode(display=False)


def profiler():
    from torch.profiler import ProfilerActivity, profile

    return lambda: profile(activities=[ProfilerActivity.CPU], record_shapes=True)


def execution_trace():
    from torch.profiler import ExecutionTraceObserver

    @contextlib.contextmanager
    def observed():
        with tempfile.TemporaryDirectory() as directory:
            observer = ExecutionTraceObserver().register_callback(os.path.join(directory, "trace.json"))
            observer.start()
            try:
                yield
            finally:
                observer.stop()
                observer.unregister_callback()

    return observed


def spikingjelly():
    from spikingjelly.activation_based import op_counter

    def counters():
        return op_counter.DispatchCounterMode(
            [
                op_counter.FlopCounter(),
                op_counter.MemoryAccessCounter(),
                op_counter.MACCounter(),
                op_counter.ACCounter(),
                op_counter.SynOpCounter(),
            ]
        )

    return counters


TOOLS = {
    "bare": bare,
    "dispatch-mode": dispatch_mode,
    "flop-counter": flop_counter,
    "profiler": profiler,
    "execution-trace": execution_trace,
    "spikingjelly": spikingjelly,
}

if __name__ == "__main__":
    main()
