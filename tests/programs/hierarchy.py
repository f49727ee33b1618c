"""Three training steps and a test of a network with neurons of its own, nested modules, and a layer that is used twice."""

import torch
from torch import nn

from spikingjelly.activation_based import base, functional, layer, neuron


class OwnNeuron(neuron.LIFNode):
    """A neuron whose class is the program's."""


class Leaky(base.MemoryModule):
    """Something with a state that does not spike."""

    def __init__(self):
        super().__init__()
        self.register_memory("v", 0.0)

    def single_step_forward(self, x):
        self.v = self.v * 0.5 + x
        return self.v


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = layer.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = layer.BatchNorm2d(outputs)
        self.spikes = OwnNeuron(detach_reset=True)

    def forward(self, x):
        return self.spikes(self.norm(self.conv(x)))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(Block(1, 4), Block(4, 4))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.twice = nn.Linear(16, 16)
        self.leak = Leaky()
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.pool(self.features(x)).flatten(1)
        x = self.twice(self.twice(x))
        return self.head(self.leak(x))


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Classifier()
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        functional.reset_net(net)
        out = sum(net(torch.rand(2, 1, 6, 6)) for _ in range(2)) / 2
        loss = nn.functional.mse_loss(out, nn.functional.one_hot(torch.tensor([0, 2]), 3).float())
        loss.backward()
        optimizer.step()
    net.eval()
    functional.reset_net(net)
    with torch.no_grad(), torch.profiler.record_function("test"):
        net(torch.rand(2, 1, 6, 6))


main()
