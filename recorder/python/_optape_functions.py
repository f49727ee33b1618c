"""Records calls of torch's functions (`--functions`): what Python's __torch_function__ protocol shows, as the program made them.

A TorchFunctionMode on every thread reports calls of `torch.nn.functional.linear`, `torch.Tensor.add_` and so on to the hook, with
their arguments; ops that they run are recorded as ever, and lie inside of them in time. It leaves out reading and writing of
attributes (`x.shape`, `x.grad = ...`).

Compiled code must not know of it: dynamo's guards ask for the modes that are active, so around compiled calls the mode is taken off.
Calls inside of them are not recorded, which a fact in the trace says.
"""

import array
import ctypes
import itertools
import struct
import threading
import types

# Tags of values, as optape_hook.h numbers them.
NONE = 1
TENSOR = 2
TENSOR_LIST = 3
INT = 4
INT_LIST = 6
FLOAT = 7
FLOAT_LIST = 9
COMPLEX = 10
BOOL = 11
BOOL_LIST = 12
TEXT = 13
DTYPE = 15
DEVICE = 16
OPAQUE = 18

WORD = (1 << 64) - 1

# c10::ScalarType
DTYPES = {
    name: number
    for number, name in enumerate(
        (
            "uint8 int8 int16 int32 int64 float16 float32 float64 complex32 complex64 complex128 bool qint8 quint8 qint32 bfloat16 "
            "quint4x2 quint2x4 bits1x8 bits2x4 bits4x2 bits8 bits16 float8_e5m2 float8_e4m3fn float8_e5m2fnuz float8_e4m3fnuz "
            "uint16 uint32 uint64"
        ).split()
    )
}
# c10::DeviceType
DEVICES = {"cpu": 0, "cuda": 1, "mps": 13, "meta": 14, "xpu": 12, "hip": 6}

# Forms of calls (function, number of positional arguments, keywords) that are told apart, and texts that arguments may hold.
MOST_FORMS = 4096
MOST_TEXTS = 4096

WRITE_FIRST = frozenset(
    f"__i{name}__" for name in "add sub mul matmul truediv floordiv mod pow and or xor lshift rshift".split()
) | {"__setitem__"}

# How torch's Python functions ask whether somebody wants to see their call.
GUARDS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
STORE_GLOBAL = frozenset({"STORE_GLOBAL", "DELETE_GLOBAL"})


class _Entering(threading.local):
    """The function whose body a thread is about to run, until it has called another one."""

    func = None


def _nobody(*_arguments):
    return False


NO_GUARDS = dict.fromkeys(GUARDS, _nobody)


def _bits(value):
    return struct.unpack("Q", struct.pack("d", value))[0]


class Functions:
    """The recording of function calls in this process."""

    def __init__(self, recorder):
        torch = recorder.torch
        self.torch = torch
        self.capture = recorder.capture
        self.hook = recorder.hook
        self.announce = recorder.announce
        self.on = False
        self.told_compiled = False
        self.tracing = torch._guards.TracingContext.try_get
        self.tensor_types = (torch.Tensor, torch.nn.Parameter)
        self.without_torch_function = torch._C.DisableTorchFunctionSubclass
        self.forms = {}  # (name, number of positional arguments, keywords) -> what the hook knows it by
        self.overloads = {}  # name -> forms
        self.names = {}  # function -> name
        self.parameters = {}  # function -> names of its parameters
        self.texts = {}
        self.bodies = {}  # code -> whether its body can be run without asking who wants to see the call
        self.lock = threading.Lock()
        self.mode = self._mode()
        self.taken_off = threading.local()
        self.entering = _Entering()
        encoders = {type(None): self._none, bool: self._bool, int: self._int, float: self._float, complex: self._complex, str: self._text}
        encoders.update({kind: self._tensor for kind in self.tensor_types})
        encoders.update({tuple: self._list, list: self._list, torch.Size: self._list})
        encoders.update({torch.dtype: self._dtype, torch.device: self._device})
        self.encoders = encoders
        self._hide_from_compiled_code()

    # ---- on and off ----

    def begin(self):
        self.on = True
        self.told_compiled = False
        self.begin_thread()

    def begin_thread(self):
        if self.on and self._place() is None:
            self.torch.overrides._push_mode(self.mode)

    def end(self):
        """Other threads keep the mode, which then lets everything pass."""
        self.on = False
        self._take_off()

    def _place(self):
        """How many modes lie below ours on this thread."""
        overrides = self.torch.overrides
        for place in range(overrides._len_torch_function_stack()):
            if overrides._get_function_stack_at(place) is self.mode:
                return place
        return None

    def _take_off(self):
        place = self._place()
        if place is not None:
            overrides = self.torch.overrides
            above = [overrides._pop_mode() for _ in range(overrides._len_torch_function_stack() - place)]
            for mode in reversed(above[:-1]):
                overrides._push_mode(mode)
        return place

    def _put_back(self, place):
        overrides = self.torch.overrides
        above = [overrides._pop_mode() for _ in range(max(0, overrides._len_torch_function_stack() - place))]
        overrides._push_mode(self.mode)
        for mode in reversed(above):
            overrides._push_mode(mode)

    def _hide_from_compiled_code(self):
        """Everything that runs compiled code switches dynamo's frame evaluation on before it, and off behind it."""
        import sys

        import _optape_attach

        evaluation = self.torch._C._dynamo.eval_frame
        original = evaluation.set_eval_frame
        taken_off = self.taken_off
        compiling = self.torch._guards.CompileContext.try_get

        def set_eval_frame(callback):
            if callback is not None:
                place = self._take_off()
                if place is not None:
                    taken_off.place = place
                    self._compiled_code_runs()
            before = original(callback)
            # A compiler at work switches it off, too, and must find the modes at its end that it found at its beginning.
            if callback is None and before is not None and compiling() is None:
                place = getattr(taken_off, "place", None)
                if place is not None:
                    taken_off.place = None
                    if self.on:
                        self._put_back(place)
            return before

        # This function's code, too.
        _optape_attach.leave_to_eager(self.torch, globals())
        evaluation.set_eval_frame = set_eval_frame
        for name in ("torch._dynamo.eval_frame", "torch._dynamo.decorators"):
            module = sys.modules.get(name)
            for attribute in ("set_eval_frame", "_maybe_set_eval_frame"):
                if getattr(module, attribute, None) is original:
                    setattr(module, attribute, set_eval_frame)

    def _compiled_code_runs(self):
        if self.on and not self.told_compiled:
            self.told_compiled = True
            self.capture.optape_fact(-1, b"functions", b'"compiled code ran: function calls inside of it are not recorded"')
            self.announce("compiled code ran: function calls inside of it are not recorded")

    # ---- calls ----

    def _mode(self):
        functions = self

        class Mode(self.torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                return functions.call(func, types, args, kwargs or {})

        return Mode()

    def call(self, func, kinds, args, kwargs):
        # A method wrapper is the getter or setter of an attribute. Inside of a compiler nothing is the program's.
        if not self.on or type(func) is types.MethodWrapperType or self.tracing() is not None:
            return func(*args, **kwargs)
        entering = self.entering
        if entering.func is not None:
            again = entering.func is func
            entering.func = None
            if again:
                # Its body asks in another way whether somebody wants to see the call. The call is being recorded.
                self.bodies[func.__code__] = False
                return func(*args, **kwargs)
        held = []
        form = self._form(func, args, kwargs)
        words = self._values(itertools.chain(args, kwargs.values()), held) if form else None
        if words is None or not self._begin(form, words):
            return func(*args, **kwargs)
        try:
            result = self._run(func, kinds, args, kwargs)
        except BaseException:
            self.hook.optape_hook_function_abort()
            raise
        held.clear()
        words = self._values((result,), held)
        if words is None:
            self.hook.optape_hook_function_abort()
        else:
            address, count = words.buffer_info()
            self.hook.optape_hook_function_end(address, count)
        return result

    def _begin(self, form, words):
        address, count = words.buffer_info()
        return self.hook.optape_hook_function_begin(form, address, count)

    def _run(self, func, kinds, args, kwargs):
        """Calls the function so that functions it calls are seen, too.

        Our mode is off meanwhile. C functions call no Python functions; those in Python begin by asking whether there is a mode,
        and would come back to us: their body is run with that question answered. Arguments that overload functions themselves
        are left to it.
        """
        body = None
        if type(func) is types.FunctionType and all(kind in self.tensor_types for kind in kinds):
            body = self._body(func)
        if body is None:
            return func(*args, **kwargs)
        overrides = self.torch.overrides
        overrides._push_mode(self.mode)
        self.entering.func = func
        try:
            return body(*args, **kwargs)
        finally:
            self.entering.func = None
            self._take_off()

    def _body(self, func):
        code = func.__code__
        usable = self.bodies.get(code)
        if usable is None:
            import dis

            instructions = list(dis.get_instructions(code))
            asks = [i.opname for i in instructions if i.argval in GUARDS]
            usable = bool(asks) and set(asks) == {"LOAD_GLOBAL"} and not any(i.opname in STORE_GLOBAL for i in instructions)
            self.bodies[code] = usable
        if not usable:
            return None
        # Copied at every call, since modules change.
        namespace = {**func.__globals__, **NO_GUARDS}
        body = types.FunctionType(code, namespace, func.__name__, func.__defaults__, func.__closure__)
        body.__kwdefaults__ = func.__kwdefaults__
        return body

    # ---- functions ----

    def _form(self, func, args, kwargs):
        """What the hook knows this form of call by; 0 where there are too many."""
        try:
            name = self.names.get(func)
        except TypeError:  # no hash
            return 0
        if name is None:
            name = self._name(func)
        key = (name, len(args), tuple(kwargs))
        form = self.forms.get(key)
        return self._define(func, key) if form is None else form

    def _name(self, func):
        name = self.torch.overrides.resolve_name(func)
        if not name:
            name = getattr(func, "__qualname__", None) or getattr(func, "__name__", None) or type(func).__qualname__
        if "." not in name:
            name = f"{getattr(func, '__module__', None) or 'python'}.{name}"
        name = name.replace("\n", " ").replace("\0", " ")
        if len(self.names) < MOST_FORMS:
            self.names[func] = name
        return name

    def _define(self, func, key):
        with self.lock:
            if key in self.forms:
                return self.forms[key]
            if len(self.forms) >= MOST_FORMS:
                return 0
            name, positional, keywords = key
            number = self.overloads.get(name, 0)
            self.overloads[name] = number + 1
            last = name.rpartition(".")[2]
            writes_first = last in WRITE_FIRST or (last.endswith("_") and not last.endswith("__"))
            known = self._parameters(func)
            lines = [f"function::{name}", str(number) if number else ""]
            for place in range(positional):
                parameter = known[place] if place < len(known) else f"argument{place}"
                lines.append(f"{parameter}\t0\t{int(place == 0 and writes_first)}")
            for keyword in keywords:
                written = keyword == "out" or (positional == 0 and keyword in ("self", "input") and writes_first)
                lines.append(f"{keyword}\t1\t{int(written)}")
            form = self.hook.optape_hook_function("\n".join(lines).encode()) or 0
            self.forms[key] = form
            return form

    def _parameters(self, func):
        """Names of a function's parameters, as far as they are known."""
        import inspect

        told = self.torch.overrides.get_testing_overrides().get(func, func)
        try:
            parameters = inspect.signature(told).parameters.values()
        except (TypeError, ValueError):
            return []
        return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    # ---- values ----

    def _values(self, values, held):
        """Values as the hook takes them; `held` keeps their tensors. None where they have no such form."""
        words = []
        encoders = self.encoders
        try:
            for value in values:
                encode = encoders.get(type(value))
                if encode is None:
                    self._other(value, words, held)
                else:
                    encode(value, words, held)
            return array.array("Q", words)
        except Exception:  # objects of the program answer here
            return None

    def _none(self, _value, words, _held):
        words.append(NONE)

    def _bool(self, value, words, _held):
        words.append(BOOL | value << 8)

    def _int(self, value, words, _held):
        if -(1 << 63) <= value < 1 << 63:
            words += (INT, value & WORD)
        else:
            words.append(OPAQUE | self._text_number("int") << 8)

    def _float(self, value, words, _held):
        words += (FLOAT, _bits(value))

    def _complex(self, value, words, _held):
        words += (COMPLEX, _bits(value.real), _bits(value.imag))

    def _text(self, value, words, _held):
        words.append(TEXT | self._text_number(value) << 8)

    def _text_number(self, text):
        number = self.texts.get(text)
        if number is None:
            if len(self.texts) >= MOST_TEXTS:
                text = "(too many different texts)"
            number = self.capture.optape_text(text.replace("\0", " ").encode(errors="replace"))
            self.texts[text] = number
        return number

    def _dtype(self, value, words, _held):
        number = DTYPES.get(str(value).removeprefix("torch."))
        words.append(OPAQUE | self._text_number(str(value)) << 8 if number is None else DTYPE | number << 8)

    def _device(self, value, words, _held):
        number = DEVICES.get(value.type)
        index = -1 if value.index is None else value.index
        if number is None:
            words.append(TEXT | self._text_number(str(value)) << 8)
        else:
            words.append(DEVICE | number << 8 | (index & 255) << 16)

    def _tensor(self, value, words, held):
        held.append(value)
        words += (TENSOR, value._cdata)

    def _list(self, value, words, held):
        kinds = {type(item) for item in value}
        if any(issubclass(kind, self.torch.Tensor) for kind in kinds):
            words.append(TENSOR_LIST | len(value) << 8)
            for item in value:
                words.append(self._address(item, held) if isinstance(item, self.torch.Tensor) else 0)
        elif kinds <= {int} and all(-(1 << 63) <= item < 1 << 63 for item in value):
            words.append(INT_LIST | len(value) << 8)
            words += (item & WORD for item in value)
        elif kinds == {bool}:
            words.append(BOOL_LIST | len(value) << 8)
            words += map(int, value)
        elif kinds <= {int, float}:
            words.append(FLOAT_LIST | len(value) << 8)
            words += map(_bits, value)
        else:
            words.append(OPAQUE | self._text_number(type(value).__name__) << 8)

    def _address(self, tensor, held):
        held.append(tensor)
        if type(tensor) in self.tensor_types:
            return tensor._cdata
        with self.without_torch_function():
            return tensor._cdata

    def _other(self, value, words, held):
        if isinstance(value, self.torch.Tensor):
            words += (TENSOR, self._address(value, held))
        elif isinstance(value, (tuple, list)):  # named tuples
            self._list(value, words, held)
        else:
            words.append(OPAQUE | self._text_number(type(value).__name__) << 8)
