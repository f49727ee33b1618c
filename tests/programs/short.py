"""A few training steps of a small spiking network, the last one inside a range."""

import sys

import torch
from torch import nn

from spikingjelly.activation_based import functional, neuron


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 12)
        self.spikes = neuron.LIFNode()
        self.fc2 = nn.Linear(12, 3)

    def forward(self, x):
        return self.fc2(self.spikes(self.fc1(x)))


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def step():
        optimizer.zero_grad()
        functional.reset_net(net)
        out = sum(net(torch.rand(4, 6)) for _ in range(3))
        loss = nn.functional.cross_entropy(out, torch.tensor([0, 1, 2, 0]))
        loss.backward()
        optimizer.step()

    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 20):
        step()
    with torch.profiler.record_function("measure"):
        step()
    print("done")


if __name__ == "__main__":
    main()
