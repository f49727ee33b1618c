"""What the tests of the hook and of the attach glue share: they run against `mock_capture.cpp` in the place of capture.

Each test is a program: `python tests/python/NAME.py` with a Python that has torch; it says nothing and ends with 0, or says
what is wrong. The hook is built through the attach glue, into the cache that `XDG_CACHE_HOME` names.
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
RECORDER = os.path.join(HERE, "..", "..", "recorder")
HOOK_SOURCE = os.path.join(RECORDER, "hook")
GLUE = os.path.join(RECORDER, "python")


def build_mock(directory):
    """Compiles the mock; where the glue and the hook find it."""
    path = os.path.join(directory, "libmock_capture.so")
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
    subprocess.run([*command, os.path.join(HERE, "mock_capture.cpp"), "-o", path], check=True)
    return path


class Hook:
    """The hook in this process, without the glue: `with hook.on():` records ops of this thread."""

    def __init__(self):
        import torch

        spec = importlib.util.spec_from_file_location("_optape_attach", os.path.join(GLUE, "_optape_attach.py"))
        self.glue = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.glue)
        self.directory = tempfile.TemporaryDirectory()
        self.mock = ctypes.CDLL(build_mock(self.directory.name))
        self.mock.optape_capture_table.restype = ctypes.c_void_p
        self.mock.mock_lines.restype = ctypes.c_char_p
        self.mock.mock_freed.restype = ctypes.c_uint64
        self.library = self.glue._load(self.glue.hook_library(HOOK_SOURCE, torch, lambda _text: None), self.glue.HOOK)
        error = ctypes.create_string_buffer(1000)
        table = self.mock.optape_capture_table()
        assert self.library.optape_hook_install(table, error, len(error)) == 0, error.value
        assert self.library.optape_hook_install(table, error, len(error)) != 0, "installed twice"
        self.glue._pass_higher_order_operators(torch, self.library.optape_hook_key().decode())

    def lines(self, run):
        """What the mock was told while `run` ran."""
        self.mock.mock_clear()
        self.library.optape_hook_thread(1)
        try:
            run()
        finally:
            self.library.optape_hook_thread(0)
        lines = self.mock.mock_lines().decode().splitlines()
        wrong = [line for line in lines if line.startswith(("BROKEN", "FAILED", "end without"))]
        assert not wrong, wrong
        return lines


class Attached:
    """Programs in processes of their own, with the glue attached."""

    def __init__(self):
        self.directory = tempfile.TemporaryDirectory()
        root = self.directory.name
        self.mock = build_mock(root)
        self.site = os.path.join(root, "site")
        information = os.path.join(self.site, "optape_attach-0.1.0.dist-info")
        os.makedirs(information)
        for name in ("_optape_attach.py", "_optape_facts.py", "_optape_watch.py", "sitecustomize.py"):
            os.symlink(os.path.abspath(os.path.join(GLUE, name)), os.path.join(self.site, name))
        for name in ("entry_points.txt", "METADATA"):
            os.symlink(os.path.abspath(os.path.join(GLUE, name)), os.path.join(information, name))
        self.count = 0

    def run(self, program, attach=True, environment=(), arguments=()):
        """Runs Python code. Gives the finished process, the lines of each process (first started first), and the run directory."""
        self.count += 1
        run = os.path.join(self.directory.name, f"run{self.count}")
        os.makedirs(run)
        script = os.path.join(run, "program.py")
        with open(script, "w", encoding="utf-8") as file:
            file.write(program)
        changed = dict(os.environ)
        changed.pop("OPTAPE_RUN", None)
        if attach:
            changed.update(
                PYTHONPATH=self.site,
                OPTAPE_RUN=run,
                OPTAPE_CAPTURE_LIB=self.mock,
                OPTAPE_HOOK_SOURCE=os.path.abspath(HOOK_SOURCE),
                OPTAPE_TORCH_VERSIONS="2.13.0",
                OPTAPE_FORCE_TORCH="1",
                MOCK_LINES=os.path.join(run, "lines"),
            )
        changed.update(environment)
        done = subprocess.run(
            [sys.executable, *arguments, script], env=changed, capture_output=True, text=True, timeout=600, check=False
        )
        lines = {}
        for name in os.listdir(run):
            if name.startswith("lines."):
                with open(os.path.join(run, name), encoding="utf-8") as file:
                    lines[int(name.removeprefix("lines."))] = file.read().splitlines()
        wrong = [line for some in lines.values() for line in some if line.startswith(("BROKEN", "FAILED"))]
        assert not wrong, wrong
        return done, [lines[pid] for pid in sorted(lines)], run
