"""For a machine with a GPU: the same values on the processor and on the GPU, and what a recording makes the GPU wait for.

`python gpu.py twins` runs each op twice, first on the processor, then on the GPU, with equal values, sizes and strides.
`python gpu.py steps` trains, lets torch.profiler look at some steps, and says what of CUDA was called that waits, as one line of JSON.
"""

import json
import sys

import torch
from torch import nn
from torch.nn import functional

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]

# Sizes, strides.
LAYOUTS = [
    ((), ()),
    ((0,), (1,)),
    ((3, 0, 2), (0, 2, 1)),
    ((1,), (1,)),
    ((100_003,), (1,)),
    ((1000,), (3,)),
    ((30, 40), (40, 1)),
    ((30, 40), (1, 30)),
    ((30, 40), (45, 1)),
    ((7, 4, 5, 6), (120, 1, 24, 4)),
    ((7, 4, 5), (5, 0, 1)),
    ((3, 3), (0, 0)),
    ((3, 10), (1, 1)),
    ((2, 2, 2, 2, 2, 2, 2), (64, 1, 32, 2, 16, 4, 8)),
    ((2000, 3000), (3000, 1)),
]


def values(dtype, count, kind, generator):
    """As many elements on the processor."""
    if kind == "spikes":
        return (torch.rand(count, generator=generator) < 0.2).to(dtype)
    bits = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    if kind == "bits" and dtype is not torch.bool:
        return bits.view(dtype)  # NaN, infinities, subnormal numbers, the least and the greatest
    numbers = torch.tensor([0.0, -0.0, 1.0, 0.5, -3.0, 7.25, 100.0])
    if not (dtype.is_floating_point or dtype.is_complex):
        numbers = numbers.abs()
    chosen = numbers[torch.randint(0, len(numbers), (count,), generator=generator)]
    return chosen.to(dtype)


def twin(value, sizes, strides):
    """A tensor on the processor, and the same on the GPU, its memory laid out the same way."""
    return value.as_strided(sizes, strides), value.cuda().as_strided(sizes, strides)


def twins():
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for kind in ("spikes", "numbers", "bits"):
            for sizes, strides in LAYOUTS:
                reach = sum((size - 1) * stride for size, stride in zip(sizes, strides)) if 0 not in sizes else 0
                for tensor in twin(values(dtype, reach + 1, kind, generator), sizes, strides):
                    tensor.clone()

    def spikes(*sizes):
        return (torch.rand(sizes, generator=generator) < 0.2).float()

    def weights(*sizes):
        return torch.randn(sizes, generator=generator)

    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        for make in (spikes, weights):
            for run, *operands in [
                (torch.mm, spikes(40, 300), make(300, 20)),
                (torch.bmm, spikes(5, 40, 30), make(5, 30, 20)),
                (torch.addmm, weights(20), spikes(40, 300), make(300, 20)),
                (lambda x, w: functional.conv1d(x, w, stride=2, padding=1), spikes(4, 6, 30), make(8, 6, 3)),
                (lambda x, w: functional.conv2d(x, w, padding=1, groups=2), spikes(4, 6, 15, 13), make(8, 3, 3, 3)),
                (
                    lambda x, w: functional.conv2d(x, w, stride=(2, 1), dilation=2),
                    spikes(4, 6, 15, 13).contiguous(memory_format=torch.channels_last),
                    make(8, 6, 3, 3),
                ),
                (lambda x, w: functional.conv3d(x, w, padding=(0, 1, 2)), spikes(2, 3, 6, 7, 8), make(4, 3, 2, 3, 3)),
                (lambda x, w: functional.conv_transpose2d(x, w, stride=2), spikes(2, 6, 7, 5), make(6, 4, 3, 3)),
            ]:
                run(*operands)
                run(*(operand.cuda() for operand in operands))
    torch.cuda.synchronize()
    torch.ones(1).clone()  # a record behind all, with which the last answers are read


def steps():
    """Zero synchronizations: of the bare step and of the recorded one the same calls that wait are seen."""
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 12 * 12, 10)).cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    x = torch.rand(16, 2, 12, 12, device="cuda").round()
    y = torch.randint(0, 10, (16,), device="cuda")

    def step():
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(5):
            step()
    waits = {}
    launches = 0
    for event in profiled.events():
        name = event.name
        if "ynchronize" in name or name in ("cudaMalloc", "cuMemAlloc_v2", "cudaMemcpy", "cuMemcpyDtoH_v2"):
            waits[name] = waits.get(name, 0) + 1
        launches += "LaunchKernel" in name
    # The profiler itself waits once when it ends.
    print(json.dumps({"waits": waits, "launches": launches}))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("NOT RUN: torch sees no GPU here")
    {"twins": twins, "steps": steps}[sys.argv[1]]()
