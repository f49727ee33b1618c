"""What a notebook does: cells that IPython runs, recorded by a daemon that outlives none of them. Its last line is a report as JSON."""

import json
import sys

from IPython.core.interactiveshell import InteractiveShell

CELLS = [
    "import torch, optape\nnet = torch.nn.Linear(6, 4)\nnet(torch.rand(2, 6))",
    f"recording = optape.start({sys.argv[1]!r})\nrecording",
    "for _ in range(3):\n    net(torch.rand(2, 6))\n    optape.step(samples=2)",
    "optape.start('other.optape')",
    "1 / 0",
    "net(torch.rand(2, 6))\nsummary = optape.stop()\nsummary",
    "net(torch.rand(2, 6))\noptape.stop()",
]

shell = InteractiveShell.instance()
report = []
for cell in CELLS:
    done = shell.run_cell(cell)
    error = done.error_in_exec
    report.append({"result": repr(done.result), "error": None if error is None else f"{type(error).__name__}: {error}"})
print(json.dumps(report))
