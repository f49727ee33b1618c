"""Processes and threads that run ops at the same time: loader workers, threads, forks between them.

Prints how many `cosh` each process ran: the parent's under "parent", the others' by process id.
"""

import json
import os
import sys
import threading

import torch
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    """Each item is one `cosh`, and names the process that ran it."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return torch.full((1,), float(index)).cosh() * 0 + os.getpid()


def loaders(counts, method):
    parent = os.getpid()
    for batch in DataLoader(Numbers(), batch_size=4, num_workers=2, multiprocessing_context=method):
        for process in batch.flatten().tolist():
            counts[int(process)] = counts.get(int(process), 0) + 1
        torch.ones(2).cosh()
        counts["parent"] += 1
    assert parent not in counts


def forks(counts):
    """Forks between the ops of other threads: within one, torch's own locks would hang the child, recorded or not."""
    done = threading.Event()
    gate = threading.Lock()
    ran = [0, 0]

    def work(index):
        x = torch.ones(8)
        while not done.is_set():
            with gate:
                x.cosh()
            ran[index] += 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for count in range(1, 21):
        with gate:
            child = os.fork()
        if child == 0:
            for _ in range(count):
                torch.ones(2).cosh()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        counts[child] = count
    done.set()
    for thread in threads:
        thread.join()
    counts["parent"] += sum(ran)


def main():
    torch.set_num_threads(1)
    counts = {"parent": 0}
    for way in sys.argv[1:]:
        if way == "forks":
            forks(counts)
        else:
            loaders(counts, way)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
