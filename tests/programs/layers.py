"""Networks for estimators of layers. The run inside of record_function("measure") is what replay is asked about; afterwards sinabs' own tools
watch the same run live, on a copy of the model, and what they say goes to stdout."""

import copy
import json
import sys
import warnings

import torch
from torch import nn

import sinabs.layers as sl
from sinabs.hooks import register_synops_hooks
from sinabs.synopcounter import SNNAnalyzer, SynOpCounter

torch.manual_seed(7)
torch.set_num_threads(1)
warnings.simplefilter("ignore")


def spikes(*shape, rate=0.3):
    return (torch.rand(shape) < rate).float()


class Towers(nn.Module):
    """No Sequential: two ways over the same input, one of them through a residual addition, the layers behind it called in a loop."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        y = self.act(self.norm(self.stem(x)))
        y = self.branch(y) + y
        y = y.mean((2, 3))
        out = torch.zeros(len(x), 3)
        for _ in range(3):
            out = out + self.head(y)
        return out


def squeezed():
    """A convolution whose kernel, stride, padding and dilation differ by axis, a pooling of another stride, spikes of several at once."""
    return nn.Sequential(
        nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, bias=False),
        sl.IAFSqueeze(batch_size=2),
        nn.AvgPool2d((2, 1), stride=2),
        nn.Conv2d(6, 3, 1),
        sl.IAFSqueeze(num_timesteps=4, min_v_mem=-1.0),
        nn.Flatten(),
        nn.Linear(12, 4, bias=False),
        sl.LIFSqueeze(tau_mem=10.0, num_timesteps=4),
    ).eval(), [spikes(8, 2, 8, 6)]


def unsqueezed():
    """Batch and time in dimensions of their own, three calls, one neuron at the end, an integrator that does not spike."""
    return nn.Sequential(
        nn.Linear(5, 6), sl.IAF(), nn.Linear(6, 4, bias=False), sl.LIF(tau_mem=5.0), sl.ExpLeak(tau_mem=3.0), nn.Linear(4, 1), sl.IAF()
    ).eval(), [spikes(2, 7, 5), spikes(2, 7, 5, rate=0.9), spikes(2, 7, 5, rate=0.0)]


def circular():
    """The convolution's op sees an input that was padded before; sinabs counts connections as if it were not."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), sl.IAFSqueeze(batch_size=1)
    ).eval(), [spikes(3, 1, 5, 5)]


def relu():
    """SynOpCounter's networks: a ReLU that stands for spikes."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        sl.NeuromorphicReLU(fanout=5),
        nn.Flatten(),
        nn.Linear(48, 6),
        sl.NeuromorphicReLU(fanout=0),
        nn.Linear(6, 4),
        sl.NeuromorphicReLU(quantize=False, fanout=3),
    ).eval(), [torch.randn(5, 1, 6, 6) * 3]


def plain():
    return Towers().eval(), [torch.randn(2, 2, 6, 6)]


def words():
    """A padding that is a word: sinabs fails at it."""
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding="same")).eval(), [spikes(2, 1, 4, 4)]


def silent():
    return nn.Sequential(nn.Linear(3, 2, bias=False), sl.IAF()).eval(), [torch.zeros(2, 3, 3)]


def half():
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).eval().to(torch.bfloat16), [spikes(3, 2, 8).to(torch.bfloat16)]


def reduced(value):
    if isinstance(value, torch.Tensor):
        if value.numel() == 1:
            return reduced(value.item())
        wide = value.double()
        binary = bool(((value == 0) | (value == 1)).all())
        nonzeros = int(value.count_nonzero())
        return {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "sum": reduced(wide.sum().item()),
            "mean": reduced(wide.mean().item()),
            "nnz": nonzeros,
            "firing_rate": nonzeros / value.numel() if binary else None,
        }
    if isinstance(value, dict):
        return {str(key): reduced(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [reduced(one) for one in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def told(ask):
    try:
        with torch.no_grad():
            return reduced(ask())
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}


def main(kind):
    model, inputs = globals()[kind]()
    watched = copy.deepcopy(model)
    hooked = copy.deepcopy(model)
    counted = copy.deepcopy(model)
    with torch.no_grad(), torch.profiler.record_function("measure"):
        for x in inputs:
            model(x)

    def run(of):
        for x in inputs:
            of(x)

    result = {}
    analyzer = SNNAnalyzer(watched, dt=2.0)
    failure = told(lambda: run(watched))
    for name, average in [("analyzer", False), ("analyzer_average", True)]:
        result[name] = failure or told(
            lambda: {
                "layer_statistics": analyzer.get_layer_statistics(average=average),
                "model_statistics": analyzer.get_model_statistics(average=average),
            }
        )

    def hooks():
        register_synops_hooks(hooked, dt=2.0)
        run(hooked)
        return {key: value for key, value in hooked.hook_data.items()}

    result["synops_hooks"] = told(hooks)
    for name, together in [("synop_counter", True), ("synop_counter_layers", False)]:

        def count():
            counter = SynOpCounter(counted.modules(), sum_activations=together)
            run(counted)
            return counter()

        result[name] = told(count)
    print(json.dumps(result))


main(sys.argv[1])
