"""What a program says about itself while it is recorded. Everything here does nothing where nothing is recorded."""

from __future__ import annotations

import operator
import threading
from contextlib import ContextDecorator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Optional

import _optape_attach as _glue

if TYPE_CHECKING:
    import torch


def _live() -> Any:
    """The recorder, where this process is recorded and not inside of dynamo, which would have to leave the graph for it."""
    recorder = _glue.live
    if recorder is None or recorder.compiling():
        return None
    return recorder


def _check(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"the name of a {what} is a str, not {type(value).__name__}")
    if not value or "\0" in value:
        raise ValueError(f"the name of a {what} is not empty and has no NUL: {value!r}")


def _encoded(name: str) -> bytes:
    return name.encode(errors="replace")


class _ThisThread(threading.local):
    stage: Optional[str] = None


_this_thread = _ThisThread()


class Stage:
    """What `stage` gives: `with` takes the name back at its end."""

    __slots__ = ("_before",)

    def __init__(self, before: Optional[str]) -> None:
        self._before = before

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        stage(self._before)


def stage(name: Optional[str]) -> Stage:
    """Names the stage that this thread is in, beside those that are found out (forward, loss, backward, optimizer).

    The name holds until another one; `None` takes it back. In a `with` statement it holds for the block, after which the name before
    it holds again::

        with optape.stage("warmup"):
            ...
    """
    if name is not None:
        _check("stage", name)
    recorder = _live()
    if recorder is None:
        return Stage(None)
    before = _this_thread.stage
    _this_thread.stage = name
    recorder.capture.optape_stage(None if name is None else _encoded(name))
    return Stage(before)


def step(samples: Optional[int] = None) -> None:
    """Ends a step of training or inference: everything since the last one belongs to it.

    `samples`: the number of samples (images) that it processed, so that `optape replay --per sample` can divide by it. Programs that say
    nothing have a step at every optimizer step, else at every call of the root module.
    """
    count = 0 if samples is None else operator.index(samples)
    if count < 0:
        raise ValueError(f"a step processed {count} samples")
    recorder = _live()
    if recorder is not None:
        recorder.capture.optape_step(count)


class Range(ContextDecorator):
    """What `range` gives."""

    def __init__(self, name: str) -> None:
        _check("range", name)
        self._name = name
        self._entered: list[Any] = []

    def _recreate_cm(self) -> Range:
        return Range(self._name)

    def __enter__(self) -> Range:
        recorder = _live()
        self._entered.append(recorder)
        if recorder is not None:
            recorder.capture.optape_range_enter(_encoded(self._name))
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        entered = self._entered.pop()
        recorder = _live()
        if recorder is not None and recorder is entered:
            recorder.capture.optape_range_exit()


def range(name: str) -> Range:
    """A named range of this thread, which `optape replay --range NAME` selects; ranges nest. For `with`, or as a decorator.

    `torch.profiler.record_function` does the same for programs that do not import optape.
    """
    return Range(name)


def watch(tensor: torch.Tensor, name: str) -> None:
    """Records how many elements of a tensor are nonzero, whether all are 0 or 1, and their sum, under a name of your choice.

    Nothing is computed at `--stats none`, and nothing inside of compiled code.
    """
    _check("watch", name)
    recorder = _live()
    if recorder is None:
        return
    if not isinstance(tensor, recorder.torch.Tensor):
        raise TypeError(f"only tensors can be watched, not {type(tensor).__name__} ({name!r})")
    number = recorder.watch_numbers.get(name)
    if number is None:
        number = recorder.watch_numbers[name] = recorder.capture.optape_define_watch(-1, _encoded(name))
    with recorder.torch._C.DisableTorchFunctionSubclass():
        recorder.calls["watch"](tensor._cdata, number)


def switch_watches(on: bool, *selections: str) -> None:
    """Switches the watches of `--watch` and of spiking neurons on or off, from now on and on all threads: all of them, or
    those that selections name as `--watch` does (`"IFNode:output,v"`), of modules that have run."""
    asked = []
    for selection in selections:
        pattern, colon, labels = selection.rpartition(":")
        if not colon or not pattern or not labels:
            raise ValueError(f"{selection!r} is no selection of watches; one is, for example, 'IFNode:output,v'")
        asked.append((pattern, [label.strip() for label in labels.split(",")]))
    recorder = _live()
    if recorder is None or recorder.facts is None:
        return
    unmatched = recorder.facts.watches.switch(on, asked)
    if unmatched:
        raise ValueError(f"no such watch is of a module that has run: {', '.join(unmatched)}")


class Switch:
    """What `pause` and `resume` give: `with` undoes them at its end."""

    __slots__ = ("_undo",)

    def __init__(self, recorder: Any, undo: str) -> None:
        self._undo = (recorder, undo) if recorder is not None else None

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        if self._undo is not None and self._undo[0] is _live():
            getattr(self._undo[0].capture, self._undo[1])()


def pause() -> Switch:
    """Records no op until `resume`, on any thread of this process. In a `with` statement: for the block."""
    recorder = _live()
    if recorder is None or not recorder.capture.optape_recording():
        return Switch(None, "")
    recorder.capture.optape_pause()
    return Switch(recorder, "optape_resume")


def resume() -> Switch:
    """Records again after `pause`, or after `start(..., paused=True)`. In a `with` statement: for the block."""
    recorder = _live()
    if recorder is None or recorder.capture.optape_recording():
        return Switch(None, "")
    recorder.capture.optape_resume()
    return Switch(recorder, "optape_pause")
