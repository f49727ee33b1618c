"""Recordings that the program itself begins and ends. The program `optape` is the daemon; this process attaches to it."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn, Optional, Union

import _optape_attach as _glue

from ._version import __version__

Path = Union[str, "os.PathLike[str]"]


class RecordingError(RuntimeError):
    """A recording could not begin, or could not end as it should. The text says why and what to do."""


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """What a recording came to.

    `seconds` is the time from the first op to the last, `dropped_records` counts what was lost on the way, `unattributed_op_calls` op
    calls whose module was not found. `complaints` says what went wrong, `lines` everything, as `optape record` prints it.
    """

    path: Optional[str]
    """The file; `None` where no op ran, and none was left behind, or where `optape record` records."""
    op_calls: int = 0
    records: int = 0
    bytes: int = 0
    dropped_records: int = 0
    unattributed_op_calls: int = 0
    processes: int = 0
    seconds: float = 0.0
    lines: tuple[str, ...] = ()
    complaints: tuple[str, ...] = ()
    recorded_outside: bool = False
    """`optape record` records this process, and tells its summary at the end."""

    def __repr__(self) -> str:
        if self.recorded_outside:
            return "<optape: goes on, into the file of `optape record`>"
        if self.path is None:
            return "<optape: nothing was recorded: no op ran>"
        lost = f"{self.dropped_records} records DROPPED" if self.dropped_records else "nothing dropped"
        parts = [f"{self.op_calls} op calls", f"{self.bytes} bytes", lost, *self.complaints]
        return f"<optape: {self.path}: {', '.join(parts)}; next: optape replay {self.path}>"

    def __str__(self) -> str:
        return "\n".join(self.lines) or repr(self)


class Recording:
    """A recording that `start` began, and `stop` or the end of the program ends. For `with`, too."""

    def __init__(self, path: Optional[str], process: Optional[subprocess.Popen[bytes]]) -> None:
        self.path = path
        """The file; `None` where `optape record` records."""
        self.summary: Optional[Summary] = None
        """What it came to, once it has ended."""
        self._process = process
        self._owner = os.getpid()

    def stop(self) -> Summary:
        """Ends it. Ended already, it gives its summary again."""
        if self.summary is None:
            if _current is not self:
                raise RecordingError("this recording is not running")
            stop()
        assert self.summary is not None
        return self.summary

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        if self.summary is None and _current is self:
            stop()

    def __repr__(self) -> str:
        if self.summary is not None:
            return repr(self.summary)
        return f"<optape: recording into {self.path or 'the file of `optape record`'}>"

    # ---- the daemon ----

    def _line(self) -> Optional[dict[str, Any]]:
        """What the daemon says next; `None` where it has ended."""
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            said = json.loads(line) if line else None
        except ValueError:
            return None
        return said if isinstance(said, dict) else None

    def _end_daemon(self) -> Optional[dict[str, Any]]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(b"stop\n")
            process.stdin.close()
        except OSError:
            pass  # it has ended
        said = self._line()
        process.stdout.close()
        process.wait()
        return said

    def _end(self) -> Summary:
        if self._process is None:
            return Summary(None, recorded_outside=True)
        _glue.stop()
        said = self._end_daemon()
        if said is None or "error" in said:
            code = self._process.returncode
            how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
            raise RecordingError(
                f"the recorder (process {self._process.pid}) {how} before the end of the recording; what it wrote until then is in {self.path} "
                f"(`optape verify` looks at it, `optape recover` mends it)"
            )
        known = {field.name for field in dataclasses.fields(Summary)}
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items() if key in known}
        return Summary(**values)


_current: Optional[Recording] = None
_lock = threading.RLock()


def _binary() -> str:
    """The program `optape`: what OPTAPE_BIN names, else the one that was installed with this package, else the one on PATH."""
    named = os.environ.get("OPTAPE_BIN")
    if named:
        found = shutil.which(named)
        if found is None:
            raise RecordingError(f"OPTAPE_BIN is {named}, which cannot be run")
        return found
    package = os.path.dirname(os.path.abspath(__file__))
    beside = [sysconfig.get_path("scripts"), os.path.join(os.path.dirname(package), "bin"), _installed()]
    for directory in beside:
        path = os.path.join(directory, "optape") if directory else None
        if path and os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    found = shutil.which("optape")
    if found is None:
        raise RecordingError(
            "cannot find the program optape, which writes the file; it comes with the wheel (pip install), or name one in OPTAPE_BIN"
        )
    return found


def _installed() -> Optional[str]:
    """Where pip put the program, also with --user and --prefix."""
    from importlib import metadata

    try:
        files = metadata.files("optape") or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "optape" and file.parent.name == "bin":
            return os.path.dirname(os.path.abspath(file.locate()))
    return None


def _options(
    force: bool,
    stats: Optional[str],
    functions: bool,
    on_full: Optional[str],
    ring_size: Union[str, int, None],
    force_torch: bool,
    options: Sequence[str],
) -> list[str]:
    words = []
    for flag, wanted in (("--force", force), ("--functions", functions), ("--force-torch", force_torch)):
        if wanted:
            words.append(flag)
    for flag, value in (("--stats", stats), ("--on-full", on_full), ("--ring-size", ring_size)):
        if value is not None:
            words += [flag, str(value)]
    if isinstance(options, str):
        raise TypeError("options is a list of words, not one text")
    return [*words, *map(str, options)]


def start(
    path: Path,
    *,
    force: bool = False,
    stats: Optional[str] = None,
    functions: bool = False,
    on_full: Optional[str] = None,
    ring_size: Union[str, int, None] = None,
    force_torch: bool = False,
    paused: bool = False,
    options: Sequence[str] = (),
) -> Recording:
    """Begins to record this process, and those that it forks, into the file `path`.

    `force` overwrites the file if it exists. `stats` says which statistics of tensors are taken: "none", "rules" (what the counters
    need; this is what is done by default) or "all". `functions` records calls of torch's Python functions beside ops. `on_full`, "wait" or "drop",
    is what happens when the ring of `ring_size` bytes ("4M") is full. `force_torch` tries a version of torch that is not supported. `paused`
    waits for `resume`. `options` are further options of `optape record`.

    Recording ends with `stop`, or with the program. A second one can begin after that, into another file. `record` is another name of `start`,
    for `with`, at the end of which the recording ends; its `summary` says what it came to::

        with optape.record("run.optape") as recording:
            train()
        print(recording.summary)

    Raises `RecordingError` where it cannot begin: a recording runs already, the file exists, this torch is not supported, ...

    Under `optape record` that recording goes on, and `path` is not used.
    """
    global _current
    path = os.fspath(path)
    with _lock:
        if _current is not None:
            if _current._owner != os.getpid():
                raise RecordingError("this process was forked by one that is being recorded, and is recorded with it")
            raise RecordingError(f"this process is being recorded already, into {_current.path}; call optape.stop() first")
        if _recorded_outside():
            _current = Recording(None, None)
            if paused:
                _glue.live.capture.optape_pause()
            return _current
        recording = _start(path, _options(force, stats, functions, on_full, ring_size, force_torch, options))
        if paused:
            _glue.live.capture.optape_pause()
        _current = recording
        return recording


record = start


def _recorded_outside() -> bool:
    """Whether `optape record` records this process."""
    if os.environ.get("OPTAPE_RUN") and _glue.attached is None:
        try:
            import torch  # noqa: F401  attaches
        except ImportError:
            pass
        _glue.attach()  # where torch loads no entry points
    if isinstance(_glue.attached, str):
        raise RecordingError(f"`optape record` cannot record this process: {_glue.attached}")
    return _glue.attached is True


def _start(path: str, options: list[str]) -> Recording:
    binary = _binary()
    try:
        path = os.path.abspath(path)
    except OSError as error:
        raise RecordingError(f"the working directory is gone, and {path} is relative to it") from error
    environment = {name: value for name, value in os.environ.items() if name != "OPTAPE_RUN"}
    command = [binary, "record", "--parent", str(os.getpid()), "--output", path, *options]
    try:
        # In a session of its own: what a terminal sends (Ctrl-C) is meant for the program.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env=environment
        )
    except OSError as error:
        raise RecordingError(f"cannot run {binary}: {error.strerror}") from error
    recording = Recording(path, process)
    try:
        _attach(recording, binary)
    except BaseException:
        recording._end_daemon()
        raise
    return recording


def _attach(recording: Recording, binary: str) -> None:
    ready = recording._line()
    if ready is None:
        _refuse_binary(binary, "it says something else than this version expects")
    if "error" in ready:
        raise RecordingError(ready["error"])
    if ready.get("optape") != __version__:
        _refuse_binary(binary, f"it is version {ready.get('optape')}, this package is {__version__}")
    try:
        _glue.start(ready["run"], ready["variables"])
    except _glue.AttachError as error:
        raise RecordingError(str(error).replace("--force-torch tries", "force_torch=True tries")) from None


def _refuse_binary(binary: str, why: str) -> NoReturn:
    raise RecordingError(f"{binary} does not fit this package: {why}; install both from one wheel, or name another one in OPTAPE_BIN")


def stop() -> Summary:
    """Ends the recording that `start` began, waits until the file is complete, and says what it came to.

    Raises `RecordingError` where none runs. Under `optape record` that recording goes on.
    """
    global _current
    with _lock:
        recording = _current
        if recording is None:
            raise RecordingError("nothing is being recorded: optape.start(path) begins")
        if recording._owner != os.getpid():
            raise RecordingError("the recording belongs to the process that forked this one, which alone can end it")
        _current = None
        recording.summary = recording._end()
        return recording.summary


def _at_exit() -> None:
    """The program ends: so does the recording."""
    recording = _current
    if recording is None or recording._owner != os.getpid():
        return
    try:
        stop()
    except RecordingError as error:
        print(f"optape: {error}", file=sys.stderr)


atexit.register(_at_exit)
