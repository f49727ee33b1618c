"""Trains at full rate for a given time, as real training does: Adam, a learning-rate schedule, batches of different sizes.

`python soak.py SECONDS REPORT`. The network is small, so that ops come as fast as they can. REPORT gets one JSON line every few seconds:
seconds since the start, steps, resident memory of this process in bytes.
"""

import json
import os
import random
import sys
import time

import torch
from spikingjelly.activation_based import functional, neuron, surrogate

EVERY_S = 2.0
# As many as a data loader with buckets makes; each is a structure of its own for every op.
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)


def network():
    lif = lambda: neuron.LIFNode(surrogate_function=surrogate.ATan())
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1),
        lif(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 4 * 4, 32),
        lif(),
        torch.nn.Linear(32, 10),
    )


def resident_bytes():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main():
    seconds, report = float(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    torch.manual_seed(1)
    random.seed(1)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10_000)
    images = torch.rand(64, 1, 8, 8)
    labels = torch.randint(0, 10, (64,))
    began = time.monotonic()
    told = 0.0
    steps = 0
    with open(report, "w", encoding="ascii") as file:
        while True:
            now = time.monotonic() - began
            if now >= told:
                told = now + EVERY_S
                file.write(json.dumps({"seconds": now, "steps": steps, "resident_bytes": resident_bytes()}) + "\n")
                file.flush()
            if now >= seconds:
                break
            size = random.choice(BATCHES)
            at = random.randrange(64 - size)
            x, y = images[at : at + size], labels[at : at + size]
            optimizer.zero_grad()
            out = sum(net(x) for _ in range(2)) / 2
            loss = torch.nn.functional.cross_entropy(out, y)
            loss.backward()
            optimizer.step()
            schedule.step()
            functional.reset_net(net)
            steps += 1


main()
