"""What `--level full` takes beside values, held against plain Python: what of products and convolutions is not empty, and what is
alive.

`levels.py occupancy`: one line of JSON, for each convolution and product in order, what it should have.
`levels.py memory`: allocations of known size, and for each mark how many bytes are alive.
"""

import gc
import itertools
import json
import sys

import torch
from torch import nn

BLOCKS = (4, 16, 32, 64, 128, 256)
SEEN = []


def spikes(*sizes, rate=0.1):
    return (torch.rand(*sizes) < rate).float()


def convolution(x, weight, transposed=False, **options):
    """Runs it, and looks at every output's receptive field."""
    d = weight.dim() - 2
    run = (nn.functional.conv_transpose1d, nn.functional.conv_transpose2d, nn.functional.conv_transpose3d) if transposed else (
        nn.functional.conv1d,
        nn.functional.conv2d,
        nn.functional.conv3d,
    )
    out = run[d - 1](x, weight, **options)
    groups = options.get("groups", 1)
    each = lambda name, default: [options.get(name, default)] * d  # noqa: E731
    stride, padding, dilation = each("stride", 1), each("padding", 0), each("dilation", 1)
    # Plain lists from here on: nothing of this is an op.
    sizes, kernel, output = list(x.shape), list(weight.shape[2:]), list(out.shape[2:])
    channels, outputs = sizes[1], out.shape[1]
    values, weights = x.tolist(), weight.tolist()

    def at(nested, index):
        for i in index:
            nested = nested[i]
        return nested

    binary_weight = all(v in (0.0, 1.0) for v in flat(weights))
    expected = {
        "op": "aten::convolution",
        "what": f"{sizes} {list(weight.shape)} {options}",
        "outputs": 0,
        "sites": 0,
        "rows": [0] * -(-channels // 4),
        "patches": {str(size): [0] * -(-channels // size) for size in BLOCKS},
        "product": 0 if binary_weight else None,
    }
    for n in range(sizes[0]):
        for o in itertools.product(*map(range, output)):
            met = []
            for k in itertools.product(*map(range, kernel)):
                p = []
                for i in range(d):
                    if transposed:
                        far = o[i] + padding[i] - k[i] * dilation[i]
                        p.append(far // stride[i] if far % stride[i] == 0 else -1)
                    else:
                        p.append(o[i] * stride[i] - padding[i] + k[i] * dilation[i])
                if all(0 <= p[i] < sizes[2 + i] for i in range(d)):
                    met.append((p, k))
            active = {}
            for c in range(channels):
                hits = [k for p, k in met if at(values, [n, c, *p]) != 0]
                expected["rows"][c // 4] += len(hits)
                if hits:
                    active[c] = hits
            expected["sites"] += bool(active)
            per_group = channels // groups
            expected["outputs"] += len({c // per_group for c in active}) * (outputs // groups)
            for size in BLOCKS:
                for block in {c // size for c in active}:
                    expected["patches"][str(size)][block] += 1
            if binary_weight:
                for of in range(outputs):
                    group, inner = divmod(of, outputs // groups)
                    expected["product"] += any(
                        at(weights, [c, inner, *k] if transposed else [of, c - group * per_group, *k]) != 0
                        for c, hits in active.items()
                        if c // per_group == group
                        for k in hits
                    )
    SEEN.append(expected)


def flat(nested):
    if isinstance(nested, list):
        for inner in nested:
            yield from flat(inner)
    else:
        yield nested


def lines(matrices):
    """Rows and columns with a nonzero, of nested lists [batch][row][column]."""
    rows = sum(any(row) for matrix in matrices for row in matrix)
    return [rows, sum(any(column) for matrix in matrices for column in zip(*matrix))]


def product(op, x, y, run):
    run()
    batched = lambda t: t.tolist() if t.dim() == 3 else [t.tolist()]  # noqa: E731
    a, b = batched(x), batched(y)
    is_binary = lambda t: all(v in (0.0, 1.0) for v in flat(t))  # noqa: E731
    outputs = None
    if is_binary(a) and is_binary(b):
        outputs = sum(
            any(u and v for u, v in zip(row, column)) for m, n in zip(a, b) for row in m for column in zip(*n)
        )
    SEEN.append({
        "op": op,
        "what": f"{list(x.shape)} {list(y.shape)}",
        "first": lines(a) if is_binary(a) else None,
        "second": lines(b) if is_binary(b) else None,
        "product": outputs,
    })


def occupancy():
    torch.manual_seed(1)
    w = torch.rand
    convolution(spikes(2, 6, 8, 8), w(5, 6, 3, 3), padding=1)
    convolution(spikes(2, 21, 7, 7), w(4, 21, 3, 3), stride=2, padding=1)
    convolution(spikes(1, 70, 5, 5, rate=0.02), w(3, 70, 3, 3), dilation=2, padding=2)
    convolution(spikes(1, 258, 4, 4, rate=0.01), w(2, 258, 1, 1))
    convolution(spikes(2, 8, 6, 6), w(4, 4, 3, 3), groups=2)
    convolution(spikes(2, 6, 6, 6), w(6, 1, 3, 3), groups=6, padding=1)
    convolution(spikes(2, 4, 20), w(3, 4, 5), stride=3)
    convolution(spikes(1, 3, 4, 5, 4), w(2, 3, 2, 2, 2))
    convolution(spikes(2, 6, 5, 5), w(6, 4, 3, 3), transposed=True, stride=2, padding=1)
    convolution(spikes(2, 6, 5, 5).to(memory_format=torch.channels_last), w(5, 6, 3, 3), padding=1)
    convolution(spikes(2, 4, 6, 6).half(), w(3, 4, 3, 3).half())
    convolution(spikes(1, 4, 6, 6), spikes(3, 4, 3, 3, rate=0.3), padding=1)
    convolution(torch.zeros(1, 4, 6, 6), w(3, 4, 3, 3))
    x, y, m = spikes(30, 40), w(40, 20), spikes(40, 50, rate=0.05)
    product("aten::mm", x, y, lambda: torch.mm(x, y))
    product("aten::mm", x.t(), m.t()[:30].t().t(), lambda: torch.mm(x.t(), m.t()[:30].t().t()))
    product("aten::mm", y.t(), m, lambda: torch.mm(y.t(), m))
    product("aten::mm", x, m, lambda: torch.mm(x, m))
    weight, bias = w(9, 40), w(9)
    product("aten::addmm", x, weight.t(), lambda: nn.functional.linear(x, weight, bias))
    q, k = spikes(3, 6, 8), spikes(3, 8, 5)
    product("aten::bmm", q, k, lambda: torch.bmm(q, k))
    print(json.dumps(SEEN))


def alive(known):
    """Bytes of the storages of all tensors that Python holds and that were not there at the start."""
    gc.collect()
    storages = {}
    tensors = [thing for thing in gc.get_objects() if torch.is_tensor(thing)]
    # Gradients belong to C++, and have no Python object unless somebody asks.
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        from spikingjelly.activation_based import neuron

        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fire = neuron.LIFNode()
        self.out = nn.Linear(8 * 36, 5)

    def forward(self, x):
        return self.out(self.fire(self.norm(self.conv(x))).flatten(1))


def memory():
    torch.manual_seed(1)
    known = {t.untyped_storage()._cdata for t in gc.get_objects() if torch.is_tensor(t)}
    report = {"marks": []}

    def mark(name):
        report["marks"].append({"name": name, "alive": alive(known)})
        # An op that everybody finds again in the tape.
        with torch.profiler.record_function(f"mark {name}"):
            pass

    kept = []
    mark("nothing")
    live = peak = 0
    sizes = [1000, 7, 50_000, 3, 20_000, 20_000, 1, 90_000, 400]
    with torch.profiler.record_function("allocations"):
        for size in sizes:
            kept.append(torch.full((size,), 2.5))
            live += 4 * size
            peak = max(peak, live)
            if len(kept) == 4:
                live -= 4 * len(kept.pop(0))
    report["peak"], report["left"] = peak, live
    mark("kept")
    # A view keeps memory alive when its base has gone.
    view = kept[-1][:2]
    kept.clear()
    del kept
    mark("a view")
    for _ in range(5):
        view.view(2, 1).transpose(0, 1)
    grown = torch.zeros(10)
    grown.resize_(5000)
    mark("resized")
    del view, grown
    mark("all gone")
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    from spikingjelly.activation_based import functional

    for _ in range(3):
        optimizer.zero_grad()
        loss = sum(net(spikes(4, 2, 6, 6)).square().mean() for _ in range(3))
        loss.backward()
        optimizer.step()
        functional.reset_net(net)
        del loss
    mark("trained")
    print(json.dumps(report))


torch.set_num_threads(1)
{"occupancy": occupancy, "memory": memory}[sys.argv[1]]()
