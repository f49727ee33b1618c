"""Calls of torch's functions in many forms: composite, nested, in place, with keywords, failing, on tensors of subclasses. Its last line is a
report as JSON: what a TorchFunctionMode of Python's saw of the same calls."""

import json

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, resolve_name


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3, padding=1)
        self.fc = torch.nn.Linear(32, 4)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).flatten(1))


class Sub(torch.Tensor):
    pass


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.mul(2)


class Seen(TorchFunctionMode):
    """What Python's own mode sees: outermost calls alone, and here those that do not fail."""

    def __init__(self):
        self.counts = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if type(func).__name__ != "method-wrapper":
            name = resolve_name(func) or f"{func.__module__}.{func.__qualname__}"
            self.counts[name] = self.counts.get(name, 0) + 1
        return result


def work(net, optimizer, images, labels):
    optimizer.zero_grad()
    loss = F.cross_entropy(net(images), labels)
    loss.backward()
    optimizer.step()
    spikes = (images > 0.5).float()
    F.linear(spikes.flatten(1), torch.ones(3, 16))
    torch.einsum("bi,bi->b", [spikes.flatten(1), spikes.flatten(1)])
    total = torch.zeros(2, 1, 4, 4)
    total.add_(spikes, alpha=2)
    torch.add(total, 1.5, out=torch.empty(2, 1, 4, 4))
    F.softmax(total, dim=-1, dtype=torch.float64)
    query = torch.rand(3, 2, 4)
    F.multi_head_attention_forward(
        query, query, query, 4, 2, torch.rand(12, 4), torch.rand(12), None, None, False, 0.0, torch.rand(4, 4), torch.rand(4)
    )
    try:
        torch.mv(total, total)
    except RuntimeError:
        pass
    Square.apply(torch.rand(3, requires_grad=True)).sum().backward()
    torch.rand(3).as_subclass(Sub).cosh()
    total[0, :, 1]
    return loss.item()


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    images = torch.rand(2, 1, 4, 4)
    labels = torch.tensor([0, 1])
    torch.manual_seed(1)
    with torch.profiler.record_function("measure"):
        loss = work(net, optimizer, images, labels)
    weights = [p.sum().item() for p in net.parameters()]
    seen = Seen()
    with seen:
        work(net, optimizer, images, labels)
    print(json.dumps({"loss": loss, "weights": weights, "seen": seen.counts}))


if __name__ == "__main__":
    main()
