"""Counts graphs and recompilations of compiled code, called and called again, inside and outside of a mode of the program's own."""

import json
import sys

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

graphs = 0


def backend(graph, _inputs):
    global graphs
    graphs += 1
    return graph.forward


class Own(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)

    def forward(x):
        return F.relu(layer(x)).sum()

    compiled = torch.compile(forward, backend=backend, fullgraph=True)
    values = []
    for _ in range(3):
        loss = compiled(torch.ones(2, 4))
        loss.backward()
        values.append(loss.item())
    F.softmax(torch.ones(2, 2), dim=0)
    values.append(compiled(torch.ones(2, 4)).item())
    compiled(torch.ones(3, 4))
    with Own():
        values.append(forward(torch.ones(2, 4)).item())
    F.softplus(torch.ones(2, 2))
    counters = torch._dynamo.utils.counters
    print(
        json.dumps(
            {"graphs": graphs, "values": values, "unique": counters["stats"]["unique_graphs"], "breaks": len(counters["graph_break"])}
        )
    )


if __name__ == "__main__":
    sys.exit(main())
