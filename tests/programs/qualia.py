"""Networks for Qualia's metrics: `qualia.py KIND` runs one, `qualia.py KIND --live` prints what Qualia's own packages (2.6.0) say of it, which
tests/fixtures/qualia holds. Weights and inputs lie on a coarse grid, so that spikes are exact."""

import json
import sys
import types

import torch
from torch import nn

from spikingjelly.activation_based import base, functional, layer, neuron

torch.set_num_threads(1)

try:
    from qualia_plugin_snn.learningmodel.pytorch.layers.spikingjelly.Add import Add
except ImportError:

    class Add(nn.Module, base.StepModule):
        def __init__(self):
            super().__init__()
            self.step_mode = "s"
            self.functional = torch.ao.nn.quantized.FloatFunctional()

        def forward(self, a, b):
            return self.functional.add(a, b)

    Add.__module__ = "qualia_plugin_snn.learningmodel.pytorch.layers.spikingjelly.Add"
    Add.__qualname__ = "Add"


def grid(gen, shape, lo, hi, denom):
    return torch.randint(lo, hi + 1, tuple(shape), generator=gen).float() / denom


class Formal(nn.Module):
    """No spikes: a residual addition that is a function, groups, a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.input_shape = (8, 8, 2)
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.wide = nn.Conv2d(4, 4, (3, 5), padding=(1, 2), groups=2)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU6())
        self.last = nn.Linear(64, 3)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.pool(self.wide(x) + x)
        x = torch.flatten(x, 1)
        x = self.head(x)
        return self.last(self.head(x))


class Spiking(nn.Module, base.StepModule):
    is_snn = True
    timesteps = 4

    def __init__(self, step_mode, input_shape):
        super().__init__()
        self.step_mode = step_mode
        self.input_shape = input_shape


class Multi(Spiking):
    """One-dimensional, all time steps in one call, batch norms between layers and neurons."""

    def __init__(self):
        super().__init__("m", (4, 16, 2))
        self.conv1 = layer.Conv1d(2, 4, 3, padding=1, bias=False)
        self.bn1 = layer.BatchNorm1d(4)
        self.if1 = neuron.IFNode()
        self.pool1 = layer.MaxPool1d(2)
        self.conv2 = layer.Conv1d(4, 6, 4, stride=3, groups=2)
        self.bn2 = layer.BatchNorm1d(6)
        self.lif2 = neuron.LIFNode(tau=2.0)
        self.flatten = layer.Flatten()
        self.fc = layer.Linear(12, 3)
        self.plif = neuron.ParametricLIFNode(init_tau=2.0)
        functional.set_step_mode(self, "m")

    def forward(self, x):
        x = self.pool1(self.if1(self.bn1(self.conv1(x))))
        x = self.lif2(self.bn2(self.conv2(x)))
        return self.plif(self.fc(self.flatten(x)))


class Residual(Spiking):
    """Spikes are added to spikes, which makes numbers that count as spikes; an analog input into a leaky neuron."""

    def __init__(self):
        super().__init__("s", (4, 6, 6, 1))
        self.conv1 = layer.Conv2d(1, 3, 3, padding=1)
        self.lif1 = neuron.LIFNode(tau=2.0, v_reset=None)
        self.conv2 = layer.Conv2d(3, 3, 3, padding=1, bias=False)
        self.if2 = neuron.IFNode()
        self.add = Add()
        self.block = nn.Sequential(layer.Conv2d(3, 2, 2, stride=2), neuron.IFNode(v_reset=None))
        self.flatten = layer.Flatten()
        self.fc = layer.Linear(18, 4)

    def forward(self, x):
        x = self.lif1(self.conv1(x))
        x = self.add(self.if2(self.conv2(x)), x)
        return self.fc(self.flatten(self.block(x)))


def build(kind):
    gen = torch.Generator().manual_seed(31)
    model = {"formal": Formal, "multi": Multi, "fused": Multi, "residual": Residual}[kind]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 0:
                p.copy_(grid(gen, p.shape, -4, 9, 16))
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_var.fill_(1 - m.eps)
    if kind == "formal":
        images = [grid(gen, (2, 2, 8, 8), -8, 8, 8)]

        def run(of):
            with torch.no_grad():
                return [of(x) for x in images]

    elif kind == "residual":
        images = [grid(gen, (3, 1, 6, 6), 0, 16, 16) for _ in range(2)]

        def run(of):
            with torch.no_grad():
                for x in images:
                    functional.reset_net(of)
                    for _ in range(of.timesteps):
                        of(x)

    else:
        spikes = [(torch.rand((4, 3, 2, 16), generator=gen) < 0.4).float() for _ in range(2)]

        def run(of):
            with torch.no_grad():
                for x in spikes:
                    functional.reset_net(of)
                    of(x)

    return model, run


def live(kind):
    from qualia_plugin_snn.learningframework.SpikingJelly import SpikingJelly
    from qualia_plugin_snn.postprocessing import EnergyEstimationMetric, FuseBatchNorm, OperationCounter

    model, run = build(kind)
    framework = object.__new__(SpikingJelly)
    framework.predict = lambda **of: run(of["model"])
    if kind == "fused":
        fused = FuseBatchNorm(evaluate=False).fuse(model, torch.fx.GraphModule, framework)
        fused.input_shape = model.input_shape
        model = fused
    told = {}

    def logger(into):
        class Logger:
            def __init__(self, **_):
                pass

            def __call__(self, row):
                into.append(row._asdict())

        return Logger

    for name, metric in [
        ("mem8", EnergyEstimationMetric(8, 64)),
        ("mem16_op_quadratic", EnergyEstimationMetric(16, 64, op_estimation_type={"add": "quadratic", "mul": "quadratic"})),
        ("mem32_sram_new", EnergyEstimationMetric(32, 64, sram_estimation_type="new")),
        ("mem32_include_nonbinary", EnergyEstimationMetric(32, 64, total_spikerate_exclude_nonbinary=False)),
        ("operations", OperationCounter()),
    ]:
        rows = told[name] = []
        sys.modules[type(metric).__module__].Logger = logger(rows)
        result = types.SimpleNamespace(
            model=model, framework=framework, testset=None, batch_size=3, dataaugmentations=[], name=kind, experimenttracking=None
        )
        metric(result, None)
    return told


def main():
    kind = sys.argv[1]
    if "--live" in sys.argv:
        print(json.dumps(live(kind), indent=1, default=float))
        return
    model, run = build(kind)
    with torch.profiler.record_function("measure"):
        run(model)


main()
