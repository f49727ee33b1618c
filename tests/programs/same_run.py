"""Programs whose results must not depend on being recorded.

`python same_run.py NAME...` runs the named ones and prints one line of JSON: for each name a digest of everything that it
computed, bit for bit, and what else it saw.
"""

import copy
import hashlib
import io
import json
import pickle
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

PROGRAMS = {}


def program(function):
    PROGRAMS[function.__name__] = function
    return function


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for key in value:
            yield from tensors_in(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, nn.Module):
        yield from tensors_in(value.state_dict())
        yield from (p.grad for p in value.parameters() if p.grad is not None)
    elif isinstance(value, torch.optim.Optimizer):
        yield from tensors_in(value.state_dict()["state"])
    elif isinstance(value, (int, float)):
        yield torch.tensor(float(value), dtype=torch.float64)


def digest(*values):
    """Of the bits of all tensors in the values, with their shapes and types."""
    sha = hashlib.sha256()
    count = 0
    for tensor in tensors_in(values):
        tensor = tensor.detach().contiguous()
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        sha.update(bytes(tensor.flatten().view(torch.uint8).tolist()) if tensor.numel() else b"")
        count += 1
    assert count > 0, "nothing to hash"
    return f"{count} tensors {sha.hexdigest()}"


def train(model, optimizer, inputs, targets, steps=4, loss_of=nn.functional.cross_entropy, context=None):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        if context is None:
            loss = loss_of(model(inputs), targets)
        else:
            with context():
                loss = loss_of(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Images(nn.Module):
    """Convolutions, normalisation, dropout, and an activation that writes into what a module returned."""

    def __init__(self, inplace=False, checkpoint=None):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=inplace)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.dropout = nn.Dropout(0.25)
        self.head = nn.Linear(8 * 4 * 4, 10)
        self.inplace = inplace
        self.checkpoint = checkpoint

    def body(self, x):
        x = self.relu(self.norm(self.conv1(x)))
        x = self.conv2(x)
        x = x.relu_() if self.inplace else x.relu()
        return self.dropout(x)

    def forward(self, x):
        if self.checkpoint is None:
            x = self.body(x)
        else:
            from torch.utils.checkpoint import checkpoint

            x = checkpoint(self.body, x.requires_grad_(), use_reentrant=self.checkpoint)
        return self.head(x.flatten(1))


def images(seed=0, **options):
    torch.manual_seed(seed)
    return Images(**options), torch.randn(6, 1, 8, 8), torch.randint(0, 10, (6,))


def spiking(multi_step=False):
    from spikingjelly.activation_based import layer, neuron

    model = nn.Sequential(
        layer.Conv2d(1, 6, 3, padding=1, bias=False),
        neuron.LIFNode(),
        layer.MaxPool2d(2, 2),
        layer.Flatten(),
        layer.Linear(6 * 4 * 4, 10),
        neuron.IFNode(v_reset=None),
    )
    if multi_step:
        from spikingjelly.activation_based import functional

        functional.set_step_mode(model, "m")
    return model


class OverTime(nn.Module):
    """Four time steps of a spiking network, reset before each."""

    def __init__(self):
        super().__init__()
        self.net = spiking()

    def forward(self, x):
        from spikingjelly.activation_based import functional

        functional.reset_net(self.net)
        return torch.stack([self.net(x) for _ in range(4)]).mean(0)


@program
def snn_training():
    torch.manual_seed(1)
    model = OverTime()
    inputs, targets = torch.rand(5, 1, 8, 8), torch.randint(0, 10, (5,))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = train(model, optimizer, inputs, targets, loss_of=lambda y, t: nn.functional.mse_loss(y, nn.functional.one_hot(t, 10).float()))
    momentum = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-3)
    losses += train(model, momentum, inputs, targets)
    return {"digest": digest(model, optimizer, momentum, losses), "random": torch.rand(1).item()}


@program
def inplace_relu():
    model, inputs, targets = images(inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = train(model, optimizer, inputs, targets)
    # The same mistake has to give the same error.
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    y.relu_().sub_(1)
    try:
        y.sum().backward()
        error = "none"
    except RuntimeError as e:
        error = str(e)
    return {"digest": digest(model, losses), "error": error}


@program
def checkpointing():
    results = {}
    for reentrant in (True, False):
        model, inputs, targets = images(checkpoint=reentrant)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = train(model, optimizer, inputs, targets)
        results[f"reentrant={reentrant}"] = digest(model, optimizer, losses)
    return results


@program
def autocast():
    model, inputs, targets = images()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    losses = train(model, optimizer, inputs, targets, context=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = model.eval()(inputs)
    return {"digest": digest(model, losses, out), "dtype": str(out.dtype)}


@program
def inference_mode():
    torch.manual_seed(2)
    model = OverTime().eval()
    plain, inputs, _ = images()
    plain.eval()
    with torch.inference_mode():
        out = model(inputs), plain(inputs)
    try:
        out[1].add_(1).mul(torch.ones(1, requires_grad=True)).sum()
        error = "none"
    except RuntimeError as e:
        error = str(e)
    return {"digest": digest(out), "inference": [o.is_inference() for o in out], "error": error}


@program
def copies():
    model, inputs, targets = images()
    net = OverTime()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, inputs, targets, steps=2)
    with torch.no_grad():  # states with a graph cannot be copied
        net(inputs)
    twin, net_twin = copy.deepcopy(model), copy.deepcopy(net)
    loaded = pickle.loads(pickle.dumps(model))
    saved = io.BytesIO()
    torch.save(net, saved)
    with zipfile.ZipFile(saved) as archive:
        contents = {name: archive.read(name) for name in archive.namelist() if not name.endswith("serialization_id")}
    saved.seek(0)
    net_loaded = torch.load(saved, weights_only=False)
    for m in (model, twin, loaded):
        m.eval()
    outputs = [m(inputs) for m in (model, twin, loaded)] + [m(inputs) for m in (net, net_twin, net_loaded)]
    hooks = [
        len(getattr(m, name))
        for m in (*model.modules(), *net.modules())
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    ]
    return {
        "digest": digest(model, twin, loaded, net, net_twin, net_loaded, outputs),
        # Nothing of the recorder's may be in a module: the very bytes are the same.
        "saved": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
        "attributes": sorted(vars(model)) + sorted(vars(net.net[1])),
        "hooks": sum(hooks),
        "repr": repr(net),
        "parameters": [name for name, _ in net.named_parameters()],
    }


@program
def transforms():
    """Function transforms, second derivatives, functions of the program's own."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return 2 * x * grad

    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    x = torch.randn(7, 4, requires_grad=True)
    (first,) = torch.autograd.grad(Square.apply(net(x)).sum(), x, create_graph=True)
    first.pow(2).sum().backward()
    parameters = dict(net.named_parameters())

    def loss(p, sample):
        return torch.func.functional_call(net, p, (sample,)).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x.detach())
    hessian = torch.func.hessian(lambda v: net(v).sum())(torch.randn(4))
    scripted = torch.fx.symbolic_trace(net)
    return {"digest": digest(net, x.grad, per_sample, hessian, scripted(x)), "graph": scripted.code}


@program
def modes():
    """What the program's own tools see."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    model, inputs, targets = images()
    net = OverTime()
    with Names() as names:
        loss = nn.functional.cross_entropy(model(inputs), targets) + net(inputs).sum()
        loss.backward()
    with FlopCounterMode(display=False) as flops:
        model(inputs)
    with torch.profiler.profile(record_shapes=True) as profile:
        model(inputs)
    events = sorted(e.key for e in profile.key_averages())
    return {"digest": digest(model, net, loss), "names": names.names, "flops": flops.get_total_flops(), "events": events}


@program
def two_threads():
    torch.set_num_threads(2)
    results = {}

    def work(seed):
        # Random numbers are drawn before: the generator is the process's.
        model, inputs, targets = prepared[seed]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = train(model, optimizer, inputs, targets, steps=6)
        results[str(seed)] = digest(model, losses)

    prepared = {}
    for seed in range(4):
        prepared[seed] = images(seed)
        prepared[seed][0].dropout.p = 0.0
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2, 4)))
    big = torch.randn(257, 311, generator=torch.Generator().manual_seed(1))
    results["big"] = digest(big @ big.t(), big.sum(), big.softmax(0))
    return dict(sorted(results.items()), threads=torch.get_num_threads())


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.full((3,), float(index)).pow(2), index


@program
def data_loader():
    results = {}
    for persistent in (False, True):
        loader = torch.utils.data.DataLoader(
            Squares(),
            batch_size=4,
            shuffle=True,
            num_workers=2,
            persistent_workers=persistent,
            multiprocessing_context="fork",
            generator=torch.Generator().manual_seed(5),
        )
        torch.manual_seed(4)
        net = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-5)
        order = []
        for _ in range(2):
            for batch, indices in loader:
                optimizer.zero_grad()
                net(batch).pow(2).mean().backward()
                optimizer.step()
                order += indices.tolist()
        results[f"persistent={persistent}"] = {"digest": digest(net), "order": order}
    return results


def main():
    torch.set_num_threads(1)
    print(json.dumps({name: PROGRAMS[name]() for name in sys.argv[1:]}))


if __name__ == "__main__":
    main()
