"""Trains for a while at full rate, here and in forked workers, and reports the most memory that this process ever had resident."""

import json
import os
import sys

import torch
from torch import nn

WORKERS = 8


def train(steps):
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 10 * 10, 10))
    optimizer = torch.optim.Adam(net.parameters())
    # A schedule makes new scalars at every step.
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    images = (torch.rand(8, 2, 12, 12) < 0.3).float()
    for _ in range(steps):
        loss = net(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def count(rounds):
    x = torch.ones(4, 4)
    for i in range(rounds):
        x.add(float(i))


def peak_bytes():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    steps, rounds = int(sys.argv[1]), int(sys.argv[2])
    train(steps)
    count(rounds)
    workers = []
    for _ in range(WORKERS):
        worker = os.fork()
        if worker == 0:
            count(rounds // WORKERS)
            os._exit(0)
        workers.append(worker)
    codes = [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]
    print(json.dumps({"peak_bytes": peak_bytes(), "codes": codes}))


main()
