"""The hook sees the op stream that a TorchDispatchMode sees, with every key, boxed and not.

`detach` and `alias` are left out (a mode hides and adds some), and where C++ code asks whether a mode is active and then takes
another op, the pair is in MODE_TAKES.
"""

import difflib
import os
import subprocess
import sys
import warnings

import torch
import torch.nn.functional as F
from harness import Hook
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

# at::isTensorSubclassLike is true for everything while a mode is active.
MODE_TAKES = {
    "aten._reshape_alias.default": "aten.view.default",
    "aten.bitwise_and_.Tensor": "aten.bitwise_and.Tensor",
}
UNCOUNTED = {"aten.detach.default", "aten.detach_.default", "aten.alias.default"}


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.library.custom_op("optape_test::in_python", mutates_args=())
def in_python(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) * 2 + x.mean()


in_python.register_autograd(lambda ctx, g: torch.cos(g) * 3, setup_context=lambda ctx, inputs, output: None)
library = torch.library.Library("optape_test", "FRAGMENT")
for name, key in (("implicit", "CompositeImplicitAutograd"), ("cpu", "CPU"), ("explicit", "CompositeExplicitAutograd")):
    library.define(f"{name}(Tensor x) -> Tensor")
    library.impl(name, lambda x: torch.sin(x) + torch.cos(x), key)


class Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        a = g * torch.sigmoid(x)
        a.add_(g)
        a += x
        return a


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def custom_op():
    torch.ops.optape_test.in_python(leaf(3, 4)).sum().backward()


def custom_op_without_grad():
    torch.ops.optape_test.in_python(torch.randn(3))
    torch.ops.optape_test.cpu(torch.randn(3))
    torch.ops.optape_test.explicit(torch.randn(3))


def composite_op():
    torch.ops.optape_test.implicit(leaf(3)).sum().backward()


def autograd_function():
    x = leaf(3, 4)
    (Surrogate.apply(x) + Surrogate.apply(x) * x).sum().backward()


def checkpointing():
    for reentrant in (False, True):
        m = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        checkpoint(m, leaf(2, 4), use_reentrant=reentrant).sum().backward()


def transforms():
    torch.vmap(lambda a, b: (a * b).sum().sin())(torch.randn(3, 4), torch.randn(3, 4))
    torch.func.grad(lambda a: (a * a).sum().sin())(torch.randn(4))
    torch.vmap(torch.func.grad(lambda a: F.linear(a, torch.ones(2, 4)).sum()))(torch.randn(3, 4))
    torch.func.jvp(lambda a: a.sin(), (torch.randn(3),), (torch.ones(3),))


def autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nn.Linear(4, 4)(torch.randn(2, 4)).sum().backward()


def inference_mode():
    m = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 4))
    with torch.inference_mode():
        m(torch.randn(2, 1, 8, 8))
        F.softmax(torch.randn(3, 3), -1) @ torch.randn(3, 3)
        torch.einsum("ij,jk->ik", torch.randn(2, 3), torch.randn(3, 2))


def networks():
    out, _ = nn.LSTM(4, 5, 2)(torch.randn(3, 2, 4))
    out.sum().backward()
    x = torch.randn(2, 3, 8)
    out, _ = nn.MultiheadAttention(8, 2, batch_first=True)(x, x, x)
    out.sum().backward()
    nn.Linear(4, 3)(leaf(2, 3, 2, 4)).sum().backward()
    nn.Linear(4, 3)(leaf(2, 4, 3).transpose(1, 2)).sum().backward()
    with torch.no_grad():
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()(x)
    bn = nn.BatchNorm1d(3)
    bn(torch.randn(4, 3)).sum().backward()
    bn.eval()(torch.randn(4, 3))


def unusual_tensors():
    s = torch.eye(4).to_sparse()
    s @ torch.randn(4, 2)
    s.to_dense()
    torch.eye(4).to_sparse_csr() @ torch.randn(4, 2)
    n = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)])
    n.to_padded_tensor(0)
    n + n
    torch.randn(1, 3, 8, 8).to_mkldnn().relu().to_dense()
    torch.quantize_per_tensor(torch.randn(3, 3), 0.1, 0, torch.qint8).dequantize()
    torch.empty(3, device="meta") + 1


def complex_numbers():
    c = torch.randn(3, dtype=torch.cfloat, requires_grad=True)
    (c.conj() * c).real.sum().backward()
    torch.fft.fft(torch.randn(3, dtype=torch.cfloat))


def double_backward():
    x = leaf(3)
    (g,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    (g * g).sum().backward()
    # Their formulas of double backward add in place themselves.
    for norm in (nn.BatchNorm1d(3), nn.LayerNorm(3)):
        x = leaf(4, 3)
        (g,) = torch.autograd.grad(norm(x).pow(2).sum(), x, create_graph=True)
        g.pow(2).sum().backward()


def gradient_hooks():
    for hook in (lambda g: g.add_(1), lambda g: g + 1):
        x = leaf(3)
        y = x * 2
        y.register_hook(hook)
        (y.sin() + y.cos()).sum().backward()


def accumulation():
    m = nn.Linear(4, 4)
    for _ in range(3):
        m(m(leaf(2, 4))).sum().backward()


def optimizers():
    m = nn.Linear(4, 4)
    for optimizer in (
        torch.optim.Adam(m.parameters(), foreach=True),
        torch.optim.Adam(m.parameters(), fused=True),
        torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
    ):
        m(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def _script(x: torch.Tensor):
    return (x + 1).sin() * x


def scripts():
    f = torch.jit.script(_script)
    for _ in range(3):
        f(torch.randn(3))


def numbers_and_indices():
    torch.arange(3), torch.full((2,), 3.0), torch.linspace(0, 1, 3), torch.eye(2), torch.zeros(2, 3)
    x = torch.randn(4, 5)
    x[1], x[:, 1:3], x[torch.tensor([0, 1])], x[..., None]
    x[0] = 1.0
    x[x > 0] = 0
    float(x.sum()), bool((x > 0).any())
    F.gelu(x, approximate="tanh"), torch.div(x, 2, rounding_mode="floor")


def many_tensors():
    tensors = [torch.ones(2, 3) for _ in range(700)]
    torch._foreach_add_(tensors, tensors)
    torch.cat(tensors)


PROGRAMS = (
    custom_op,
    custom_op_without_grad,
    composite_op,
    autograd_function,
    checkpointing,
    transforms,
    autocast,
    inference_mode,
    networks,
    unusual_tensors,
    complex_numbers,
    double_backward,
    gradient_hooks,
    accumulation,
    optimizers,
    scripts,
    numbers_and_indices,
    many_tensors,
)
# DeferredInit lies above autograd: composite ops are taken apart there, lazily conjugated tensors are not materialised yet.
NOT_ABOVE_AUTOGRAD = {"inference_mode", "complex_numbers"}


def as_mode_names(lines):
    for line in lines:
        if line.startswith(("> ", "< ", "watch", "abort")):
            continue
        name, *marks = line.split()
        if "ACC" in marks:
            assert name == "aten::add_.Tensor", line
            name = "aten::add.Tensor"
        name = name.replace("::", ".")
        name = MODE_TAKES.get(name, name)
        if name not in UNCOUNTED:
            yield name


def difference(expected, seen):
    matcher = difflib.SequenceMatcher(a=expected, b=seen, autojunk=False)
    return [(expected[a:b], seen[c:d]) for kind, a, b, c, d in matcher.get_opcodes() if kind != "equal"]


def compare_with_mode(hook):
    key = hook.library.optape_hook_key().decode()
    for program in PROGRAMS:
        if key == "DeferredInit" and program.__name__ in NOT_ABOVE_AUTOGRAD:
            continue
        torch.manual_seed(0)
        program()
        with Seen() as mode:
            program()
        expected = [name for name in mode.ops if name not in UNCOUNTED]
        seen = list(as_mode_names(hook.lines(program)))
        wrong = difference(expected, seen)
        assert not wrong, f"{program.__name__} with {key}: mode saw, hook saw: {wrong}"
        assert seen


def not_executed(hook):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def fake():
        with FakeTensorMode():
            (torch.empty(3) + 1).sum()

    def symbolic():
        make_fx(lambda a: a.sin() + 1, tracing_mode="symbolic")(ready)

    ready = torch.randn(3)
    for program in (fake, symbolic):
        program()
        lines = hook.lines(program)
        assert lines, program
        # Ops on tensors that exist run on the side, making constants for instance.
        executed = {line.split()[0] for line in lines if not line.endswith(" NOTEXEC")}
        assert not executed & {"aten::add.Tensor", "aten::sum.default", "aten::sin.default"}, executed


def higher_order_operators(hook):
    condition = torch.tensor(True)
    x = torch.ones(3)
    lines = hook.lines(lambda: torch.cond(condition, torch.sin, torch.cos, (x,)))
    assert "aten::sin.default" in lines and "aten::cos.default" not in lines, lines


def kernels_that_fail(hook):
    def fails():
        try:
            torch.ones(3) @ torch.ones(4)
        except RuntimeError as error:
            assert "inconsistent tensor size" in str(error), error
        else:
            raise AssertionError("no error")
        torch.ones(2)

    lines = hook.lines(fails)
    assert lines.count("abort aten::dot.default") == 1, lines
    assert lines[-1] == "aten::ones.default", lines


def paused(hook):
    hook.mock.mock_record(0)
    lines = hook.lines(networks)
    hook.mock.mock_record(1)
    assert not lines, lines
    assert hook.lines(lambda: torch.ones(2)) == ["aten::ones.default"]


def watches(hook):
    x = torch.ones(3, requires_grad=True)

    def program():
        torch.ops.optape.watch(x, 7)
        hook.library.optape_hook_watch(x._cdata, 8)
        torch.ops.optape.watch(torch.ones(2, device="meta"), 9)

    lines = hook.lines(program)
    assert [line for line in lines if line.startswith("watch")] == ["watch 7", "watch 8"], lines
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        torch.ops.optape.watch(torch.empty(2), 1)


def storages(hook):
    def program():
        a = torch.ones(1000)
        b = a * 2
        a.untyped_storage().resize_(0)
        c = a.detach()
        b.resize_(2000)
        d = b[3:].numpy()
        torch.from_numpy(d) + 1
        e = torch.ones(10)
        e.set_(b)
        del a, b, c, d, e

    before = hook.mock.mock_freed()
    hook.lines(program)
    assert hook.mock.mock_freed() - before >= 3


def structure(hook):
    """What stands in a call, and that the typed way writes the same words as the boxed one."""
    x = torch.ones(2, 3)

    def program():
        torch.add(x, 2.5, alpha=2)
        torch.add(x, x)
        x.sum(dim=0, keepdim=True)
        x.to(torch.float64)
        torch.cat([x, x], 1)
        F.conv1d(x[None], torch.ones(4, 3, 1)[:, :2], None, padding=1)
        x.unbind()
        torch.full_like(x, 0.0)
        x[:, 1:]
        x.sum().item()
        F.gelu(x, approximate="tanh")
        torch.where(x > 0, x, 0.5)

    hook.mock.mock_show_structure(1)
    lines = hook.lines(program)
    hook.mock.mock_show_structure(0)
    assert lines[0] == "aten::add.Tensor T6[2 3 | 3 1] T7[|]f2 2 -> T6[2 3 | 3 1]", lines[0]
    assert lines[1] == "aten::add.Tensor T6[2 3 | 3 1] T6[2 3 | 3 1] 1 -> T6[2 3 | 3 1]", lines[1]
    assert lines[2] == "aten::sum.dim_IntList T6[2 3 | 3 1] [0 ] True None -> T6[1 3 | 3 1]", lines[2]
    assert lines[3] == "aten::_to_copy.default T6[2 3 | 3 1] dtype7 None None None False None -> T7[2 3 | 3 1]", lines[3]
    assert lines[4] == "aten::cat.default (T6[2 3 | 3 1] T6[2 3 | 3 1] ) 1 -> T6[2 6 | 6 1]", lines[4]
    assert any(line.startswith("aten::gelu.default T6[2 3 | 3 1] 'tanh' ->") for line in lines), lines
    return lines


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    hook = Hook()
    if sys.argv[1:] == ["structure"]:
        print("\n".join(structure(hook)))
        return
    compare_with_mode(hook)
    not_executed(hook)
    higher_order_operators(hook)
    kernels_that_fail(hook)
    paused(hook)
    watches(hook)
    storages(hook)
    lines = structure(hook)
    if sys.argv[1:] == ["child"]:
        return
    for environment in ({"OPTAPE_HOOK_BOXED": "1"}, {"OPTAPE_HOOK_KEY": "DeferredInit"}):
        subprocess.run([sys.executable, __file__, "child"], env=dict(os.environ, **environment), check=True)
    boxed = subprocess.run(
        [sys.executable, __file__, "structure"], env=dict(os.environ, OPTAPE_HOOK_BOXED="1"), check=True, capture_output=True, text=True
    )
    assert boxed.stdout.splitlines() == lines, "boxed and typed calls differ"


if __name__ == "__main__":
    main()
