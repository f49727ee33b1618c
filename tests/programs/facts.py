"""Two training steps of a small network whose facts are known, and changes to it on the way."""

import copy
import pickle

import torch
from torch import nn

from spikingjelly.activation_based import base, functional, layer, neuron, surrogate


class Own(base.MemoryModule):
    """A neuron of the program's: assigns its state in the middle of a step."""

    def __init__(self):
        super().__init__()
        self.register_memory("v", 0.0)
        self.scale = 0.5
        self.spread = float("inf")
        self.sizes = (1, [2, 3])
        self.offset = torch.zeros(2)
        self.function = torch.relu

    def single_step_forward(self, x):
        self.v = self.v + x * self.scale
        spike = (self.v >= 1.0).to(x)
        self.v = self.v - spike
        return spike


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = layer.Conv2d(1, 2, 3, padding=1, groups=1, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.spikes = neuron.LIFNode(tau=4.0, v_threshold=0.75, surrogate_function=surrogate.ATan())
        self.own = Own()
        self.head = nn.Linear(2 * 4 * 4, 3)
        self.never = nn.Dropout(0.25)

    def forward(self, x, scale=None):
        x = self.own(self.spikes(self.norm(self.conv(x))))
        return self.head(x.flatten(1)) * scale["by"][0]


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    by = [torch.ones(1)]
    for _ in range(2):
        functional.reset_net(net)
        optimizer.zero_grad()
        for _ in range(2):
            out = net(torch.rand(2, 1, 4, 4), scale={"by": by})
        out.sum().backward()
        optimizer.step()
        schedule.step()
        net.spikes.v_threshold = 0.5
        net.own.scale = 0.25
    net.eval()
    functional.reset_net(net)
    net(torch.rand(2, 1, 4, 4), scale={"by": by})
    functional.reset_net(net)
    other = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert set(vars(other.own)) == set(vars(Own())), vars(other.own)


main()
