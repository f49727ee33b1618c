"""What the user wants to see of modules (T8): `--watch 'MODULES:WHAT,...'`, `--keep`.

Patterns are matched as modules get their numbers; the hook does the watching. A pattern that matches nothing is told, with the
nearest names, at the first optimizer step and at the end.
"""

import atexit
import difflib
import json

from _optape_facts import CONTAINERS, matches, names_of

# As the hook numbers them.
INPUT, OUTPUT, GRAD_INPUT, GRAD_OUTPUT, BEFORE, AFTER = range(6)
CALLS = {"input": INPUT, "output": OUTPUT, "grad_input": GRAD_INPUT, "grad_output": GRAD_OUTPUT}
KEEP = {"nothing": 0, "spikes": 1, "values": 2}
# Modules whose names are remembered for messages.
MAX_NAMES = 4096


class Watches:
    """Knows what is watched of which module."""

    def __init__(self, capture, calls, modules, say):
        self.capture = capture
        self.modules = modules
        self.say = say
        self.numbers = {}  # (number of a module, label) -> watch id, over all recordings
        self.keep = "nothing"
        self.selections, self.patterns, self.unmatched = [], set(), set()
        self.names = {}  # name of a module -> whether it is a class's
        self.of_module = {}  # number -> list of (of, name, container, watch id, label)
        self.complained = set()
        self.reported = False
        self.able = calls.get("hook_watches") is not None
        if self.able:
            calls["hook_watches"](self.more, self.odd)
        atexit.register(self.report)

    def begin(self, asked):
        """A recording begins."""
        self.keep = asked.get("keep", "nothing")
        self.selections = [(s["pattern"], s["names"]) for s in asked.get("watches", ())]
        self.patterns = {*(p for p, _ in self.selections), *(s["pattern"] for s in asked.get("states", ()))}
        self.unmatched = set(self.patterns)
        self.names = {}
        self.of_module = {}
        self.complained = set()
        self.reported = False
        if self.selections and not self.able:
            self.say("--watch is not possible with this Python: it needs CPython's vectorcall")
        for watch in self.modules.watches.values():
            self._keep(watch, "output")

    def _number(self, number, label):
        """The id of a watch."""
        key = (number, label)
        if key not in self.numbers:
            self.numbers[key] = self.capture.optape_define_watch(number, label.encode())
        return self.numbers[key]

    def _keep(self, watch, what):
        """Of every watch that there is."""
        if KEEP[self.keep]:
            self.capture.optape_watch_keep(watch, KEEP[self.keep])
            self._fact(f"watch.{watch}", {"what": what, "keep": self.keep})

    def _fact(self, key, value):
        self.capture.optape_fact(-1, key.encode(), json.dumps(value).encode())

    def of(self, module, number):
        """What the hook is to watch of a module, one after the other: of, name, container, watch id."""
        if number in self.modules.watches and number not in self.of_module:
            self._keep(self.modules.watches[number], "output")
        if not self.patterns or not self.able:
            return ()
        name = self.modules.names.get(id(module), "")
        names = names_of(module, name)
        if len(self.names) < MAX_NAMES:
            self.names.update({known: "." not in known for known in names if not known.startswith("torch.nn.modules.module")})
        self.unmatched -= {pattern for pattern in self.unmatched if matches(pattern, names)}
        known = {watch[4]: watch for watch in self.of_module.get(number, ())}
        wanted = {}
        for pattern, labels in self.selections:
            if matches(pattern, names):
                for label in labels:
                    wanted[label] = None
        found = []
        for label in wanted:
            watch = known.get(label) or self._define(module, number, label)
            if watch is not None:
                found.append(watch)
        self.of_module[number] = found
        return tuple(part for watch in found for part in watch[:4])

    def _define(self, module, number, label):
        of, name, container = CALLS.get(label), "", None
        if of == OUTPUT and number in self.modules.watches:
            return None  # is watched already: what spikes, always is
        if of is None:
            name, _, when = label.partition(".")
            of = BEFORE if when == "before" else AFTER
            values = vars(module)
            container = next((c for c in CONTAINERS if name in (values.get(c) or ())), None)
        watch = self._number(number, label)
        self._keep(watch, label)
        if of == GRAD_INPUT:
            self._fact(f"watch.{watch}.source", "autograd nodes of the call")
        return of, name, container, watch, label

    def more(self, number, index, place):
        """The watch of a further tensor: `output.1`."""
        label = f"{self.of_module[number][index][4]}.{place}"
        watch = self._number(number, label)
        self._keep(watch, label)
        return watch

    def odd(self, number, index, value):
        """What is watched is no tensor."""
        _, name, _, watch, label = self.of_module[number][index]
        module = next((m for m in (r() for r in list(self.modules.references.values())) if m is not None and
                       self.modules.numbers.get(id(m)) == number), None)
        scope = self.modules.names.get(id(module), "a module")
        if value is self.odd or (module is not None and not hasattr(module, name)):
            near = difflib.get_close_matches(name, self._attributes(module), 3, 0.3)
            hint = f"; near: {', '.join(near)}" if near else ""
            why = f"{scope} ({type(module).__name__}) has no attribute {name}{hint}"
        else:
            why = f"{name} of {scope} ({type(module).__name__}) is no tensor but {type(value).__name__}"
        self._fact(f"watch.{watch}.problem", why)
        kind = (type(module), label)
        if kind not in self.complained:
            self.complained.add(kind)
            self.say(f"--watch {label}: {why}; nothing is recorded of it")

    def switch(self, on, selections):
        """Switches watches on or off: all, or (pattern, labels) of modules that ran. Gives the patterns that no watch is of."""
        if not selections:
            self.capture.optape_watch_switch(-1, int(on))
            return []
        unmatched = []
        for pattern, labels in selections:
            found = [watch for watch, label in self._watches_of(pattern) if label in labels]
            for watch in found:
                self.capture.optape_watch_switch(watch, int(on))
            if not found:
                unmatched.append(pattern)
        return unmatched

    def _watches_of(self, pattern):
        """The watches of modules that a pattern matches: id, label."""
        for key, number in list(self.modules.numbers.items()):
            module = self.modules.references[key]() if key in self.modules.references else None
            if module is None or not matches(pattern, names_of(module, self.modules.names.get(key, ""))):
                continue
            if number in self.modules.watches:
                yield self.modules.watches[number], "output"
            for watch in self.of_module.get(number, ()):
                yield watch[3], watch[4]

    @staticmethod
    def _attributes(module):
        if module is None:
            return []
        values = vars(module)
        names = {name for name in values if not name.startswith("_")}
        for container in CONTAINERS:
            names.update(values.get(container) or ())
        return sorted(names)

    def report(self):
        """Says which patterns matched no module so far, once."""
        if self.reported or not self.names:
            return
        self.reported = True
        for pattern in sorted(self.unmatched):
            near = difflib.get_close_matches(pattern, list(self.names), 4, 0.4) or sorted(n for n, kind in self.names.items() if kind)[:4]
            self.say(f"{pattern!r} matches no module; near: {', '.join(near)}")
            self._fact("watch.unmatched", pattern)
