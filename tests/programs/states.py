"""Two steps of a real neuron of a library (the argument), and what its states should have been told to hold: their sums, by name."""

import json
import sys

import torch


def snntorch():
    import snntorch as snn

    cell = snn.Synaptic(alpha=0.5, beta=0.5)
    syn, mem = cell.reset_mem()
    for _ in range(2):
        _, syn, mem = cell(torch.ones(1, 3), syn, mem)
    return "Synaptic", {"syn": cell.syn, "mem": cell.mem}


def sinabs():
    import sinabs.layers

    cell = sinabs.layers.LIF(tau_mem=2.0, tau_syn=2.0)
    cell(torch.ones(1, 2, 3))
    cell(torch.ones(1, 2, 3))
    return "LIF", {"v_mem": cell.v_mem, "i_syn": cell.i_syn}


def norse():
    from norse.torch.module.lif import LIFCell

    cell = LIFCell()
    state = None
    for _ in range(2):
        _, state = cell(torch.ones(1, 3), state)
    return "LIFCell", {"v": state.v, "i": state.i}


def spikingjelly():
    from spikingjelly.activation_based import neuron

    cell = neuron.IFNode(step_mode="m")
    for _ in range(2):
        cell(torch.full((2, 1, 3), 0.3))
    return "IFNode", {"v": cell.v}


def named():
    class Custom(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.current = None

        def forward(self, x):
            self.current = x if self.current is None else self.current * 0.5 + x
            return self.current * 1

    cell = Custom()
    for _ in range(2):
        cell(torch.ones(1, 3))
    return "Custom", {"current": cell.current}


def main():
    name = sys.argv[1]
    try:
        with torch.no_grad():
            scope, states = globals()[name]()
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
        return
    # An op on each of them, by which the test knows the tensors.
    for value in states.values():
        value.cosh()
    print(json.dumps({"module": scope, "states": list(states)}))


main()
