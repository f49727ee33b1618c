"""Ways in which a program can start, thread, fork, compile, fail to attach: it is recorded, or runs as if nothing were there."""

import os
import subprocess
import sys

from harness import GLUE, HOOK_SOURCE, Attached

OPS = """
import torch
torch.manual_seed(0)
print(torch.ones(3).sum().item())
"""

THREADS = """
import threading, torch
from concurrent.futures import ThreadPoolExecutor
def work():
    torch.zeros(2).cumsum(0)
thread = threading.Thread(target=work)
thread.start(); thread.join()
with ThreadPoolExecutor(2) as pool:
    list(pool.map(lambda _: work(), range(4)))
class Own(threading.Thread):
    def run(self):
        work()
own = Own(); own.start(); own.join()
import _thread, time
done = _thread.allocate_lock(); done.acquire()
def raw():
    torch.nn.Identity()(torch.ones(1))   # the module call switches the hook on
    work(); done.release()
_thread.start_new_thread(raw, ()); done.acquire()
def raises():
    raise RuntimeError("in a thread")
thread = threading.Thread(target=raises)
thread.start(); thread.join()
"""

LOADER = """
import torch
from torch.utils.data import DataLoader, TensorDataset
data = TensorDataset(torch.arange(8.).reshape(8, 1))
total = sum(batch.sum().item() for (batch,) in DataLoader(data, batch_size=2, num_workers=2))
print(total)
"""

PROCESSES = """
import sys, torch
import torch.multiprocessing as mp
def work(n):
    assert (torch.ones(3) * n).sum().item() == 3 * n
if __name__ == "__main__":
    mp.set_start_method(sys.argv[1] if len(sys.argv) > 1 else "{method}")
    child = mp.Process(target=work, args=(2,))
    child.start(); child.join()
    print(child.exitcode)
"""

SAME = """
import hashlib, torch
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5))
optimizer = torch.optim.Adam(net.parameters())
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
for _ in range(5):
    loss = nn.functional.cross_entropy(net(torch.randn(4, 1, 8, 8)), torch.randint(5, (4,)))
    optimizer.zero_grad(); loss.backward(); optimizer.step(); scheduler.step()
digest = hashlib.sha256()
for tensor in net.state_dict().values():
    digest.update(tensor.numpy().tobytes())
print(digest.hexdigest(), loss.item(), torch.rand(1).item())
"""


COMPILED_WATCH = """
import torch
from torch._dynamo.utils import counters
@torch.compile(fullgraph=True, backend="aot_eager")
def f(x):
    y = x.sin()
    torch.ops.optape.watch(y, 5)
    return y + 1
f(torch.ones(3)), f(torch.ones(3))
x = torch.ones(3, requires_grad=True)
f(x).sum().backward()
assert torch.equal(x.grad, torch.ones(3).cos())
print(counters["stats"]["unique_graphs"], dict(counters["graph_break"]))
"""


def main():
    attached = Attached()

    done, (lines,), run = attached.run(OPS)
    assert done.stdout == "3.0\n" and not done.stderr, done
    assert "aten::sum.default" in lines and lines[-1] == "stop", lines
    assert any(name.startswith("attached-") for name in os.listdir(run))

    # Without the entry point: sitecustomize, which runs the one that it stands before.
    other = os.path.join(attached.directory.name, "other")
    os.makedirs(other)
    with open(os.path.join(other, "sitecustomize.py"), "w", encoding="ascii") as file:
        file.write("print('other sitecustomize', __name__)\n")
    path = os.pathsep.join((attached.site, other))
    for autoload in ("0", "1"):
        done, (lines,), _ = attached.run(OPS, environment={"TORCH_DEVICE_BACKEND_AUTOLOAD": autoload, "PYTHONPATH": path})
        assert done.stdout == "other sitecustomize sitecustomize\n3.0\n" and not done.stderr, done
        assert "aten::sum.default" in lines, lines
    done, none, _ = attached.run("import sys; assert 'torch' not in sys.modules", environment={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    assert done.returncode == 0 and not none and not done.stderr

    # Arguments of Python.
    for arguments in (["-S"], ["-B", "-u"], ["-O"]):
        done, processes, _ = attached.run(OPS, arguments=arguments)
        if arguments != ["-S"]:
            assert len(processes) == 1
        assert done.returncode == 0 or "No module named 'torch'" in done.stderr, done
    for arguments in (["-I"], ["-E"]):
        done, processes, _ = attached.run(OPS, arguments=arguments)
        assert done.stdout == "3.0\n" and not processes, done

    done, (lines,), _ = attached.run(THREADS)
    plain, _, _ = attached.run(THREADS, attach=False)
    assert lines.count("aten::cumsum.default") == 1 + 4 + 1 + 1, lines
    assert tail(done.stderr) == tail(plain.stderr) != [], (done.stderr, plain.stderr)

    done, processes, _ = attached.run(LOADER)
    assert done.stdout == "28.0\n" and not done.stderr, done
    assert processes

    for method in ("fork", "spawn", "forkserver"):
        done, processes, run = attached.run(PROCESSES.replace("{method}", method))
        assert done.stdout == "0\n" and not done.stderr, done
        # Forked children end without atexit; spawned ones attach anew.
        if method != "fork":
            assert len([name for name in os.listdir(run) if name.startswith("attached-")]) >= 2, os.listdir(run)

    done, _, _ = attached.run(SAME)
    plain, _, _ = attached.run(SAME, attach=False)
    assert done.stdout == plain.stdout != "" and done.stderr == plain.stderr, (done, plain)

    done, (lines,), _ = attached.run(COMPILED_WATCH)
    assert done.stdout == "2 {}\n" and not done.stderr, done
    assert lines.count("watch 5") == 3, lines

    refusals = (
        ({"OPTAPE_TORCH_VERSIONS": "1.0.0", "OPTAPE_FORCE_TORCH": "0"}, "is not among the supported versions (1.0.0)"),
        ({"OPTAPE_CAPTURE_LIB": "/nowhere.so"}, "cannot load /nowhere.so"),
        ({"OPTAPE_CAPTURE_LIB": ""}, "OPTAPE_CAPTURE_LIB is not set"),
        ({"OPTAPE_HOOK_SOURCE": "/nowhere"}, "cannot read the hook's source /nowhere/optape_hook.cpp"),
        ({"CXX": "no-such-compiler"}, "CXX is 'no-such-compiler'"),
        ({"PATH": "/nowhere", "CXX": "", "XDG_CACHE_HOME": os.path.join(attached.directory.name, "empty")}, "no C++ compiler found"),
        ({"CXX": "false", "XDG_CACHE_HOME": os.path.join(attached.directory.name, "empty")}, "the hook does not compile"),
        ({"XDG_CACHE_HOME": "/proc/nowhere"}, "cannot use the cache directory"),
    )
    for environment, why in refusals:
        done, processes, run = attached.run(OPS, environment=environment)
        assert done.stdout == "3.0\n" and done.returncode == 0 and not processes, (why, done)
        (line,) = done.stderr.splitlines()
        assert line.startswith("optape: not recording this program: ") and why in line, (why, line)
        (note,) = (name for name in os.listdir(run) if name.startswith("attach-error-"))
        with open(os.path.join(run, note), encoding="utf-8") as file:
            assert why in file.read()

    # A build ahead serves where there is no compiler.
    ready = os.path.join(attached.directory.name, "ready")
    environment = dict(os.environ, XDG_CACHE_HOME=ready, OPTAPE_HOOK_SOURCE=os.path.abspath(HOOK_SOURCE), OPTAPE_TORCH_VERSIONS="2.13.0")
    script = os.path.join(GLUE, "_optape_attach.py")
    built = subprocess.run([sys.executable, script, "--build-hook"], env=environment, capture_output=True, text=True, check=True)
    assert os.path.exists(built.stdout.strip()) and "building the hook for torch" in built.stderr, built
    done, processes, _ = attached.run(OPS, environment={"PATH": "/nowhere", "CXX": "", "XDG_CACHE_HOME": ready})
    assert len(processes) == 1 and not done.stderr, done


def tail(text):
    """Tracebacks from the frame that catches, without directories and thread names."""
    return [line.strip() for line in text.splitlines() if "program.py" not in line and "Exception in thread" not in line]


if __name__ == "__main__":
    main()
