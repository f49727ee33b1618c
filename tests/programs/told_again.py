"""Three recordings of one process, each of which is to be told what modules and optimizers are. The second watches one and is at level full.

Argument: a directory for the traces.
"""

import os
import sys

import torch
from torch import nn

import optape


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = 1
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(x) * self.factor


def main():
    torch.set_num_threads(1)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def train():
        optimizer.zero_grad()
        net(torch.ones(2, 6)).sum().backward()
        optimizer.step()

    asked = [[], ["--level", "full", "--watch", "Linear:output", "--keep", "values"], []]
    for number, options in enumerate(asked):
        with optape.record(os.path.join(sys.argv[1], f"{number}.optape"), options=options):
            train()
        net.factor = number + 2  # While nobody records.
        train()


main()
