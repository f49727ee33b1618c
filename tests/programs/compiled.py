"""torch.compile(fullgraph=True): results, graphs, breaks and recompilations, as one line of JSON.

`python compiled.py BACKEND...`
"""

import json
import sys

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

from same_run import digest


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 16))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.norm(self.inner(x).sigmoid()))


def run(backend):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    graphs = []
    if backend == "graphs":
        # Sees what dynamo hands over: the text of the graphs has to be the same, too.
        def compiler(graph, _inputs):
            graphs.append(graph.code)
            return graph.forward

        chosen = compiler
    else:
        chosen = backend
    net = Net()
    compiled = torch.compile(net, backend=chosen, fullgraph=True, dynamic=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    # Real compilers take seconds for each shape and mode.
    thorough = backend != "inductor"
    for batch in (3, 3, 5, 3) if thorough else (3, 3):
        optimizer.zero_grad()
        loss = compiled(torch.randn(batch, 8)).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    out = None
    if thorough:
        net.eval()
        with torch.no_grad():
            out = compiled(torch.randn(3, 8))
    seen = {name: dict(counters[name]) for name in ("stats", "frames", "graph_break", "recompile_limit")}
    return {"digest": digest(net, losses, out), "counters": seen, "graphs": graphs}


def main():
    torch.set_num_threads(1)
    print(json.dumps({backend: run(backend) for backend in sys.argv[1:]}))


if __name__ == "__main__":
    main()
