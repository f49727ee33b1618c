"""Monitors without a recording: the program `optape monitor` as a child of this process, with which it ends."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterable
from types import TracebackType
from typing import Optional, Union

from ._recording import Path, RecordingError, _binary


class Monitor:
    """A child that samples, from `monitor` on until `stop`, or until this process ends. For `with`, too."""

    def __init__(self, process: subprocess.Popen[bytes], log_dir: Optional[str]) -> None:
        self.log_dir = log_dir
        """Where the event files are; `None` where it prints."""
        self.process = process
        """The child."""
        self._owner = os.getpid()
        self._stopped = False

    @property
    def running(self) -> bool:
        """Whether it samples."""
        if os.getpid() != self._owner:
            return not self._stopped  # the parent alone can ask
        return self.process.poll() is None

    def stop(self) -> None:
        """Ends it, and waits until what it wrote is complete. Ended already, it stays so.

        Raises `RecordingError` where it had failed.
        """
        if os.getpid() != self._owner:
            raise RecordingError("the monitor belongs to the process that forked this one, which alone can end it")
        if self._stopped:
            return
        self._stopped = True
        self.process.send_signal(signal.SIGTERM)  # nothing, where it has ended
        code = self.process.wait()
        # It may be so young that it does not handle the signal yet.
        if code not in (0, -signal.SIGTERM):
            how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
            raise RecordingError(f"`optape monitor` {how}; why, stands on stderr")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        if os.getpid() != self._owner:
            return
        try:
            self.stop()
        except RecordingError:
            # What the block raised matters more.
            if kind is None:
                raise

    def __repr__(self) -> str:
        where = f"into {self.log_dir}" if self.log_dir is not None else "to stdout"
        return f"<optape: monitor {where}, {'ended' if self._stopped else 'process ' + str(self.process.pid)}>"


def monitor(
    *,
    gpu: Union[int, Iterable[int], None] = None,
    source: Union[str, Iterable[str]] = "gpu",
    interval: float = 1.0,
    log_dir: Optional[Path] = None,
    format: str = "table",
    samples: Optional[int] = None,
) -> Monitor:
    """Samples GPUs, energy counters and the machine meanwhile, without a recording::

        with optape.monitor(gpu=[0, 1], interval=0.5, log_dir="runs/gpu"):
            train()

    `source` names what is sampled: "gpu", "rapl", "host", "process" (this one), or several of them. `gpu` picks GPUs by the numbers that
    nvidia-smi prints; without it, all. With `log_dir` TensorBoard event files are written there; else samples go to stdout (of the process, which is not
    a notebook's cell) as `format` says: "table", "json" or "csv". After `samples` rounds it ends of itself.

    A machine without a GPU, or without permission to read energy counters, gets a hint on stderr, and nothing else happens.
    """
    gpus = [gpu] if isinstance(gpu, int) else list(gpu or ())
    sources = [source] if isinstance(source, str) else list(source)
    binary = _binary()
    command = [binary, "monitor", "--parent", str(os.getpid()), "--interval", str(interval), "--source", ",".join(sources)]
    if gpus:
        command += ["--gpu", ",".join(map(str, gpus))]
    if samples is not None:
        command += ["--samples", str(samples)]
    directory = None if log_dir is None else os.path.abspath(os.fspath(log_dir))
    command += ["--format", format] if directory is None else ["--log-dir", directory]
    try:
        # In a session of its own: what a terminal sends (Ctrl-C) is meant for the program, with which it ends anyway.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        raise RecordingError(f"cannot run {binary}: {error.strerror}") from error
    return Monitor(process, directory)
