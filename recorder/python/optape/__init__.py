"""Records what PyTorch computes: an op tape.

In a notebook, a test or a script, recording begins and ends where the program says so::

    import optape

    with optape.record("run.optape"):
        for images, labels in loader:
            train(images, labels)
            optape.step(samples=len(images))

or with `start` and `stop`. Another process (the program `optape`, which comes with this package) writes the file; `optape replay
run.optape` then counts. Processes that are forked meanwhile are recorded, too.

Under `optape record -- python train.py` everything is recorded without any of this. `stage`, `step`, `range`, `watch`, `switch_watches`,
`pause` and `resume` act on that recording then, and `start`, `stop` and `record` leave it as it is. Where nothing is recorded, all of them
but `start`, `stop` and `record` do nothing, and cost next to nothing; also inside of code that torch.compile compiles.
"""

from ._marks import Range, Stage, Switch, pause, range, resume, stage, step, switch_watches, watch
from ._monitor import Monitor, monitor
from ._recording import Recording, RecordingError, Summary, record, start, stop
from ._version import __version__

__all__ = [
    "Monitor",
    "Range",
    "Recording",
    "RecordingError",
    "Stage",
    "Summary",
    "Switch",
    "__version__",
    "monitor",
    "pause",
    "range",
    "record",
    "resume",
    "stage",
    "start",
    "step",
    "stop",
    "switch_watches",
    "watch",
]
