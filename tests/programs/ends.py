"""Ways for a program to end: `python ends.py HOW`, after some work."""

import os
import resource
import signal
import sys
import time

import torch
from torch import nn


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x) @ torch.zeros(4)


def main():
    how = sys.argv[1]
    # A shell without job control starts what runs behind it with SIGINT and SIGQUIT ignored; here they are to arrive.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    for _ in range(10):
        net(torch.ones(2, 3)).sum().backward()
    print("worked", net[0].weight.grad.sum().item(), flush=True)
    print("complained", file=sys.stderr, flush=True)
    if how == "code":
        sys.exit(3)
    elif how == "text":
        sys.exit("goodbye")
    elif how == "hard":
        os._exit(4)
    elif how == "error":
        raise ValueError("the program's own mistake")
    elif how == "module":
        Fails()(torch.ones(2, 3))
    elif how == "backward":
        x = torch.ones(2, requires_grad=True)
        x.register_hook(lambda grad: 1 / 0)
        x.exp().sum().backward()
    elif how == "waits":
        time.sleep(100)
    else:
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(100)


main()
