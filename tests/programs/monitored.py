"""Monitors from Python. `ways`: every way to begin and end one; `leave DIR`: begins one, says its number, and is killed."""

import json
import os
import sys
import time

import optape


def event_files(directory):
    return [name for name in os.listdir(directory) if "tfevents" in name] if os.path.isdir(directory) else []


def until(met):
    """Waits; what never comes is the test's time to run out."""
    while not met():
        time.sleep(0.01)


def ways(directory):
    report = {}
    logs = os.path.join(directory, "logs")
    with optape.monitor(source=["host", "process"], interval=0.01, log_dir=logs) as monitor:
        until(lambda: any(os.path.getsize(os.path.join(logs, name)) > 1000 for name in event_files(logs)))
        report["running"] = monitor.running
    report["running afterwards"] = monitor.running
    report["event files"] = len(event_files(logs))
    monitor.stop()

    printing = optape.monitor(source="process", interval=0.01, format="csv", samples=2)
    report["printed"] = printing.process.wait()
    printing.stop()

    wrong = optape.monitor(source="nonsense")
    wrong.process.wait()
    try:
        wrong.stop()
    except optape.RecordingError as error:
        report["wrong"] = str(error)
    try:
        with optape.monitor(source="nonsense") as wrong:
            wrong.process.wait()
            raise KeyError("mine")
    except KeyError as error:
        report["raised"] = str(error)

    child = os.fork()
    if child == 0:
        try:
            monitor.stop()
        except optape.RecordingError:
            os._exit(7)
        os._exit(0)
    report["forked"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    report["process"] = os.getpid()
    print(json.dumps(report))


def leave(directory):
    monitor = optape.monitor(source="host", interval=0.01, log_dir=directory)
    until(lambda: event_files(directory))
    print(monitor.process.pid, flush=True)
    os.kill(os.getpid(), 9)


if __name__ == "__main__":
    {"ways": ways, "leave": leave}[sys.argv[1]](sys.argv[2])
