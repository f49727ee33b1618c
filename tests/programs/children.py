"""Children by fork and by spawn, each with ops of its own; prints the process ids."""

import json
import multiprocessing
import os
import sys

import torch


def work(count, queue):
    torch.set_num_threads(1)
    for _ in range(count):
        torch.ones(2).cosh()
    queue.put(os.getpid())


def main():
    torch.set_num_threads(1)
    ids = {"parent": os.getpid()}
    for _ in range(5):
        torch.ones(2).cosh()
    for count, method in enumerate(sys.argv[1:], start=6):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        child = context.Process(target=work, args=(count, queue))
        child.start()
        ids[method] = queue.get()
        child.join()
        assert child.exitcode == 0
    print(json.dumps(ids))


if __name__ == "__main__":
    main()
