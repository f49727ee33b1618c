"""What torch.compile makes, called: `python regions.py WHAT...`, results as one line of JSON.

train      three steps of a compiled network
products   a compiled function that has no kernel of its own
writes     a compiled function one of whose kernels writes into memory that a product was seen to read before
named      a compiled function with a name of its own, of two shapes
"""

import json
import sys

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x):
        return self.second(torch.sigmoid(self.first(x)) * 2)


def train():
    torch.manual_seed(0)
    net = Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = compiled(torch.randn(4, 8)).pow(2).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def products():
    compiled = torch.compile(lambda a, b: torch.mm(a, b), fullgraph=True)
    return compiled(torch.ones(3, 3), torch.ones(3, 3)).sum().item()


@torch.compile(fullgraph=True)
def reuses(x, w):
    y = x @ w  # all ones
    z = y @ w
    # Made in the memory of y, which is needed no more; no version of any tensor tells.
    zeros = y - 1 + 0 * z
    return z, zeros @ w


def writes():
    with torch.no_grad():
        z, last = reuses(torch.eye(8), torch.ones(8, 8))
    return [z.sum().item(), last.sum().item()]


def named():
    def own(x):
        return (x.sin() + 1).sum()

    compiled = torch.compile(own, fullgraph=True, dynamic=False)
    return [compiled(torch.ones(3)).item() > 0, compiled(torch.ones(5)).item() > 0, compiled(torch.ones(3)).item() > 0]


def main():
    torch.set_num_threads(1)
    print(json.dumps({what: globals()[what]() for what in sys.argv[1:]}))


if __name__ == "__main__":
    main()
