"""A program that records itself with `import optape`: several files from one process, with marks, a pause, a thread and a fork.

Argument: a directory for the traces. Its last line is a report as JSON.
"""

import json
import os
import sys
import threading

import torch
from torch import nn

import optape


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 36, 10)

    def forward(self, x):
        return self.fc(self.conv(x).relu().flatten(1))


def refusals(directory):
    """What the exceptions say, by what was wrong."""

    def refused(*arguments, **more):
        try:
            optape.start(*arguments, **more)
        except optape.RecordingError as error:
            return str(error)
        optape.stop()
        raise AssertionError(f"{arguments} {more} was not refused")

    said = {}
    try:
        optape.stop()
    except optape.RecordingError as error:
        said["stop"] = str(error)
    exists = os.path.join(directory, "exists.optape")
    with open(exists, "w", encoding="ascii") as file:
        file.write("mine")
    said["exists"] = refused(exists)
    with open(exists, encoding="ascii") as file:
        assert file.read() == "mine"
    said["directory"] = refused(os.path.join(directory, "nowhere", "x.optape"))
    said["stats"] = refused(os.path.join(directory, "x.optape"), stats="many")
    binary = os.environ["OPTAPE_BIN"]
    os.environ["OPTAPE_BIN"] = "/no/such/optape"
    said["binary"] = refused(os.path.join(directory, "x.optape"))
    os.environ["OPTAPE_BIN"] = "/bin/false"
    said["other binary"] = refused(os.path.join(directory, "x.optape"))
    os.environ["OPTAPE_BIN"] = binary
    version = torch.__version__
    torch.__version__ = "1.0.0"
    said["torch"] = refused(os.path.join(directory, "x.optape"))
    torch.__version__ = version
    assert not os.path.exists(os.path.join(directory, "x.optape"))
    with optape.record(os.path.join(directory, "twice.optape")):
        said["twice"] = refused(os.path.join(directory, "x.optape"))
    return said


def main():
    directory = sys.argv[1]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    images = torch.rand(8, 1, 8, 8)
    labels = torch.arange(8)

    def train():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()

    # Nothing of this is recorded, and nothing fails.
    train()
    with optape.stage("no"), optape.range("no"), optape.pause():
        optape.step(samples=8)
        optape.watch(images, "no")
    assert threading.active_count() == 1

    report = {"refusals": refusals(directory)}
    if os.environ.get("OPTAPE_RUN"):
        raise AssertionError("under optape record")

    with optape.record(os.path.join(directory, "first.optape")) as first:
        with optape.stage("warmup"):
            train()
        with optape.range("epoch"):
            for _ in range(2):
                train()
                optape.step(samples=8)
        optape.watch((images > 0.5).float(), "spikes")
        with optape.pause():
            torch.cosh(images)
        optape.pause()
        torch.cosh(images)
        with optape.resume():
            torch.sinh(images)
        torch.cosh(images)
        optape.resume()
        thread = threading.Thread(target=lambda: torch.atan(images))
        thread.start()
        thread.join()
        child = os.fork()
        if child == 0:
            torch.erf(images)
            try:
                optape.stop()
            except optape.RecordingError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    assert first.summary is first.stop()
    torch.cosh(images)

    optape.start(os.path.join(directory, "second.optape"), stats="all", paused=True)
    torch.cosh(images)
    with optape.resume():
        torch.tan(images)
    second = optape.stop()

    with optape.record(os.path.join(directory, "nothing.optape")) as nothing:
        pass
    assert not os.path.exists(os.path.join(directory, "nothing.optape"))

    # The end of the program ends this one.
    optape.start(os.path.join(directory, "last.optape"))
    train()
    for name, summary in (("first", first.summary), ("second", second), ("nothing", nothing.summary)):
        report[name] = {"repr": repr(summary), "op_calls": summary.op_calls, "path": summary.path, "dropped": summary.dropped_records}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
