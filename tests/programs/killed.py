"""Works until it is killed, and notes every op that it has finished in a page that the test sees.

`python killed.py PAGE` works itself. `python killed.py PAGE until COUNT` does so for COUNT rounds and exits with 7. `python killed.py PAGE COUNT` forks that many children, one after another, and kills
each at a random moment. Slot k of the page holds the k-th process's id and how many ops it has finished.
"""

import itertools
import mmap
import os
import random
import signal
import sys
import time

import torch


def work(page, slot, rounds=itertools.count()):
    page[2 * slot] = os.getpid()
    x = torch.ones(4, 4)
    for i in rounds:
        # The number is in the event: the order shows.
        y = x.add(float(i))
        page[2 * slot + 1] = 2 * i + 1
        y.mm(x)
        page[2 * slot + 1] = 2 * i + 2


def main():
    torch.set_num_threads(1)
    with open(sys.argv[1], "r+b") as file:
        # Words, each written at once: `struct.pack_into` clears the bytes first.
        page = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
    if len(sys.argv) == 2:
        work(page, 0)
    if sys.argv[2] == "until":
        work(page, 0, range(int(sys.argv[3])))
        sys.exit(7)
    torch.ones(1).add(1)
    for slot in range(int(sys.argv[2])):
        child = os.fork()
        if child == 0:
            work(page, slot)
        # From its first op on.
        while page[2 * slot + 1] == 0:
            time.sleep(0.0005)
        time.sleep(random.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


main()
