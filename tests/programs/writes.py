"""Products whose factor changes between two of them, in every way in which memory can change.

Runs the named ways, or all but the last three, and prints one line of JSON: for each product, in order, what had happened to the
factor, and what it held in truth.
"""

import json
import os
import sys
import threading

import numpy as np
import torch
from torch import nn

WAYS = {}
SEEN = []
EYE = torch.eye(8)


def way(function):
    WAYS[function.__name__] = function
    return function


def spikes(seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(8, 8, generator=generator) < 0.4).float()


def product(x, what):
    """Twice: the second one may come from the recorder's cache."""
    other = EYE.to(x.dtype)
    for _ in range(2):
        torch.mm(x, other)
    # Reading through NumPy: nothing of this passes the recorder.
    with torch.no_grad():
        values = x.detach().clone().numpy()
    binary = bool(((values == 0) | (values == 1)).all())
    total = float(values.sum(dtype=np.float64))
    for _ in range(2):
        # JSON has no infinities and no NaN.
        SEEN.append({"what": what, "binary": binary, "nonzeros": int(np.count_nonzero(values)), "sum": total if np.isfinite(total) else None})


def changed(x, name, change):
    product(x, f"before {name}")
    change(x)
    product(x, f"after {name}")


@way
def in_place():
    changed(spikes(1), "mul_", lambda x: x.mul_(3))
    changed(spikes(1), "zero_", lambda x: x.zero_())
    changed(spikes(1), "setitem", lambda x: x.__setitem__((slice(None), 2), 1.0))
    changed(spikes(1), "copy_", lambda x: x.copy_(spikes(2)))
    changed(spikes(1), "masked_fill_", lambda x: x.masked_fill_(x == 0, 1.0))
    changed(spikes(1), "scatter_", lambda x: x.scatter_(0, torch.zeros(1, 8, dtype=torch.long), 1.0))
    changed(spikes(1), "index_put_", lambda x: x.index_put_((torch.tensor([0, 1]),), torch.tensor(1.0)))
    changed(spikes(1), "bernoulli_", lambda x: x.bernoulli_(0.5))
    changed(spikes(1), "_foreach_zero_", lambda x: torch._foreach_zero_([torch.ones(2), x]))
    changed(spikes(1), "relu_", lambda x: nn.functional.relu_(x.sub_(0.5)))


@way
def views():
    changed(spikes(3), "a view", lambda x: x[:4].zero_())
    changed(spikes(3), "a transposed view", lambda x: x.t()[1].fill_(1.0))
    changed(spikes(3), "a detached alias", lambda x: x.detach().zero_())
    changed(spikes(3), "as_strided", lambda x: x.as_strided((8,), (9,)).fill_(1.0))
    changed(spikes(3), "unbind", lambda x: x.unbind()[5].fill_(1.0))
    base = torch.cat([spikes(4), torch.zeros(8, 8), torch.ones(8, 8)])
    # Same storage, sizes and strides; other places.
    for first in (0, 8, 16, 4, 0):
        product(base[first : first + 8], f"rows from {first}")
    # Same storage, sizes, strides and place; other types.
    bits = spikes(5).double()
    product(bits, "doubles")
    product(bits.view(torch.int64), "their bits")


@way
def data():
    changed(spikes(6), ".data", lambda x: x.data.zero_())
    changed(spikes(6), ".data[...]", lambda x: x.data.__setitem__(0, 1.0))

    def swap(x):
        x.data = spikes(7)

    changed(spikes(6), ".data =", swap)
    parameter = nn.Parameter(spikes(6))
    changed(parameter, ".data of a parameter", lambda x: x.data.mul_(2))


@way
def numpy_aliases():
    # Memory of NumPy's, seen by torch.
    array = spikes(8).numpy().copy()
    x = torch.from_numpy(array)
    product(x, "before NumPy writes into its own array")
    array[:] = 0
    product(x, "after NumPy writes into its own array")
    # Memory of torch's, seen by NumPy: an alias made before the first product, and one made after.
    x = spikes(9)
    alias = x.numpy()
    product(x, "before NumPy writes into a tensor's memory")
    alias[:, 1:4] = 1
    product(x, "after NumPy writes into a tensor's memory")
    x = spikes(9)
    product(x, "before an alias is made")
    x.numpy()[0] = 1
    product(x, "after an alias was made and written")
    x = spikes(9)
    product(x, "before __array__")
    np.asarray(x)[2] = 5
    product(x, "after __array__")
    x = torch.from_dlpack(array)
    product(x, "before NumPy writes what it gave away by DLPack")
    array[:] = 1
    product(x, "after NumPy writes what it gave away by DLPack")


@way
def storages():
    changed(spikes(10), "untyped_storage fill_", lambda x: x.untyped_storage().fill_(0))
    changed(spikes(10), "untyped_storage copy_", lambda x: x.untyped_storage().copy_(spikes(11).untyped_storage()))
    changed(spikes(10), "untyped_storage []", lambda x: [x.untyped_storage().__setitem__(i, 0) for i in range(128)])
    buffer = bytearray(256)
    x = torch.frombuffer(buffer, dtype=torch.float32).view(8, 8)
    product(x, "before a write into a buffer")
    buffer[:] = spikes(12).numpy().tobytes()
    product(x, "after a write into a buffer")


@way
def inference():
    with torch.inference_mode():
        for seed in (13, 14):
            changed(spikes(seed), "copy_ in inference mode", lambda x: x.copy_(spikes(15)))
            changed(spikes(seed), "setitem in inference mode", lambda x: x.__setitem__(slice(0, 3), 0.0))
            changed(spikes(seed), "a view in inference mode", lambda x: x[2:].zero_())
        made = spikes(16)
    product(made, "made in inference mode")
    with torch.inference_mode():
        made.zero_()
    product(made, "written in inference mode")


@way
def other_storage():
    changed(spikes(17), "set_", lambda x: x.set_(spikes(18)))
    pool = torch.cat([spikes(19), torch.ones(8, 8)])
    changed(spikes(17), "set_ with an offset", lambda x: x.set_(pool.untyped_storage(), 64, (8, 8), (8, 1)))

    def resize(x):
        x.resize_(5, 8)

    changed(spikes(17), "resize_ to less", resize)

    def grow(x):
        x.resize_(12, 8)
        x[8:] = 1.0

    changed(spikes(17), "resize_ to more", grow)

    def refill(x):
        x.untyped_storage().resize_(0)
        x.untyped_storage().resize_(256)
        x.fill_(1.0)

    changed(spikes(17), "a storage that was freed and filled", refill)
    x, y = spikes(17), spikes(18)
    product(x, "before swap_tensors")
    torch.utils.swap_tensors(x, y)
    product(x, "after swap_tensors")
    # Addresses are used again.
    for seed in range(20, 26):
        x = spikes(seed)
        product(x, f"a new tensor of seed {seed}")
        del x


@way
def out_arguments():
    changed(spikes(27), "mul(out=)", lambda x: torch.mul(spikes(28), 1, out=x))
    changed(spikes(27), "mul(x, out=x)", lambda x: torch.mul(x, 0, out=x))
    changed(spikes(27), "ge(out=)", lambda x: torch.ge(torch.ones(8, 8), 0.5, out=x))
    changed(spikes(27), "stack(out=)", lambda x: torch.stack([torch.ones(8)] * 8, out=x))
    changed(spikes(27), "normal(out=)", lambda x: torch.normal(0.0, 1.0, (8, 8), out=x))


@way
def optimizers():
    for kind, options in (
        (torch.optim.SGD, {"lr": 1.0, "fused": True}),
        (torch.optim.Adam, {"lr": 0.5, "fused": True}),
        (torch.optim.AdamW, {"lr": 0.5, "fused": True}),
        (torch.optim.Adagrad, {"lr": 0.5, "fused": True}),
        (torch.optim.SGD, {"lr": 1.0, "foreach": True}),
        (torch.optim.Adam, {"lr": 0.5, "foreach": False}),
    ):
        x = nn.Parameter(spikes(29))
        optimizer = kind([x], **options)

        def step(x, optimizer=optimizer):
            # SGD takes every one away: zeros are left.
            x.grad = x.detach().clone()
            optimizer.step()

        changed(x, f"{kind.__name__} {options}", step)


@way
def custom_ops():
    @torch.library.custom_op("writes::openly", mutates_args={"x"}, device_types="cpu")
    def openly(x: torch.Tensor) -> None:
        x.numpy()[:] = 1

    @torch.library.custom_op("writes::secretly", mutates_args=(), device_types="cpu")
    def secretly(x: torch.Tensor) -> torch.Tensor:
        x.numpy()[:] = 0
        return x.clone()

    changed(spikes(30), "a custom op that says so", lambda x: openly(x))
    changed(spikes(30), "a custom op that does not", lambda x: secretly(x))


@way
def conclusions():
    """Values that follow from what is known of others, and values that only seem to."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.int64):
        for name, made in {
            "zeros": torch.zeros(8, 8, dtype=dtype),
            "zeros_like": torch.zeros_like(EYE, dtype=dtype),
            "new_zeros": EYE.new_zeros(8, 8, dtype=dtype),
            "ones": torch.ones(8, 8, dtype=dtype),
            "full 0": torch.full((8, 8), 0.0, dtype=dtype),
            "full 1": torch.full((8, 8), 1, dtype=dtype),
            "full 3": torch.full((8, 8), 3, dtype=dtype),
            "full -1": torch.full((8, 8), -1.0, dtype=dtype),
            "full_like": torch.full_like(EYE, 1.0, dtype=dtype),
            "expanded ones": torch.ones(1, dtype=dtype).expand(8, 8),
        }.items():
            product(made, f"{name} {dtype}")
            if name != "expanded ones":
                changed(made, f"setitem behind {name} {dtype}", lambda x: x.__setitem__(2, 1))
    known, others = spikes(37), spikes(38)
    for x in (known, others):
        product(x, "a part")
    product(torch.stack([known, others]).view(16, 8)[:8], "half of stacked")
    product(torch.cat([known[:4], others[:4]]), "rows put together")
    product(torch.cat([known, others]).t()[:, :8], "columns put together")
    both = torch.cat([known, others], 1).view(16, 8)
    product(both, "put together")
    changed(both, "one part of two", lambda x: known.zero_())
    product(torch.cat([both[:4], both[:4].double()]), "two types put together")
    product(torch.cat([known, torch.full((8, 8), 2.0)]), "a part that is not binary")
    # The memory holds zeros and ones, the tensor minus ones.
    numbers = torch.complex(torch.zeros(8, 8), others)
    imaginary = numbers.conj().imag
    assert imaginary.is_neg()
    product(torch.view_as_real(numbers)[..., 1], "the same memory")
    product(torch.cat([imaginary, imaginary]), "lazily negative parts")
    product(imaginary * 0.0, "lazily negative, times zero")
    for name, x in (("spikes", known), ("spikes again", others), ("numbers", torch.randn(8, 8)), ("infinities", torch.full((8, 8), float("inf")))):
        product(x, f"{name} before")
        product(x * 0.0, f"{name} times zero")
        product(x * 0, f"{name} times integer zero")
        product(x * 1.0, f"{name} times one")
        product(x * 2.0, f"{name} times two")
        product(x * torch.tensor(0.0), f"{name} times a tensor")
        x[0, 0] = 2.0
        product(x * 0.0, f"{name} times zero, changed")
        x[0, 0] = float("nan")
        product(x * 0.0, f"{name} times zero, with NaN")


@way
def others():
    """Other threads and processes."""

    def thread(x):
        worker = threading.Thread(target=lambda: x.zero_())
        worker.start()
        worker.join()

    changed(spikes(31), "another thread", thread)

    def process(x):
        child = os.fork()
        if child == 0:
            x.fill_(1.0)
            os._exit(0)
        os.waitpid(child, 0)

    shared = spikes(31).share_memory_()
    changed(shared, "another process", process)

    def backward(x):
        x.grad = None
        (x * 2).sum().backward()
        x.grad.zero_()
        x.data.copy_(x.grad)

    changed(nn.Parameter(spikes(31)), "backward", backward)


@way
def compiled():
    """A kernel that no dispatcher sees writes."""

    @torch.compile(fullgraph=True)
    def update(x):
        x.mul_(0).add_(1)

    x = spikes(32)
    update(x.clone())
    changed(x, "a compiled kernel", update)


@way
def convolutions():
    """One input that feeds different convolutions: what is known of it must not stand for all of them."""
    x = torch.stack([spikes(33), spikes(34)]).unsqueeze(0)
    weight = torch.ones(2, 2, 3, 3)
    for change in (None, lambda: x.mul_(torch.stack([spikes(35), spikes(36)]))):
        if change is not None:
            change()
        for options in (
            {},
            {"stride": 2},
            {"padding": 1},
            {"dilation": 2, "padding": 2},
            {"groups": 2},
            {"transposed": True, "stride": 2},
            {"transposed": True, "padding": 1},
        ):
            keywords = dict(options)
            convolve = nn.functional.conv_transpose2d if keywords.pop("transposed", False) else nn.functional.conv2d
            shaped = weight[:, :1] if "groups" in options else weight
            for _ in range(2):
                convolve(x, shaped, **keywords)
                fan_out = convolve((x != 0).double(), shaped.double(), **keywords).sum().item()
                SEEN.append({"what": str(options), "fan_out": round(fan_out)})


def main():
    torch.set_num_threads(1)
    for name in sys.argv[1:] or [n for n in WAYS if n not in ("compiled", "convolutions")]:
        WAYS[name]()
    print(json.dumps(SEEN))


main()
