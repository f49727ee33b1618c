"""The second way to attach, for programs started with TORCH_DEVICE_BACKEND_AUTOLOAD=0.

torch then loads no entry points; what this file does instead is to call the same function when `import torch` has ended.
It stands before an existing sitecustomize on sys.path, so it runs that one too, as if this file were not there.
"""

import importlib.machinery
import importlib.util
import os
import sys


class _AfterTorch:
    """Finds torch as everybody does, and attaches once its module has run."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.loader is None:
            return None
        run_module = spec.loader.exec_module

        def exec_module(module):
            run_module(module)
            spec.loader.exec_module = run_module
            import _optape_attach

            _optape_attach.attach()

        spec.loader.exec_module = exec_module
        return spec


def _run_the_other_sitecustomize():
    here = os.path.dirname(os.path.abspath(__file__))
    others = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if os.environ.get("OPTAPE_RUN") and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
    sys.meta_path.insert(0, _AfterTorch())
_run_the_other_sitecustomize()
