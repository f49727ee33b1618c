"""Attaches optape's recorder to this process: at the end of `import torch`, or when `import optape` asks for it.

Under `optape record` torch calls `attach` through the entry point group `torch.backends` (torch/__init__.py, _import_device_backends). It
builds or finds the hook library, loads it together with capture, and tells capture about modules and threads. An
exception here would fail `import torch`, so nothing leaves `attach`: whatever goes wrong is one line on stderr and a file
in the run directory, and the program runs on, unrecorded.

`start` and `stop` do the same at a time that the program chooses, as often as it likes; there errors are raised. The libraries
are loaded once and stay.

`python _optape_attach.py --build-hook` builds the hook ahead, for machines without a compiler.
"""

import atexit
import ctypes
import functools
import hashlib
import importlib.machinery
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import weakref

ABI_VERSION = 3


class AttachError(Exception):
    """Recording is not possible here. The text says why and what to do."""


# ---- what is called in the two libraries ---------------------------------------------------------------------------

_pointers = ctypes.POINTER(ctypes.c_void_p)

CAPTURE = {
    "optape_capture_table": (ctypes.c_void_p, []),
    "optape_capture_start": (ctypes.c_int32, [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]),
    "optape_define_module": (
        ctypes.c_uint32,
        [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int32, _pointers, ctypes.c_size_t],
    ),
    "optape_module_parameters": (None, [ctypes.c_uint32, _pointers, ctypes.c_size_t]),
    "optape_define_watch": (ctypes.c_uint32, [ctypes.c_int64, ctypes.c_char_p]),
    "optape_watch_keep": (None, [ctypes.c_uint32, ctypes.c_uint32]),
    "optape_watch_switch": (None, [ctypes.c_int64, ctypes.c_int32]),
    "optape_optimizer_enter": (None, []),
    "optape_optimizer_exit": (None, []),
    "optape_stage": (None, [ctypes.c_char_p]),
    "optape_step": (None, [ctypes.c_uint64]),
    "optape_range_enter": (None, [ctypes.c_char_p]),
    "optape_range_exit": (None, []),
    "optape_opaque": (None, [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64]),
    "optape_opaque_enter": (None, []),
    "optape_opaque_exit": (None, [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64]),
    "optape_recording": (ctypes.c_int32, []),
    "optape_text": (ctypes.c_uint32, [ctypes.c_char_p]),
    "optape_plan_flags": (ctypes.c_uint32, [ctypes.c_uint32]),
    "optape_pause": (None, []),
    "optape_resume": (None, []),
    "optape_stop": (None, []),
    "optape_fact": (None, [ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p]),
}

HOOK = {
    "optape_hook_install": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]),
    "optape_hook_key": (ctypes.c_char_p, []),
    "optape_hook_torch_version": (ctypes.c_char_p, []),
    "optape_hook_abi_version": (ctypes.c_uint32, []),
    "optape_hook_thread": (ctypes.c_int32, [ctypes.c_int32]),
    "optape_hook_module_enter": (None, [ctypes.c_uint32, ctypes.c_int32]),
    "optape_hook_module_exit": (None, [ctypes.c_uint32]),
    "optape_hook_watch": (None, [ctypes.c_void_p, ctypes.c_int64]),
    "optape_hook_optimizer": (None, [ctypes.c_void_p, ctypes.c_void_p]),
    "optape_hook_replan": (None, [ctypes.c_void_p]),
    "optape_hook_function": (ctypes.c_void_p, [ctypes.c_char_p]),
    "optape_hook_function_begin": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]),
    "optape_hook_function_end": (None, [ctypes.c_void_p, ctypes.c_size_t]),
    "optape_hook_function_abort": (None, []),
    "optape_hook_identify": (None, [ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64)]),
}


def _load(path, signatures):
    try:
        # Never unloaded: torch keeps pointers into the hook, and threads may run in it while the process ends.
        library = ctypes.CDLL(path, mode=os.RTLD_LOCAL | os.RTLD_NOW | os.RTLD_NODELETE)
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype = result
            function.argtypes = arguments
        return library
    except (OSError, AttributeError) as error:
        raise AttachError(f"cannot load {path}: {error}") from error


# ---- building the hook ---------------------------------------------------------------------------------------------


def _cache_directory():
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "optape")


def _compiler():
    """The command that compiles C++, as a list, or None."""
    asked = os.environ.get("CXX")
    if asked:
        command = shlex.split(asked)
        path = shutil.which(command[0]) if command else None
        if path is None:
            raise AttachError(f"CXX is {asked!r}, which cannot be found; set CXX to a C++ compiler (g++ 11 or clang 14 or newer)")
        return [path, *command[1:]]
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path is not None:
            return [path]
    return None


def _identity_of(command):
    """What tells compilers apart without starting them: path, size and time of the program behind the name."""
    parts = []
    for word in command:
        path = shutil.which(word)
        if path is None:
            parts.append(word)
            continue
        path = os.path.realpath(path)
        status = os.stat(path)
        parts.append(f"{path} {status.st_size} {status.st_mtime_ns}")
    return "\n".join(parts)


def _sources(directory):
    contents = []
    for name in ("optape_hook.cpp", "optape_hook.h"):
        path = os.path.join(directory, name)
        try:
            with open(path, "rb") as file:
                contents.append(file.read())
        except OSError as error:
            raise AttachError(f"cannot read the hook's source {path}: {error.strerror}") from error
    return contents


def _short_hash(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _compile(command, source_directory, target, torch):
    root = os.path.dirname(os.path.abspath(torch.__file__))
    include = os.path.join(root, "include")
    libraries = os.path.join(root, "lib")
    partial = f"{target}.{os.getpid()}"
    arguments = [
        *command,
        "-std=c++20",
        "-O2",
        "-DNDEBUG",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        "-isystem",
        include,
        "-isystem",
        os.path.join(include, "torch", "csrc", "api", "include"),
        os.path.join(source_directory, "optape_hook.cpp"),
        "-o",
        partial,
        f"-L{libraries}",
        "-ltorch_cpu",
        "-lc10",
        "-ltorch",
        "-Xlinker",
        "-rpath",
        "-Xlinker",
        libraries,
    ]
    try:
        # Without our environment: the compiler may itself be a Python program.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OPTAPE_") and k != "PYTHONPATH"}
        done = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, check=False
        )
        if done.returncode != 0:
            log = f"{target}.log"
            with open(log, "wb") as file:
                file.write(shlex.join(arguments).encode() + b"\n" + done.stdout)
            lines = [line for line in done.stdout.decode(errors="replace").splitlines() if "error" in line.lower()]
            first = lines[0].strip() if lines else f"{command[0]} ended with {done.returncode}"
            raise AttachError(f"the hook does not compile for torch {torch.__version__}: {first} (all of it: {log})")
        os.replace(partial, target)
    except OSError as error:
        raise AttachError(f"cannot run the C++ compiler {shlex.join(command)}: {error.strerror}") from error
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def hook_library(source_directory, torch, announce):
    """The path of the hook built for this torch. Builds it where it is not in the cache yet."""
    import fcntl

    sources = _sources(source_directory)
    git = getattr(torch.version, "git_version", None) or "unknown"
    prefix = f"hook-{torch.__version__}-{platform.machine()}-{_short_hash(git, *sources)}"
    directory = _cache_directory()
    try:
        compiler = _compiler()
        built = _short_hash(_identity_of(compiler)) if compiler else None
        os.makedirs(directory, exist_ok=True)
        if compiler is None:
            ready = sorted(name for name in os.listdir(directory) if name.startswith(prefix) and name.endswith(".so"))
            if ready:
                return os.path.join(directory, ready[0])
            raise AttachError(
                "no C++ compiler found to build the hook with; install one (Debian and Ubuntu: apt install g++) or set CXX, "
                "or copy the cache directory ~/.cache/optape from a machine with the same torch where `optape build-hook` ran"
            )
        target = os.path.join(directory, f"{prefix}-{built}.so")
        if os.path.exists(target):
            return target
        with open(os.path.join(directory, "lock"), "a", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.exists(target):
                announce(f"building the hook for torch {torch.__version__} (once)...")
                _compile(compiler, source_directory, target, torch)
        return target
    except OSError as error:
        raise AttachError(
            f"cannot use the cache directory {directory}: {error.strerror}; set XDG_CACHE_HOME to a directory that can be written"
        ) from error


# ---- modules -------------------------------------------------------------------------------------------------------

# Classes whose output is spikes, by library: module prefix, names that make a class one, names that rule it out. A class is
# judged by all its bases, so that neurons derived in the program are found.
SPIKING = (
    (
        "spikingjelly.",
        {
            "BaseNode",
            "SimpleBaseNode",
            "DSRIFNode",
            "DSRLIFNode",
            "FewSpikeNode",
            "FlexSN",
            "ActivationAwareIFNode",
            "ILCBaseNode",
            "GatedLIFNode",
            "NoisyBaseNode",
            "PSN",
            "MaskedPSN",
            "SlidingPSN",
            "STBIFNode",
        },
        {"NonSpikingBaseNode", "NoisyNonSpikingBaseNode"},
    ),
    ("snntorch.", {"SpikingNeuron", "LIF"}, set()),
    ("sinabs.", {"StatefulLayer"}, {"ExpLeak"}),
    ("norse.", {"SNN", "SNNCell", "SNNRecurrent", "SNNRecurrentCell"}, {"LI", "LICell", "LIBoxCell", "LILinearCell"}),
)


def is_spiking(kind):
    """Whether modules of this class put out spikes."""
    for prefix, names, others in SPIKING:
        known = {base.__name__ for base in kind.__mro__ if base.__module__.startswith(prefix)}
        if known & names and not known & others:
            return True
    return False


class Modules:
    """Knows modules by what `torch.utils.module_tracker` would call them, over the whole life of the process.

    Nothing is stored on modules: the program copies, pickles and compares them. Numbers are kept by id() and dropped when
    a module dies.
    """

    # How often in vain a module of a class is looked for below the modules that are running; programs may make a module
    # anew for every call.
    MAX_SEARCHES = 32

    def __init__(self, torch, capture, calls, watch_outputs):
        self.capture = capture
        self.know = calls.get("know", _nothing)
        self.forget = calls.get("forget", _nothing)
        self.watch_outputs = watch_outputs
        self.without_torch_function = torch._C.DisableTorchFunctionSubclass
        self.call_code = torch.nn.Module._call_impl.__code__
        self.lock = threading.RLock()
        self.numbers = {}  # id(module) -> number: what the hooks look up
        self.watches = {}  # number -> watch id, of spiking neurons
        self.names = {}  # id(module) -> name
        self.children_named = set()  # id(module), once its children have names
        self.references = {}  # id(module) -> weak reference that forgets it
        self.told = {}  # number -> (name, class), addresses of the parameters that capture was told
        self.left = {}  # (name, class) -> numbers of dead modules, given out again
        self.classes = {}  # class -> (text for capture, whether it spikes)
        self.searches = {}  # class -> how often it was looked for in vain
        self.facts = None  # _optape_facts.Facts, once there is one

    # Names as ModuleTracker gives them: the module called first has its class's name, its children's are derived, and a
    # module reachable under several names has the one seen last.

    def _name(self, module, name):
        key = id(module)
        if self.names.get(key) == name:
            return
        if key not in self.references:
            self.references[key] = weakref.ref(module, self._forgetter(key))
        self._release(key)
        self.names[key] = name

    def _name_children(self, module):
        key = id(module)
        if key in self.children_named:
            return
        self.children_named.add(key)
        prefix = self.names[key]
        for name, child in module.named_children():
            self._name(child, f"{prefix}.{name}")
            self._name_children(child)

    def _forgetter(self, key):
        def forget(_reference):
            self.references.pop(key, None)
            self._release(key)
            self.names.pop(key, None)
            self.children_named.discard(key)

        return forget

    def _release(self, key):
        number = self.numbers.pop(key, None)
        if number is not None:
            self.forget(key)
            self.left.setdefault(self.told[number][0], []).append(number)

    def _define(self, module):
        key = id(module)
        if key in self.numbers:
            return
        kind = type(module)
        if kind not in self.classes:
            bases = [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__[:-1]]
            self.classes[kind] = ("\n".join(bases).encode(), is_spiking(kind))
        text, spiking = self.classes[kind]
        name = self.names[key]
        addresses = self._addresses(module)
        spare = self.left.get((name, kind))
        if spare:
            number = spare.pop()
            if self.told[number][1] != addresses:
                self._tell_parameters(number, addresses)
        else:
            number = self.capture.optape_define_module(
                name.encode(), text, int(spiking), (ctypes.c_void_p * len(addresses))(*addresses), len(addresses)
            )
            if spiking and self.watch_outputs:
                self.watches[number] = self.capture.optape_define_watch(number, b"output")
        self.told[number] = ((name, kind), addresses)
        self.numbers[key] = number
        self.know(key, number, self.watches.get(number, -1))
        if self.facts is not None:
            self.facts.defined(module, number)

    def watch_spiking(self, on):
        """Whether outputs of spiking neurons are watched from now on; another recording may want something else."""
        with self.lock:
            if on == self.watch_outputs:
                return
            self.watch_outputs = on
            for number, ((_name, kind), _addresses) in self.told.items():
                if on and self.classes[kind][1] and number not in self.watches:
                    self.watches[number] = self.capture.optape_define_watch(number, b"output")
            if not on:
                self.watches.clear()
            self.know_again()

    def know_again(self):
        """The hook takes all modules as if it had never heard of them."""
        with self.lock:
            for key, number in self.numbers.items():
                self.know(key, number, self.watches.get(number, -1))

    def living(self):
        """All modules that have numbers, with these."""
        with self.lock:
            found = [(self.references[key](), number) for key, number in self.numbers.items() if key in self.references]
        return [(module, number) for module, number in found if module is not None]

    def _define_tree(self, module, seen):
        if id(module) in seen or id(module) not in self.names:
            return
        seen.add(id(module))
        self._define(module)
        for _, child in module.named_children():
            self._define_tree(child, seen)

    def _addresses(self, module):
        # Lazy modules' parameters are a subclass that answers in Python.
        with self.without_torch_function():
            return [parameter._cdata for parameter in module._parameters.values() if parameter is not None]

    def _tell_parameters(self, number, addresses):
        self.capture.optape_module_parameters(number, (ctypes.c_void_p * len(addresses))(*addresses), len(addresses))

    def meet(self, module):
        """The number of a module that is called and has none. -1 where something is wrong with it."""
        key = id(module)
        try:
            with self.lock:
                if key not in self.names:
                    self._name(module, self._name_below_running(module) or type(module).__name__)
                self._name_children(module)
                self._define_tree(module, set())
                if self.facts is not None:
                    self.facts.tell_defined()
                return self.numbers[key]
        except Exception:  # whatever the program's own module classes do here
            self.know(key, -1, -1)
            return -1

    def _name_below_running(self, module):
        """The name of a module that was put below a running one after that had been called first."""
        kind = type(module)
        if self.searches.get(kind, 0) >= self.MAX_SEARCHES:
            return None
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is self.call_code:
                running = frame.f_locals.get("self")
                prefix = self.names.get(id(running))
                if prefix is not None and running is not module:
                    for name, below in running.named_modules():
                        if below is module:
                            return f"{prefix}.{name}"
            frame = frame.f_back
        self.searches[kind] = self.searches.get(kind, 0) + 1
        return None

    def child_registered(self, module, name, child):
        """A module got a child after its children had got their names."""
        if self.facts is not None and id(module) in self.numbers:
            self.facts.changes_soon(module)
        if child is not None and id(module) in self.children_named:
            with self.lock:
                self._name(child, f"{self.names[id(module)]}.{name}")

    def parameter_registered(self, module, name, parameter):
        """A module got another parameter after capture had been told its parameters."""
        number = self.numbers.get(id(module))
        if number is None:
            return
        with self.lock:
            current = dict(module._parameters)
            current[name] = parameter
            if self.facts is not None:
                self.facts.changes_soon(module)
            with self.without_torch_function():
                addresses = [p._cdata for p in current.values() if p is not None]
            known, before = self.told[number]
            if addresses != before:
                self.told[number] = (known, addresses)
                self._tell_parameters(number, addresses)


def _nothing(*_arguments):
    pass


def _first_tensor(output, tensor_types):
    if type(output) in tensor_types:
        return output
    if isinstance(output, (tuple, list)) and output and type(output[0]) in tensor_types:
        return output[0]
    return None


def hook_modules(torch, modules, calls):
    """Has every module call reported."""
    from torch.nn.modules.module import (
        register_module_module_registration_hook,
        register_module_parameter_registration_hook,
    )

    call = torch.nn.Module.__call__
    types = (torch.Tensor, torch.nn.Parameter)
    hook = calls.get("hook_modules")
    if hook is None or type(call) is not type(_nothing) or not hook(call, type(call).__basicsize__, modules.meet, *types):
        _hook_modules_by_torch(torch, modules, calls, frozenset(types))

    def child_registered(module, name, child):
        try:
            modules.child_registered(module, name, child)
        except Exception:
            pass  # the name is looked for when the child is called

    def parameter_registered(module, name, parameter):
        try:
            modules.parameter_registered(module, name, parameter)
        except Exception:
            pass  # its gradients are not attributed

    register_module_module_registration_hook(child_registered)
    register_module_parameter_registration_hook(parameter_registered)


def _hook_modules_by_torch(torch, modules, calls, tensor_types):
    """With torch's global module hooks, where the hook library cannot do it: other Pythons than CPython. It costs 3 us per
    module call, and torch.compile says that there are such hooks."""
    from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

    # Compiled code must not know of us: dynamo takes this for a constant and drops the rest.
    compiling = torch.compiler.is_dynamo_compiling
    numbers = modules.numbers
    watches = modules.watches
    meet = modules.meet
    enter = calls["enter"]
    leave = calls["exit"]
    watch = calls["watch"]

    def before(module, _inputs):
        if compiling():
            return
        number = numbers.get(id(module))
        if number is None:
            number = meet(module)
        if number >= 0:
            enter(number, module.training)

    def after(module, _inputs, output):
        if compiling():
            return
        number = numbers.get(id(module))
        if number is None:
            return
        if number in watches:
            tensor = _first_tensor(output, tensor_types)
            if tensor is not None:
                watch(tensor._cdata, watches[number])
        leave(number)

    # Called even if the module raises, so that the stack of modules stays balanced.
    register_module_forward_pre_hook(before)
    register_module_forward_hook(after, always_call=True)


def _skip_code(torch):
    """The function that has dynamo leave a code object alone, or None. Found without importing dynamo, which takes seconds."""
    evaluation = torch._C._dynamo.eval_frame
    if hasattr(evaluation, "skip_code"):  # up to torch 2.5
        return evaluation.skip_code
    try:
        strategy = evaluation._FrameExecStrategy(evaluation._FrameAction.SKIP, evaluation._FrameAction.DEFAULT)
        set_strategy = evaluation.set_code_exec_strategy
    except (AttributeError, TypeError):
        return None
    return lambda code: set_strategy(code, strategy)


def leave_to_eager(torch, namespace):
    """Has dynamo never compile a function of this namespace: it looks at every Python frame below compiled code."""
    skip = _skip_code(torch)
    if skip is None:
        return
    own = [value for value in namespace.values() if getattr(value, "__module__", None) == namespace["__name__"]]
    pending = [value.__code__ for value in own if type(value) is type(leave_to_eager)]
    for kind in own:
        if isinstance(kind, type):
            pending += [value.__code__ for value in vars(kind).values() if type(value) is type(leave_to_eager)]
    while pending:
        code = pending.pop()
        skip(code)
        pending.extend(constant for constant in code.co_consts if type(constant) is type(code))


def hook_threads(begin_thread):
    """Has `begin_thread` called in threads that the program starts.

    `_bootstrap_inner` is the first method of threading.Thread that runs inside the new thread. Unlike `run` it is never
    overridden and unlike `_thread.start_new_thread` it is nobody's public interface; everything that makes Python threads goes
    through it (concurrent.futures, DataLoader's pin thread, timers). Our frame lies outside of the one that catches what
    `run` raises, so tracebacks stay as they are. Where a thread comes from elsewhere, its first module call switches the
    hook on.
    """
    original = getattr(threading.Thread, "_bootstrap_inner", None)
    if original is None:
        return

    def _bootstrap_inner(self):
        begin_thread()
        original(self)

    threading.Thread._bootstrap_inner = _bootstrap_inner


# ---- attaching -----------------------------------------------------------------------------------------------------


def _rank():
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        value = os.environ.get(name, "")
        if value.isdecimal():
            return int(value)
    return None


def _versions(torch):
    from importlib import metadata

    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("spikingjelly", "snntorch", "sinabs", "norse"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return versions


def _check_torch(torch, variables):
    supported = [text for text in variables.get("OPTAPE_TORCH_VERSIONS", "").split(",") if text]
    version = torch.__version__.split("+")[0]
    if version in supported or variables.get("OPTAPE_FORCE_TORCH") == "1":
        return
    raise AttachError(
        f"torch {torch.__version__} is not among the supported versions ({', '.join(supported) or 'none are named'}); "
        "--force-torch tries it anyway"
    )


def _builtins(library, path):
    """The calls that module hooks make, as builtins of the hook library where it can make them, else through ctypes."""
    calls = {
        "enter": library.optape_hook_module_enter,
        "exit": library.optape_hook_module_exit,
        "watch": library.optape_hook_watch,
        "thread": library.optape_hook_thread,
    }
    try:
        make = ctypes.PyDLL(path).optape_hook_python
        make.restype = ctypes.py_object
        make.argtypes = [ctypes.c_char_p]
        more = ("hook_modules", "know", "forget", "hook_assignments", "hook_steps", "detail", "states", "changes", "hook_watches")
        return {name: make(name.encode()) for name in (*calls, *more)}
    except (AttributeError, OSError, ValueError):
        return calls


def _required(variables, name):
    value = variables.get(name)
    if not value:
        raise AttachError(f"{name} is not set; start the program with `optape record -- ...`")
    return value


class Recorder:
    """What is loaded into this process to record it: once, for all recordings."""

    def __init__(self, torch, variables):
        def announce(text):
            if sys.stderr is not None and (sys.stderr.isatty() or variables.get("OPTAPE_VERBOSE") == "1"):
                _say(text)

        self.torch = torch
        self.announce = announce
        # True while dynamo traces: it takes this for a constant and drops what depends on it.
        self.compiling = torch.compiler.is_compiling
        self.functions = None
        self.watch_numbers = {}  # name -> number, of `optape.watch`
        path = hook_library(_required(variables, "OPTAPE_HOOK_SOURCE"), torch, announce)
        self.capture = _load(_required(variables, "OPTAPE_CAPTURE_LIB"), CAPTURE)
        self.hook = _load(path, HOOK)
        if self.hook.optape_hook_abi_version() != ABI_VERSION:
            raise AttachError(f"{path} speaks another ABI version; delete it and start again")
        error = ctypes.create_string_buffer(1024)
        if self.hook.optape_hook_install(self.capture.optape_capture_table(), error, len(error)) != 0:
            raise AttachError(error.value.decode(errors="replace"))
        self.calls = _builtins(self.hook, path)
        self.key = self.hook.optape_hook_key().decode()
        self.modules = None
        self.facts = None
        self.compiled = None

    def begin(self, run, variables, in_environment):
        """Begins a recording into the run directory."""
        error = ctypes.create_string_buffer(1024)
        request = {
            "run": run,
            "hook_key": self.key,
            "versions": _versions(self.torch),
            "command": list(getattr(sys, "orig_argv", None) or sys.argv),
            "rank": _rank(),
        }
        if not in_environment:
            request["variables"] = dict(variables)
        if self.capture.optape_capture_start(json.dumps(request).encode(), error, len(error)) != 0:
            raise AttachError(error.value.decode(errors="replace"))
        self.hook.optape_hook_replan(ctypes.cast(self.capture.optape_plan_flags, ctypes.c_void_p))
        watch_outputs = variables.get("OPTAPE_STATS") not in ("none", "hook")
        if self.modules is None:
            self._hook_program(watch_outputs)
        self.modules.watch_spiking(watch_outputs)
        self.compiled.begin()
        self._begin_facts(variables)
        if variables.get("OPTAPE_FUNCTIONS") == "1":
            if self.functions is None:
                import _optape_functions

                self.functions = _optape_functions.Functions(self)
            self.functions.begin()
        self.calls["thread"](1)

    def _hook_program(self, watch_outputs):
        torch = self.torch
        self.modules = Modules(torch, self.capture, self.calls, watch_outputs)
        leave_to_eager(torch, globals())
        hook_modules(torch, self.modules, self.calls)
        self.hook.optape_hook_optimizer(
            ctypes.cast(self.capture.optape_optimizer_enter, ctypes.c_void_p),
            ctypes.cast(self.capture.optape_optimizer_exit, ctypes.c_void_p),
        )
        hook_threads(_begin_thread)
        _pass_higher_order_operators(torch, self.key)
        _let_compiled_code_keep_watches(torch)
        name_graphs(torch, self.capture)
        self.compiled = Compiled(torch, self.capture)
        self.compiled.hook()
        atexit.register(self.capture.optape_stop)
        self._follow_facts()

    def _follow_facts(self):
        """Tells what modules and optimizers are, beside what they run."""
        import _optape_facts
        import _optape_watch

        for file in (_optape_facts, _optape_watch):
            leave_to_eager(self.torch, vars(file))
        try:
            watches = _optape_watch.Watches(self.capture, self.calls, self.modules, _say)
            self.facts = _optape_facts.Facts(self.torch, self.capture, self.hook, self.calls, self.modules, watches)
        except Exception as error:  # a torch that is built otherwise than those we know
            self._without_facts(error)

    def _begin_facts(self, variables):
        if self.facts is None:
            return
        try:
            self.facts.begin(json.loads(variables.get("OPTAPE_DETAIL") or "{}"))
        except Exception as error:  # whatever the program's classes do here
            self._without_facts(error)

    def _without_facts(self, error):
        _say(f"facts about modules and optimizers are not recorded: {type(error).__name__}: {error}")

    def end(self):
        """Ends the recording; the hook stays, and lets pass what threads run for which it was on."""
        if self.facts is not None:
            self.facts.end()
        self.capture.optape_stop()
        self.calls["thread"](0)
        if self.functions is not None:
            self.functions.end()


def _begin_thread():
    if live is not None:
        live.calls["thread"](1)
        if live.functions is not None:
            live.functions.begin_thread()


recorder = None  # once loaded
live = None  # the same, while it records


def _begin(torch, run, variables, in_environment):
    global recorder, live
    _check_torch(torch, variables)
    if recorder is None:
        recorder = Recorder(torch, variables)
    recorder.begin(run, variables, in_environment)
    live = recorder
    _note(os.path.join(run, f"attached-{os.getpid()}"), "")


def start(run, variables):
    """Begins a recording that the program asked for. `variables`: what its environment would hold under `optape record`."""
    try:
        import torch
    except ImportError as error:
        raise AttachError(f"this Python ({sys.executable}) cannot import torch: {error}") from error

    if live is not None:
        raise AttachError("this process is being recorded already")
    _begin(torch, run, variables, in_environment=False)


def stop():
    """Ends the recording that `start` began."""
    global live
    if live is not None:
        ended, live = live, None
        ended.end()


def _pass_higher_order_operators(torch, key_name):
    """Has torch.cond and its like step over the hook's dispatch key.

    They dispatch in Python (torch/_ops.py, HigherOrderOperator) and fail at keys that they do not know.
    """
    operators = torch._ops
    key = torch._C._parse_dispatch_key(key_name)
    for name in ("_HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS", "_DEFAULT_FALLTHROUGH_KEYS"):
        keys = getattr(operators, name, None)
        if isinstance(keys, list) and key not in keys:
            keys.append(key)
    for operator in operators._higher_order_ops.values():
        operator.fallthrough(key)


def name_graphs(torch, capture):
    """Replays of CUDA graphs become opaque regions: what a graph runs does not come by the dispatcher.

    How long one took is what the launch took on this thread: nobody waits for the GPU to know more."""
    graph_class = getattr(torch.cuda, "CUDAGraph", None)
    original = getattr(graph_class, "replay", None)
    if original is None:
        return
    names = weakref.WeakKeyDictionary()

    @functools.wraps(original)
    def replay(self):
        if live is None:
            return original(self)
        name = names.get(self)
        if name is None:
            name = names[self] = f"CUDA graph {len(names)}".encode()
        began = time.monotonic_ns()
        try:
            return original(self)
        finally:
            capture.optape_opaque(name, began, time.monotonic_ns())

    graph_class.replay = replay


class AfterImport:
    """Runs something when a module has been imported, if it ever is: torch imports its compilers when they are needed, which takes seconds."""

    def __init__(self, actions):
        self.actions = actions  # name of a module -> what is called with it

    def install(self):
        for name in [name for name in self.actions if name in sys.modules]:
            self._run(name, sys.modules[name])
        if self.actions:
            sys.meta_path.insert(0, self)

    def find_spec(self, name, path=None, target=None):
        if name not in self.actions:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        loader = getattr(spec, "loader", None)
        if not hasattr(loader, "exec_module"):
            return None

        def exec_module(module):
            del loader.exec_module  # that of its class again
            loader.exec_module(module)
            self._run(name, module)

        loader.exec_module = exec_module
        return spec

    def _run(self, name, module):
        action = self.actions.pop(name, None)
        if action is None:
            return
        try:
            action(module)
        except Exception as error:  # a torch that is built otherwise than those we know; importing it must go on
            _say(f"what {name} runs outside of the dispatcher is not recorded: {type(error).__name__}: {error}")
        if not self.actions and self in sys.meta_path:
            sys.meta_path.remove(self)


class Compiled:
    """Calls of what Inductor (torch.compile) has made become opaque regions: of what it runs, kernels of its own do not come by the dispatcher.

    A region is one call of a compiled graph. Its name says which: the function that dynamo began with, dynamo's number for the compilation, and
    `backward` for the graph of the backward pass. Code that has no kernels of its own calls ops and nothing else, and is no region. What other
    backends make is looked at as far as it calls ops, which all are recorded; whether it runs anything else nobody knows.
    """

    # As Inductor writes Python: a kernel of its own, and the line behind all of them.
    KERNEL = re.compile(r"^(\w+) = async_compile\.\w+\(", re.MULTILINE)
    ALL_KERNELS = "async_compile.wait(globals())"

    def __init__(self, torch, capture):
        self.torch = torch
        self.capture = capture
        self.known = {}  # id of what was compiled -> its name (None: no region), its number, a reference that forgets it
        self.told = set()  # numbers that this recording has been told of
        self.facts = {}  # number -> what there is to say
        self.count = 0

    def begin(self):
        """Another recording begins, which was told of nothing."""
        self.told = set()

    def hook(self):
        AfterImport(
            {"torch._inductor.output_code": self._hook_inductor, "torch.export.pt2_archive._package": self._hook_packages}
        ).install()

    def _hook_inductor(self, module):
        for kind in (module.CompiledFxGraph, module.CompiledAOTI):
            kind.__call__ = self._region(kind.__call__)
        original = module.CompiledFxGraph.post_compile

        # Whether it was compiled now or comes from a cache: here it is known what for.
        @functools.wraps(original)
        def post_compile(graph, *arguments, **keywords):
            result = original(graph, *arguments, **keywords)
            try:
                settings = keywords.get("graph_kwargs") or (arguments[-1] if arguments else None)
                self._meet(graph, isinstance(settings, dict) and settings.get("is_backward") is True)
            except Exception as error:
                _say(f"a compiled graph has no name: {type(error).__name__}: {error}")
            return result

        module.CompiledFxGraph.post_compile = post_compile

    def _hook_packages(self, module):
        module.AOTICompiledModel.__call__ = self._region(module.AOTICompiledModel.__call__)

    def _region(self, original):
        known = self.known
        enter, leave = self.capture.optape_opaque_enter, self.capture.optape_opaque_exit
        now = time.monotonic_ns

        @functools.wraps(original)
        def __call__(compiled, *arguments, **keywords):
            if live is None:
                return original(compiled, *arguments, **keywords)
            entry = known.get(id(compiled)) or self._meet(compiled, False)
            name, number = entry[0], entry[1]
            if name is None:
                return original(compiled, *arguments, **keywords)
            if number not in self.told:
                self._tell(number)
            enter()
            began = now()
            try:
                return original(compiled, *arguments, **keywords)
            finally:
                leave(name, began, now())

        return __call__

    def _meet(self, compiled, backward):
        key = id(compiled)
        known = self.known

        def forget(_reference):
            known.pop(key, None)

        name, kernels = None, None
        source = getattr(compiled, "source_code", None)
        if isinstance(source, str) and self.ALL_KERNELS in source:
            kernels = self.KERNEL.findall(source)
        number = self.count
        if kernels is None or kernels:
            name = self._name(compiled, backward)
            self.facts[number] = {"name": name, "kernels": kernels or [], "devices": sorted(getattr(compiled, "device_types", None) or [])}
            self.count += 1
            name = name.encode()
        entry = known[key] = (name, number, weakref.ref(compiled, forget))
        return entry

    def _name(self, compiled, backward):
        """`compiled Net.forward [0/1] backward`, as far as it is known."""
        what = getattr(compiled, "compile_region_name", None)
        identity = None
        guards = sys.modules.get("torch._guards")
        try:
            if what is None:
                traced = guards.TracingContext.try_get().traced_code
                # Modules of torch's own are compiled through a function of dynamo's, which inlines what was meant, to its end.
                wrapped = os.path.basename(traced[0].co_filename) == "external_utils.py"
                code = traced[-1 if wrapped else 0]
                what = getattr(code, "co_qualname", code.co_name)
            identity = guards.CompileContext.current_compile_id()
        except (AttributeError, IndexError):  # compiled before this process was recorded, or not by dynamo
            pass
        parts = ["compiled", str(what) if what else f"graph {self.count}"]
        if identity is not None:
            parts.append(f"[{identity}]")
        if backward:
            parts.append("backward")
        return " ".join(parts)

    def _tell(self, number):
        self.told.add(number)
        fact = self.facts.get(number)
        if fact is not None:
            self.capture.optape_fact(-1, f"compiled.{number}".encode(), json.dumps(fact).encode())


def _let_compiled_code_keep_watches(torch):
    """Without this, compilers drop `optape::watch`: it returns nothing."""
    try:
        import torch.fx.node as node

        node._side_effectful_functions.add(torch.ops.optape.watch.default)
    except (ImportError, AttributeError):
        pass


def _say(text):
    try:
        print(f"optape: {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):
        pass  # no stderr


def _note(path, text):
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        pass  # the run directory is gone: nobody waits for the note


attached = None  # None: nobody asked; a text: why not; True: by `optape record`


def attach():
    """What torch calls. Never raises."""
    global attached
    run = os.environ.get("OPTAPE_RUN")
    if not run or attached is not None:
        return
    attached = "torch is being imported"
    try:
        import torch

        _begin(torch, run, os.environ, in_environment=True)
        attached = True
    except AttachError as error:
        attached = str(error)
        _say(f"not recording this program: {error}")
        _note(os.path.join(run, f"attach-error-{os.getpid()}.txt"), f"{error}\n")
    except BaseException as error:  # `import torch` fails with whatever leaves here
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        import traceback

        attached = f"{type(error).__name__}: {error}"
        _say(f"not recording this program: attaching failed: {type(error).__name__}: {error}")
        _note(os.path.join(run, f"attach-error-{os.getpid()}.txt"), traceback.format_exc())


def main():
    """`--build-hook`: builds the hook for the torch of this Python, and prints where it is."""
    if sys.argv[1:] != ["--build-hook"]:
        print("usage: python _optape_attach.py --build-hook", file=sys.stderr)
        return 2
    os.environ.pop("OPTAPE_RUN", None)
    try:
        import torch
    except ImportError as error:
        _say(f"this Python ({sys.executable}) cannot import torch: {error}")
        return 1
    try:
        _check_torch(torch, os.environ)
        source = os.environ.get("OPTAPE_HOOK_SOURCE") or os.path.dirname(os.path.abspath(__file__))
        print(hook_library(source, torch, _say))
    except AttachError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
