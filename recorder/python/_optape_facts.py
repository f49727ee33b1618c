"""What modules and optimizers are (T7): facts, told when they become known and when they change.

A fact is a key and a JSON value about a module or, for optimizers, about the program; trace/FORMAT.md says which there are. Which
attributes hold the states of neurons is worked out here, too; the hook follows them.

Nothing here runs code of the program where it can be helped: attributes are read from `__dict__`, properties are not asked. Nothing is
stored on modules. Everything is bounded: the length of texts and lists, how often a module is told again.
"""

import ctypes
import enum
import fnmatch
import inspect
import json
import sys
import weakref

MAX_TEXT = 256
MAX_ITEMS = 64
MAX_DEPTH = 3
MAX_ATTRIBUTES = 256
# A number that dead modules left behind is told again at most so often: programs may make modules anew for every call.
MAX_TELLINGS = 64
MAX_FRAMES = 16

# Whose attributes hold states, by library: module prefix, classes (a class is judged by all its bases), where the states are. "results":
# calls return (output, state). A name that is `None` stands for all of a dictionary.
STATES = (
    ("spikingjelly.", {"MemoryModule"}, "_memories", None),
    ("sinabs.", {"StatefulLayer"}, "_buffers", None),
    ("snntorch.", {"SpikingNeuron", "LIF"}, "_buffers", {"mem", "syn", "syn_exc", "syn_inh", "spk", "b"}),
    ("norse.", {"SNN", "SNNCell", "SNNRecurrent", "SNNRecurrentCell", "LIBoxCell"}, "results", None),
)
CONTAINERS = ("_memories", "_buffers", "_parameters")
# Attributes that are told in another way.
TOLD_OTHERWISE = {*CONTAINERS, "_memories_rv"}


def names_of(module, name):
    """What a module can be called by: its scope name, the same without the root, and its classes with and without their modules."""
    below = name.partition(".")[2]
    names = {name, below} if below else {name}
    for base in type(module).__mro__[:-1]:
        names.add(base.__name__)
        names.add(f"{base.__module__}.{base.__qualname__}")
    return names


def matches(pattern, names):
    return pattern in names or any(fnmatch.fnmatchcase(name, pattern) for name in names)


class Facts:
    """Tells the facts of modules and optimizers of this process, anew to every recording: its stream knows nothing."""

    def __init__(self, torch, capture, hook, calls, modules, watches):
        self.torch = torch
        self.tell_fact = capture.optape_fact
        self.identify = hook.optape_hook_identify
        self.identifiers = (ctypes.c_uint64 * 2)()
        self.modules = modules
        self.watches = watches
        self.recording = False
        self.changes = calls.get("changes")
        self.states = calls.get("states")
        self.switch_detail = calls.get("detail")
        self.hook_assignments = calls.get("hook_assignments")
        self.usual = set(vars(torch.nn.Module()))
        self.untold = []  # modules that have just got their numbers, with these
        self.tellings = {}  # number -> how often it was told
        self.assigning = set()  # __setattr__ functions that are hooked
        self.optimizers = {}  # id(optimizer) -> Optimizer
        self.optimizer_count = 0
        # What torch.optim wraps around every step has one code object.
        self.step_code = torch.optim.Optimizer.profile_hook_step(lambda self: None).__code__
        self.asked_states = []
        self.follows_states = False
        self.in_hook = set()  # numbers of modules of which the hook follows something
        self._hook_assignments_of(torch.nn.Module)
        if calls.get("hook_steps") is not None:
            calls["hook_steps"](self.stepped)
        modules.facts = self

    def begin(self, asked):
        """A recording begins. `asked`: what is to be recorded of modules, as the daemon says it."""
        with self.modules.lock:
            in_detail = asked.get("level") == "full"
            self.asked_states = [(selection["pattern"], selection["names"]) for selection in asked.get("states", ())]
            self.follows_states = self.states is not None and (in_detail or bool(self.asked_states))
            if self.switch_detail is not None:
                self.switch_detail(in_detail)
            self.tellings.clear()
            self.optimizers.clear()
            self.optimizer_count = 0
            self.watches.begin(asked)
            self.recording = True
            self.modules.know_again()
            self.untold = self.modules.living()
            self.tell_defined()

    def end(self):
        """The recording ends."""
        self.watches.report()
        self.recording = False
        if self.switch_detail is not None:
            self.switch_detail(False)

    # ---- modules ---------------------------------------------------------------------------------------------------

    def _hook_assignments_of(self, kind):
        """A class that assigns attributes in its own way does so in a function of its own."""
        if self.hook_assignments is None:
            return
        for base in kind.__mro__:
            function = vars(base).get("__setattr__")
            if type(function) is type(matches) and function not in self.assigning:
                self.assigning.add(function)
                self.hook_assignments(function, type(function).__basicsize__, self.changed)

    def defined(self, module, number):
        """A module got its number."""
        if self.recording:
            self.untold.append((module, number))

    def tell_defined(self):
        """All modules of a tree have their numbers: tells what they are."""
        untold, self.untold = self.untold, []
        for module, number in untold:
            try:
                self._hook_assignments_of(type(module))
                self._tell_module(module, number)
            except Exception as error:  # whatever the program's classes do here
                self._tell(number, "problem", f"{type(error).__name__}: {error}"[:MAX_TEXT])

    def changes_soon(self, module):
        """A child or a parameter is about to be registered: the module is looked at before its next call."""
        if self.changes is not None:
            self.changes(id(module))

    def changed(self, module, last):
        """A module's attributes have changed since they were told; called by the hook. `last`: more changes are not told."""
        number = self.modules.numbers.get(id(module))
        if number is None or not self.recording:
            return
        try:
            self._tell_module(module, number)
            if last:
                self._tell(number, "followed", False)
        except Exception as error:
            self._tell(number, "problem", f"{type(error).__name__}: {error}"[:MAX_TEXT])

    def _tell(self, number, key, value):
        text = json.dumps(value, separators=(",", ":"))
        self.tell_fact(number, key.encode(), text.encode("utf-8", "replace"))

    def _tell_module(self, module, number):
        tellings = self.tellings.get(number, 0)
        if tellings >= 2 * MAX_TELLINGS:
            return
        self.tellings[number] = tellings + 1
        states = self._find_states(module)
        for key, value in self._describe(module, states).items():
            self._tell(number, key, value)
        watched = self.watches.of(module, number)
        returned = self.follows_states and self._returns_state(module)
        followed = states if self.follows_states else []
        anything = bool(followed or returned or watched)
        if self.states is not None and (anything or number in self.in_hook):
            (self.in_hook.add if anything else self.in_hook.discard)(number)
            self.states(id(module), tuple(part for state in followed for part in state), returned, watched)

    def _describe(self, module, states):
        values = vars(module)
        held = {name for name, _ in states}
        facts = {"training": bool(values.get("training", False))}
        with self.torch._C.DisableTorchFunctionSubclass():
            facts["parameters"] = [self._tensor(name, p) for name, p in values["_parameters"].items() if p is not None]
            lasting = values.get("_non_persistent_buffers_set", ())
            facts["buffers"] = [
                {**self._tensor(name, b), "persistent": name not in lasting}
                for name, b in values["_buffers"].items()
                if b is not None and name not in held
            ]
            facts["children"] = [
                [name, self.modules.numbers.get(id(child), -1)] for name, child in values["_modules"].items() if child is not None
            ]
            attributes, objects, tensors = {}, {}, []
            for name, value in [*self._class_attributes(module), *values.items()]:
                if name in self.usual or name in held or name in TOLD_OTHERWISE or len(attributes) + len(objects) >= MAX_ATTRIBUTES:
                    continue
                name = self._public(module, name)
                simple, known = self._simple(value, 0)
                if known:
                    attributes[name] = simple
                    objects.pop(name, None)
                elif isinstance(value, self.torch.Tensor):
                    tensors.append(self._tensor(name, value))
                else:
                    objects[name] = self._class_name(value)
                    attributes.pop(name, None)
            facts["attributes"], facts["objects"], facts["tensors"] = attributes, objects, tensors
        if states:
            resets = values.get("_memories_rv", {})
            facts["states"] = [
                {"name": name, "reset": self._simple(resets.get(name), 0)[0]} for name, _ in states
            ]
        return {key: value for key, value in facts.items() if value or key in ("training", "attributes")}

    def _class_attributes(self, module):
        """Attributes of simple type that the module has from its class."""
        for base in reversed(type(module).__mro__):
            if base is object or base is self.torch.nn.Module:
                continue
            for name, value in list(vars(base).items()):
                if not name.startswith("_") and isinstance(value, (bool, int, float, str)):
                    yield name, value

    def _public(self, module, name):
        """`_step_mode` is what the property `step_mode` shows."""
        public = name.lstrip("_")
        if public != name and isinstance(inspect.getattr_static(type(module), public, None), property):
            return public
        return name

    def _simple(self, value, depth):
        """A value as JSON can hold it, and whether it is of simple type."""
        if value is None or type(value) in (bool, str):
            return (value[:MAX_TEXT] if type(value) is str else value), True
        if isinstance(value, enum.Enum):
            return value.name, True
        if type(value) is int:
            return (value if -(2**63) <= value < 2**63 else str(value)[:MAX_TEXT]), True
        if type(value) is float:
            return (value if value - value == 0 else str(value)), True
        if isinstance(value, (self.torch.dtype, self.torch.device)):
            return str(value), True
        if isinstance(value, (tuple, list)) and depth < MAX_DEPTH and len(value) <= MAX_ITEMS:
            items = [self._simple(item, depth + 1) for item in value]
            if all(known for _, known in items):
                return [item for item, _ in items], True
        return None, False

    def _class_name(self, value):
        if inspect.isroutine(value) or inspect.isclass(value):
            name = f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', type(value).__name__)}"
        else:
            name = f"{type(value).__module__}.{type(value).__qualname__}"
        return name[:MAX_TEXT]

    def _tensor(self, name, tensor):
        about = {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "device": str(tensor.device)}
        if not hasattr(tensor, "materialize"):  # lazy parameters have no shape yet
            about["shape"] = list(tensor.shape)
        about["requires_grad"] = bool(tensor.requires_grad)
        if type(tensor) in (self.torch.Tensor, self.torch.nn.Parameter):
            about["storage"], about["tensor"] = self._identity(tensor)
        return about

    def _identity(self, tensor):
        self.identify(tensor._cdata, self.identifiers)
        return self.identifiers[0], self.identifiers[1]

    # ---- states of neurons -----------------------------------------------------------------------------------------

    def _find_states(self, module):
        """The attributes of a module that hold its state: (name, the dictionary attribute that holds it or None)."""
        found = {}
        values = vars(module)
        for prefix, classes, place, names in STATES:
            if place != "results" and self._is_one(module, prefix, classes):
                for name in values.get(place) or ():
                    if names is None or name in names:
                        found[name] = place
        for pattern, names in self.asked_states:
            if matches(pattern, names_of(module, self.modules.names.get(id(module), ""))):
                for name in names:
                    found[name] = next((c for c in CONTAINERS if name in (values.get(c) or ())), None)
        return list(found.items())

    def _returns_state(self, module):
        return any(place == "results" and self._is_one(module, prefix, classes) for prefix, classes, place, _ in STATES)

    @staticmethod
    def _is_one(module, prefix, classes):
        return any(base.__name__ in classes and base.__module__.startswith(prefix) for base in type(module).__mro__)

    # ---- optimizers ------------------------------------------------------------------------------------------------

    def stepped(self):
        """An optimizer's step has ended; called by the hook, from below the step."""
        if not self.recording:
            return
        frame = sys._getframe(1)
        for _ in range(MAX_FRAMES):
            if frame is None:
                return
            if frame.f_code is self.step_code:
                optimizer = frame.f_locals.get("self")
                if isinstance(optimizer, self.torch.optim.Optimizer):
                    self.watches.report()
                    try:
                        self._optimizer(optimizer)
                    except Exception as error:
                        self._tell(-1, "optimizer.problem", f"{type(error).__name__}: {error}"[:MAX_TEXT])
                return
            frame = frame.f_back

    def _optimizer(self, optimizer):
        known = self.optimizers.get(id(optimizer))
        if known is None or known["reference"]() is not optimizer:
            known = {
                "reference": weakref.ref(optimizer),
                "number": self.optimizer_count,
                "groups": [],
                "parameters": [],
                "state": None,
            }
            self.optimizer_count += 1
            self.optimizers[id(optimizer)] = known
            classes = [f"{base.__module__}.{base.__qualname__}" for base in type(optimizer).__mro__[:-1]]
            defaults = {name: self._simple(value, 0)[0] for name, value in optimizer.defaults.items()}
            self._tell(-1, f"optimizer.{known['number']}", {"classes": classes, "defaults": defaults})
        number = known["number"]
        for index, group in enumerate(optimizer.param_groups):
            values = {name: self._simple(value, 0)[0] for name, value in group.items() if name != "params"}
            parameters = len(group["params"])
            if index >= len(known["groups"]):
                known["groups"].append(None)
                known["parameters"].append(None)
            if known["groups"][index] != values:
                known["groups"][index] = values
                self._tell(-1, f"optimizer.{number}.group.{index}", values)
            if known["parameters"][index] != parameters:
                known["parameters"][index] = parameters
                self._tell(-1, f"optimizer.{number}.group.{index}.parameters", self._columns(self._owned(group["params"])))
        size = (len(optimizer.state), sum(len(state) for state in optimizer.state.values() if isinstance(state, dict)))
        if known["state"] != size:
            known["state"] = size
            self._tell(-1, f"optimizer.{number}.state", self._state(optimizer))

    def _owned(self, parameters):
        """Parameters with the module and the name that they have there."""
        owners = {}
        for reference in list(self.modules.references.values()):
            module = reference()
            if module is not None:
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        owners.setdefault(id(parameter), (self.modules.numbers.get(id(module), -1), name))
        for parameter in parameters:
            module, name = owners.get(id(parameter), (-1, ""))
            storage, tensor = self._identity(parameter)
            yield {"module": module, "name": name, "shape": list(parameter.shape), "storage": storage, "tensor": tensor}

    def _state(self, optimizer):
        """By the state's name: of which parameters, and what."""
        rows = {}
        for parameter, state in optimizer.state.items():
            if not isinstance(state, dict) or not isinstance(parameter, self.torch.Tensor):
                continue
            owner = self._identity(parameter)[1]
            for name, value in state.items():
                row = {"parameter": owner}
                if isinstance(value, self.torch.Tensor):
                    row["shape"], row["dtype"] = list(value.shape), str(value.dtype).removeprefix("torch.")
                    row["storage"], row["tensor"] = self._identity(value)
                else:
                    row["value"] = self._simple(value, 0)[0]
                rows.setdefault(str(name)[:MAX_TEXT], []).append(row)
        return {name: self._columns(some) for name, some in rows.items()}

    @staticmethod
    def _columns(rows):
        """Rows of equal keys as one list for each key: half as long."""
        columns = {}
        for index, row in enumerate(rows):
            for key, value in row.items():
                columns.setdefault(key, [None] * index).append(value)
            for column in columns.values():
                if len(column) <= index:
                    column.append(None)
        return columns
