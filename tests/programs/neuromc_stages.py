"""NeuroMC with stages of the program's own.

`neuromc_stages.py live inference|training`: SpikingJelly's profiler watches, and its report is printed as a line of JSON.
`neuromc_stages.py recorded inference|training`: the same work, with `optape.stage` where the profiler's stages were.
"""

import contextlib
import dataclasses
import json
import sys

import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

# Name, what SpikingJelly is told of it.
STAGES = {
    "t0": {"phase": "forward"},
    "t1": {"phase": "forward", "reuse_weights": True},
    "learn_backward": {"phase": "backward", "batch_norm_backward": False},
    "learn_update": {"phase": "optimizer"},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.spike = neuron.IFNode()
        self.out = nn.Linear(4 * 6 * 6, 5)

    def forward(self, x):
        return self.out(self.spike(self.norm(self.conv(x))).flatten(1))


def main():
    who, what = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Net()
    inputs = [(torch.rand(3, 2, 6, 6) < 0.3).float() for _ in range(3)]
    target = torch.rand(3, 5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    profiler = None
    if who == "live":
        from spikingjelly.activation_based.op_counter.neuromc import NeuroMCEnergyProfiler

        profiler = NeuroMCEnergyProfiler()
        profiler.bind_model(net)
        profiler.bind_optimizer(optimizer)
        stage = lambda name: profiler.stage(name, **STAGES[name])  # noqa: E731
    else:
        import optape

        stage = optape.stage
    with torch.profiler.record_function("measure"), profiler or contextlib.nullcontext():
        if what == "inference":
            net.eval()
            with torch.no_grad():
                for at, x in enumerate(inputs):
                    with stage("t0" if at == 0 else "t1"):
                        net(x)
        else:
            net.train()
            with stage("t0"):
                y = net(inputs[0])
            with profiler.suspend() if profiler else contextlib.nullcontext():
                loss = nn.functional.mse_loss(y, target)
            with stage("learn_backward"):
                loss.backward()
            with stage("learn_update"):
                if profiler:
                    profiler.record_optimizer_step("learn_update")
                else:
                    optimizer.step()
    functional.reset_net(net)
    if profiler:
        report = profiler.get_report()
        print(json.dumps({field.name: getattr(report, field.name) for field in dataclasses.fields(report)}, default=str))


main()
