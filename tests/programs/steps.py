"""Trains in steps, and does between them what its arguments say.

`python steps.py STEPS [WHAT...]`. The loss of every step goes to stdout, so that runs can be compared. WHAT:
  eval=N        call the network N times without training before the first step
  slow          wait a little after every step
  forever       do not stop after STEPS steps, but when stdin ends or a file `stop` appears
  range         put every second step into a profiler range that stays open while the step after it begins
  exec          replace the process by itself, with `done` for `exec`, after the last step
  busy          ops of no module between the steps
"""

import os
import sys
import time

import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = torch.nn.Linear(8, 8)
        self.fc2 = torch.nn.Linear(8, 2)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


def main():
    torch.set_num_threads(1)
    torch.manual_seed(1)
    steps = int(sys.argv[1])
    what = sys.argv[2:]
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.rand(4, 8)
    y = torch.zeros(4, dtype=torch.long)
    for word in what:
        if word.startswith("eval="):
            net.eval()
            with torch.no_grad():
                for _ in range(int(word.removeprefix("eval="))):
                    net(x)
            net.train()
    opened = None
    step = 0
    print("ready", flush=True)
    while step < steps or ("forever" in what and not os.path.exists("stop")):
        if "range" in what and step % 2 == 1:
            opened = torch.profiler.record_function(f"odd{step}")
            opened.__enter__()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        if "range" in what and step % 2 == 0 and opened is not None:
            opened.__exit__(None, None, None)
        if "busy" in what:
            for _ in range(20):
                x.add(1)
        if step < 1000:
            print(loss.item(), flush=True)
        if "slow" in what:
            time.sleep(0.01)
        step += 1
    print("done", step, flush=True)
    if "exec" in what:
        words = [word if word != "exec" else "done" for word in sys.argv]
        os.execv(sys.executable, [sys.executable, *words])


main()
