"""The step that every row of the benchmark runs: a small spiking convolutional network, trained.

Four time steps of two convolutions and two linear layers with SpikingJelly's neurons, cross entropy, backward, SGD with
momentum. About 330 op calls; at batch 8 a few milliseconds on one core, so that what a tool costs per op shows.
"""

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

TIME_STEPS = 4
CHANNELS, SIDE, HIDDEN = 8, 12, 64


class SpikingNet(nn.Module):
    """In multi-step mode: every layer sees all time steps at once."""

    def __init__(self):
        super().__init__()
        self.conv1 = layer.Conv2d(2, CHANNELS, 3, padding=1, bias=False, step_mode="m")
        self.norm1 = layer.BatchNorm2d(CHANNELS, step_mode="m")
        self.if1 = node()
        self.conv2 = layer.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False, step_mode="m")
        self.if2 = node()
        self.pool = layer.AvgPool2d(2, step_mode="m")
        self.flatten = layer.Flatten(step_mode="m")
        self.fc1 = layer.Linear(CHANNELS * (SIDE // 2) ** 2, HIDDEN, bias=False, step_mode="m")
        self.if3 = node()
        self.fc2 = layer.Linear(HIDDEN, 10, step_mode="m")

    def forward(self, x):
        x = self.if1(self.norm1(self.conv1(x)))
        x = self.pool(self.if2(self.conv2(x)))
        x = self.if3(self.fc1(self.flatten(x)))
        return self.fc2(x).mean(0)


def node():
    return neuron.IFNode(surrogate_function=surrogate.Sigmoid(), detach_reset=True, step_mode="m")


class Workload:
    """One network, one batch; `step()` is one training step."""

    def __init__(self, batch: int, device: str = "cpu"):
        torch.manual_seed(0)
        self.network = SpikingNet().train().to(device)
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.mul_(2)
        self.spikes = (torch.rand(TIME_STEPS, batch, 2, SIDE, SIDE) < 0.3).to(device, torch.float32)
        self.labels = torch.randint(0, 10, (batch,)).to(device)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-3, momentum=0.9)

    def step(self):
        functional.reset_net(self.network)
        loss = nn.functional.cross_entropy(self.network(self.spikes), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss
