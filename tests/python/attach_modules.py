"""Module calls: the names of torch.utils.module_tracker, balanced whatever happens, and no trace of us in the program."""

from harness import Attached

PREAMBLE = """
import copy, gc, io, pickle, sys, traceback, warnings
import torch
from torch import nn

warnings.simplefilter("error")

class Leaf(nn.Module):
    def __init__(self, size=3):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * self.weight

class Act(nn.Module):
    def forward(self, x):
        return x.relu()

ACT = Act()

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.leaf = Leaf()
        self.act = ACT

    def forward(self, x):
        return self.act(self.leaf(x))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.again = self.blocks[0]

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.again(x)
"""

NAMES = """
from torch.utils.module_tracker import ModuleTracker

net = Net()
with ModuleTracker() as tracker:
    net(torch.ones(3))
known = {id(module): name for module, name in tracker._known_modules.items()}
import _optape_attach
modules = _optape_attach.live.modules
assert modules.names == known, (modules.names, known)
"""

CALLS = """
net = Net().eval()
net(torch.ones(3))
"""

CHANGES = """
net = Net()
net(torch.ones(3))
print("replaced", flush=True)
net.blocks[1].leaf = Leaf(3)          # a child in place of another
net.late = Leaf(3)                    # a child after the first call
net.blocks.append(Leaf(3))
net._modules["hidden"] = Leaf(3)      # past every registration hook
class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net
    def forward(self, x):
        return self.net.hidden(self.net.late(self.net(x)))
Outer()(torch.ones(3))
net.blocks[1].leaf.weight = nn.Parameter(torch.zeros(3))
net(torch.ones(3))
"""

COPIES = """
net = Net()
net(torch.ones(3))
other = copy.deepcopy(net)
assert set(vars(other)) == set(vars(Net())), vars(other)
third = pickle.loads(pickle.dumps(net))
other(torch.ones(3)), third(torch.ones(3))
assert torch.equal(other.blocks[0].leaf.weight, net.blocks[0].leaf.weight)
for _ in range(100):                  # modules made anew for every call
    nn.ReLU()(torch.ones(2))
import _optape_attach
modules = _optape_attach.live.modules
del net, other, third
gc.collect()
left = [name for key, name in modules.names.items() if key != id(ACT)]
assert not left, left
assert len(modules.numbers) <= 1 and len(modules.references) <= 1
"""

FAILURES = """
class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.leaf = Leaf()
    def forward(self, x):
        if x is None:
            raise KeyboardInterrupt
        return self.leaf(x) @ torch.ones(5)

class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Fails()
    def forward(self, x):
        try:
            return self.inner(x)
        except RuntimeError:
            return x

around = Around()
around(torch.ones(3))
try:
    around(None)
except KeyboardInterrupt:
    pass
try:
    Net()("text")
except TypeError:
    traceback.print_exc(file=sys.stdout)
class NoForward(nn.Module):
    pass
try:
    NoForward()(1)
except NotImplementedError as error:
    print(error)
try:
    nn.Module.__call__()
except TypeError as error:
    print(error)
import inspect
print(inspect.signature(nn.Module.__call__), inspect.signature(Net()), nn.Module.__call__ is nn.Module._wrapped_call_impl)
"""

ODD = """
warnings.simplefilter("ignore")
class Moody(nn.Module):
    "Does not like to be looked at."
    def named_children(self):
        raise RuntimeError("no")
    def forward(self, x):
        return x + 1
class Same(nn.Module):
    "All alike."
    def __eq__(self, other):
        return True
    def __hash__(self):
        return 1
    def forward(self, x):
        return x + 1
class Calls(nn.Module):
    def __call__(self, *arguments, **keywords):
        return super().__call__(*arguments, **keywords)
    def forward(self, x, *, scale):
        return x * scale
x = torch.ones(2)
Moody()(x)
pair = nn.Sequential(Same(), Same())
pair(x)
Calls()(x, scale=2)
script = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
script(x)
traced = torch.jit.trace(nn.Linear(2, 2), x)
traced(x)
lazy = nn.LazyLinear(3)
lazy(x)
from torch.fx import symbolic_trace
symbolic_trace(nn.Sequential(nn.Linear(2, 2)))(x)
torch.func.functional_call(nn.Linear(2, 2), {"weight": torch.ones(2, 2), "bias": torch.ones(2)}, (x,))
def deep(n):
    module = nn.Identity()
    for _ in range(n):
        module = nn.Sequential(module)
    return module
try:
    deep(5000)
    deep(400)(x)
except RecursionError:
    print("too deep")
"""

SPIKES = """
from spikingjelly.activation_based import neuron, layer

class Own(neuron.BaseNode):
    def single_step_forward(self, x):
        return (x > 0).to(x)

class Pair(nn.Module):
    def forward(self, x):
        return neuron_pair(x), None

net = nn.Sequential(nn.Linear(3, 3), neuron.IFNode(), neuron.LIFNode(step_mode="s"), Own(), neuron.NonSpikingIFNode() if hasattr(neuron, "NonSpikingIFNode") else nn.Identity())
net[:4](torch.ones(1, 3))
"""


def module_lines(lines):
    return [line for line in lines if line.startswith(("module ", "parameters of", "watches"))]


def main():
    attached = Attached()

    def run(program, **more):
        done, processes, _ = attached.run(PREAMBLE + program, **more)
        assert done.returncode == 0, done.stderr
        assert not done.stderr, done.stderr
        return done, processes[0] if processes else []

    run(NAMES)

    _, lines = run(CALLS)
    assert module_lines(lines) == [
        "module 0 Net __main__.Net parameters 0",
        "module 1 Net.blocks torch.nn.modules.container.ModuleList parameters 0",
        "module 2 Net.again __main__.Block parameters 0",
        "module 3 Net.blocks.0.leaf __main__.Leaf parameters 1",
        "module 4 Net.blocks.1.act __main__.Act parameters 0",
        "module 5 Net.blocks.1 __main__.Block parameters 0",
        "module 6 Net.blocks.1.leaf __main__.Leaf parameters 1",
    ], module_lines(lines)
    calls = [line for line in lines if line.startswith((">", "<"))]
    depth = 0
    for call in calls:
        depth += 1 if call[0] == ">" else -1
        assert depth >= 0
    assert depth == 0 and calls[0].endswith("eval") and len(calls) == 2 * 10, calls

    _, lines = run(CHANGES)
    names = {line.split()[2] for line in module_lines(lines) if line.startswith("module")}
    assert {"Net.blocks.1.leaf", "Net.late", "Outer.net", "Outer.net.hidden"} <= names, names
    assert any(line.startswith("parameters of") for line in lines), module_lines(lines)

    _, lines = run(COPIES)
    relus = [line for line in module_lines(lines) if " ReLU " in line]
    assert len(relus) == 1, relus

    done, lines = run(FAILURES)
    plain, _ = run(FAILURES, attach=False)
    assert without_paths(done.stdout) == without_paths(plain.stdout), (done.stdout, plain.stdout)
    enters = sum(line.startswith(">") for line in lines)
    assert enters == sum(line.startswith("<") for line in lines) and enters > 6, lines

    done, _ = run(ODD)
    plain, _ = run(ODD, attach=False)
    assert done.stdout == plain.stdout

    _, lines = run(SPIKES)
    spiking = [line.split()[2] for line in lines if line.startswith("module") and " spiking " in line]
    assert spiking == ["Sequential.1", "Sequential.2", "Sequential.3"], lines
    assert sum(line.startswith("watch ") for line in lines) == 3, lines
    _, lines = run(SPIKES, environment={"OPTAPE_STATS": "none"})
    assert not any(line.startswith("watch") for line in lines), lines


def without_paths(text):
    """Tracebacks, but for the directory that the program lies in."""
    return "\n".join(line for line in text.splitlines() if 'program.py"' not in line)


if __name__ == "__main__":
    main()
