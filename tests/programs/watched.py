"""Modules to be watched. The argument says which; prints as JSON what the watches should have seen."""

import json
import sys

import torch
from torch import nn


class Noise(nn.Module):
    """Spikes at a rate of 10 %."""

    def forward(self, x):
        return (torch.rand(x) < 0.1).float()


class Residual(nn.Module):
    """The input of `inner` is used beside it, too, and its output is changed in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = nn.Linear(4, 4)
        self.twice = Twice()

    def forward(self, x):
        hidden = self.first(x)
        inner = self.inner(hidden)
        inner.mul_(2)
        return inner + hidden * 3 + self.twice(hidden)


class Twice(nn.Module):
    """Uses its input in two ops."""

    def forward(self, x):
        return x * 5 + x.sin()


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.level = None
        self.label = "a text"

    def forward(self, x):
        self.level = x * 2
        return x + 1, [x + 2]


def noise():
    net = Noise()
    spikes = sum(net((64, 1 << 14)).sum().item() for _ in range(4))
    return {"elements": 4 * 64 * (1 << 14), "spikes": spikes}


def small():
    net = Noise()
    spikes = sum(net((40, 50)).sum().item() for _ in range(500))
    return {"elements": 500 * 2000, "spikes": spikes}


def gradients():
    net = Residual()
    x = torch.rand(3, 4)
    for _ in range(2):  # a second pass has gradients of its own
        net.zero_grad()
        out = net(x)
        out.sum().backward()
    ones = torch.ones(3, 4)
    hidden = net.first(x).detach()
    assert all(not module._backward_hooks and not module._forward_hooks for module in net.modules())
    return {
        "inner.grad_output": (2 * ones).flatten().tolist(),
        "inner.grad_input": (2 * ones @ net.inner.weight.detach()).flatten().tolist(),
        "twice.grad_input": (5 + hidden.cos()).flatten().tolist(),
    }


def cell():
    net = Cell()
    for i in range(3):
        net(torch.full((2,), float(i)))
    return {}


def switched():
    """All off at 2, on again at 4; only the input off at 5, on again at 6."""
    import optape

    net = Cell()
    for i in range(7):
        if i == 2:
            optape.switch_watches(False)
        if i == 4:
            optape.switch_watches(True)
        if i in (5, 6):
            optape.switch_watches(i == 6, "Cell:input, output")
        net(torch.full((2,), float(i)))
    refused = 0
    for wrong in ("Cell", "Cell:", "Nothing:input", "Cell:output"):
        try:
            optape.switch_watches(False, wrong)
        except ValueError:
            refused += 1
    return {"refused": refused}


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[1]]()))


main()
