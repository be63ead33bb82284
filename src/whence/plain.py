"""Settings as plain JSON and back, and what is known of code: recipes, keys of stored features, and the one error.

`describe` writes what a number depends on. Of whence's own functions that is the name: moving a file must not change what
recipes and stored features are called. Of a user's function it is the name and a digest of its code, its defaults, what it
closes over and the globals it uses, so that an edited function is another one. What cannot be known that way (an open file,
a generator) makes the whole unknown: nothing stored is then used for it, and this is said.
"""

from __future__ import annotations

import base64
import dataclasses
import difflib
import hashlib
import json
import sys
import uuid
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeGuard, Union, get_args, get_origin, get_type_hints

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn


class WhenceError(ValueError):
    """Bad input, reported in one line: `where: what; accepted: accepted`. The command line exits with 2.

    Args:
        what: what is wrong. A text that already ends in "; accepted: ..." is split into `what` and `accepted`.
        where: the file, option or method that it is about; "" where `what` says it.
        accepted: what would be accepted in its place; "" where there is no choice.
    """

    def __init__(self, what: str, where: str = "", accepted: str = "") -> None:
        if not accepted:
            what, _, accepted = what.partition("; accepted: ")
        super().__init__(what, where, accepted)  # all three, so that a copy made in another process is the same
        self.what, self.where, self.accepted = what, where, accepted

    def __str__(self) -> str:
        told = f"{self.where}: {self.what}" if self.where else self.what
        return f"{told}; accepted: {self.accepted}" if self.accepted else told


def expect(given: object, kind: type | tuple[type, ...], where: str, accepted: str) -> None:
    """Refuse, in a line, what people hand over in the wrong place: a truth value is no number.

    Args:
        given: as it was handed over.
        kind: what it has to be, or several.
        where: the argument.
        accepted: in its place.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(given, kinds) or (isinstance(given, bool) and bool not in kinds):
        shown = repr(given) if isinstance(given, LEAVES) else f"a {type(given).__name__}"
        raise WhenceError(shown, where, accepted)


LEAVES = (NoneType, bool, int, float, str)


def _is_tensor(thing: object) -> TypeGuard[Tensor]:
    """torch is asked only where it was imported, as it was by whoever has a tensor: what reads a run folder alone starts at
    once without it."""
    return "torch" in sys.modules and isinstance(thing, sys.modules["torch"].Tensor)


def _is_network(thing: object) -> TypeGuard[nn.Module]:
    return "torch" in sys.modules and isinstance(thing, sys.modules["torch"].nn.Module)


def _is_kind(thing: object) -> bool:
    """A dtype or a device."""
    return "torch" in sys.modules and isinstance(thing, (sys.modules["torch"].dtype, sys.modules["torch"].device))


def describe(thing: object) -> Any:
    """A setting as plain JSON: frozen dataclasses by class name and fields, functions by name. Hash and print this."""
    if type(thing) in LEAVES:  # first: most things are
        return thing
    if isinstance(thing, type):
        return _callable(thing)
    own = getattr(thing, "describe", None)  # not by isinstance of a protocol, which takes a hundred times as long
    if own is not None:
        return own()
    if dataclasses.is_dataclass(thing):
        fields = {f.name: describe(vars(thing)[f.name]) for f in dataclasses.fields(thing)}
        return {"is": type(thing).__name__, **_own_code(type(thing)), **fields}
    if isinstance(thing, Mapping):
        return {str(key): describe(value) for key, value in thing.items()}
    if _is_tensor(thing):
        return thing.tolist()
    if isinstance(thing, (list, tuple)):
        return [describe(item) for item in thing]
    if isinstance(thing, LEAVES):  # of a class of their own
        return thing
    if isinstance(thing, Path):
        return str(thing)
    if callable(thing):
        return _callable(thing)
    raise WhenceError(f"cannot record a {type(thing).__name__} in a recipe; use a frozen dataclass or a named function")


# ------------------------------------------------------------------------------------------------------------------ code

LIBRARIES = (
    *("torch", "numpy", "scipy", "sklearn", "PIL", "diffusers", "transformers", "peft", "accelerate", "safetensors"),
    *sys.stdlib_module_names,
)
"""Known by their names: what they do does not change under a name while a model lives."""
_UNKNOWN: dict[int, tuple[object, str]] = {}


class Unknown(Exception):
    """Something whose effect on a number cannot be written down."""


def _top(thing: object) -> str:
    return str(thing.__module__).partition(".")[0]


def _named(thing: FunctionType | BuiltinFunctionType | MethodType | type) -> str:
    """Our own by name alone, a library's with its module, a user's with a digest of its code, wherever that stands."""
    if _top(thing) == "whence":
        return thing.__qualname__
    if _top(thing) in LIBRARIES or isinstance(thing, BuiltinFunctionType):
        return f"{thing.__module__}.{thing.__qualname__}"
    return f"{thing.__qualname__} {hashed(_code_of(thing, set()))}"


def _own_code(kind: type) -> dict[str, str]:
    """Of a user's class: what its instances do is not said by their fields."""
    if _top(kind) in ("whence", *LIBRARIES):
        return {}
    try:
        return {"code": hashed(_code_of(kind, set()))}
    except Unknown as problem:
        return {"code": _unknown(kind, str(problem))}


def _callable(thing: object) -> object:
    """A function or another object that is called, by what its results depend on."""
    try:
        if isinstance(thing, FunctionType | BuiltinFunctionType | MethodType | type):
            return _named(thing)
        return f"{type(thing).__qualname__} {hashed(value_of(thing, set()))}"
    except Unknown as problem:
        return _unknown(thing, str(problem))


def _unknown(thing: object, why: str) -> str:
    """A name that nothing stored has, the same for one object as long as it lives."""
    if id(thing) not in _UNKNOWN:
        name = f"{type(thing).__qualname__} {uuid.uuid4().hex}"
        _UNKNOWN[id(thing)] = (thing, name)
        warnings.warn(
            f"{type(thing).__qualname__} depends on a {why}, of which nothing lasting is known: its features are computed "
            "anew in every process",
            stacklevel=2,
        )
    return _UNKNOWN[id(thing)][1]


def hashed(plain: object, length: int = 12) -> str:
    """A digest of plain JSON, hex."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def tensor_bytes(values: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy, so that hashing is all it costs; through uint8, for numpy has no bfloat16."""
    return values.detach().cpu().contiguous().flatten().view(sys.modules["torch"].uint8).numpy().data


def value_of(thing: object, seen: set[int]) -> object:
    """What a number depends on in a value, as plain JSON. seen: what is being written down already.

    Raises:
        Unknown: naming the kind of thing of which nothing lasting is known.
    """
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, bytes | complex | Path | range | slice | type(Ellipsis)) or _is_kind(thing):
        return [type(thing).__name__, repr(thing)]
    if id(thing) in seen:
        return ["again", type(thing).__name__]
    seen = seen | {id(thing)}
    if _is_tensor(thing):
        return ["tensor", str(thing.dtype), list(thing.shape), hashlib.sha256(tensor_bytes(thing)).hexdigest()]
    if isinstance(thing, np.ndarray | np.generic):
        return ["array", str(thing.dtype), list(thing.shape), hashlib.sha256(np.asarray(thing).tobytes()).hexdigest()]
    if isinstance(thing, np.ufunc):
        return ["ufunc", repr(thing)]
    if _is_network(thing):
        return architecture(thing, seen)
    if isinstance(thing, ModuleType):
        return ["module", thing.__name__]
    if isinstance(thing, partial):
        return ["partial", *(value_of(part, seen) for part in (thing.func, thing.args, thing.keywords))]
    if isinstance(thing, Mapping):
        return ["mapping", type(thing).__name__, [[str(key), value_of(one, seen)] for key, one in thing.items()]]
    if isinstance(thing, list | tuple):
        return [type(thing).__name__, [value_of(one, seen) for one in thing]]
    if isinstance(thing, set | frozenset):
        return ["set", sorted(json.dumps(value_of(one, seen)) for one in thing)]
    if isinstance(thing, FunctionType | BuiltinFunctionType | MethodType | type):
        return _code_of(thing, seen)
    return _object(thing, seen)


def _object(thing: object, seen: set[int]) -> object:
    """Any other object: its class and its attributes."""
    kind = type(thing)
    if kind.__flags__ & HEAP == 0 or "__dict__" not in dir(thing):  # made by C code, such as a file or a generator
        raise Unknown(kind.__qualname__)
    return ["object", _code_of(kind, seen), value_of(vars(thing), seen)]


HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that a `class` statement made


def _code_of(thing: FunctionType | BuiltinFunctionType | MethodType | type, seen: set[int]) -> object:
    """A function or a class by its code, as far as it is a user's."""
    name = thing.__qualname__
    if isinstance(thing, MethodType):
        return ["method", value_of(thing.__self__, seen), _code_of(thing.__func__, seen)]  # type: ignore[arg-type]
    if _top(thing) in ("whence", *LIBRARIES) or isinstance(thing, BuiltinFunctionType):
        return f"{thing.__module__}.{name}"
    seen = seen | {id(thing)}
    if isinstance(thing, type):
        bases = [_code_of(base, seen) for base in thing.__bases__ if base is not object]
        own = {key: one for key, one in vars(thing).items() if key not in BOOKKEEPING}
        return ["class", name, bases, [[key, _member(one, seen)] for key, one in sorted(own.items())]]
    used = _names(thing.__code__)
    around = {key: thing.__globals__[key] for key in sorted(used) if key in thing.__globals__}
    cells = [cell.cell_contents for cell in thing.__closure__ or ()]
    given = (thing.__defaults__, thing.__kwdefaults__, cells, around)
    return ["function", name, _bytecode(thing.__code__), [value_of(part, seen) for part in given]]


BOOKKEEPING = {
    *("__module__", "__dict__", "__weakref__", "__doc__", "__annotations__"),
    *("__firstlineno__", "__static_attributes__"),
}


def _member(thing: object, seen: set[int]) -> object:
    """What stands in a class: functions, also behind descriptors, and values."""
    if isinstance(thing, staticmethod | classmethod):
        return value_of(thing.__func__, seen)
    if isinstance(thing, property):
        return [value_of(part, seen) for part in (thing.fget, thing.fset)]
    if isinstance(thing, FunctionType | type):
        return value_of(thing, seen)
    try:
        return value_of(thing, seen)
    except Unknown:  # descriptors of slots, fields of dataclasses and the like hold no code of the user's
        return type(thing).__name__


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*(_names(one) for one in inner))


def _bytecode(code: CodeType) -> object:
    constants = [_bytecode(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return [hashlib.sha256(code.co_code).hexdigest(), list(code.co_names), list(code.co_varnames), constants]


HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def architecture(module: nn.Module, seen: set[int] | None = None) -> object:
    """What a network computes, besides its weights' names: the class and the plain attributes of every layer, hooks, and all
    tensors by content."""
    seen = (seen or set()) | {id(module)}
    layers = []
    for name, layer in module.named_modules():
        own = {key: one for key, one in vars(layer).items() if not key.startswith("_") and key != "training"}
        hooks = [one for key in HOOKS for one in vars(layer)[key].values()]
        about = [value_of(part, seen | {id(layer)}) for part in (own, hooks)]
        layers.append([name, _code_of(type(layer), seen), *about])
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return ["network", layers, [[name, value_of(one, seen)] for name, one in tensors.items()]]


def known_by(module: nn.Module) -> str:
    """A digest of a network in memory: what it computes and its weights, or a name that nothing else has."""
    try:
        return hashed(architecture(module), 64)
    except Unknown as problem:
        return _unknown(module, str(problem))


# -------------------------------------------------------------------------------------------------------------- read back


def from_plain(plain: object, hint: object = Any) -> Any:
    """The inverse of `describe`: from_plain(describe(x)) == x for every setting, also by way of a JSON file.

    Classes, functions and outputs are found by their names among the modules of whence that are imported.

    Args:
        plain: what `describe` returned.
        hint: the type that is expected there, where the value alone does not tell (a name or a text, a list or a tuple).
    """
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if isinstance(plain, Mapping) and "is" in plain:
        return _setting(plain)
    if isinstance(plain, (list, tuple)):
        of = next((get_args(choice) for choice in choices if get_origin(choice) is tuple), ())
        each = of if of and of[-1] is not Ellipsis else [of[0] if of else Any] * len(plain)
        return tuple(from_plain(value, kind) for value, kind in zip(plain, each, strict=True))
    if isinstance(plain, str) and not {str, Any} & {*choices}:
        if Path in choices:
            return Path(plain)
        kinds = tuple(choice for choice in choices if isinstance(choice, type) and choice is not NoneType)
        for kind in kinds:
            if "named" in vars(kind):  # it knows its own names, as outputs do
                return vars(kind)["named"].__get__(None, kind)(plain)
        taken = next((len(get_args(choice)[0]) for choice in choices if get_origin(choice) is Callable), None)
        return _ours(lambda name, found: _is_called(plain, found, kinds, taken), plain)
    if {*choices} <= {bool, int, float, str, NoneType} and not _is_leaf(plain, choices):
        accepted = " or ".join("null" if choice is NoneType else choice.__name__ for choice in choices)
        raise WhenceError(f"a setting is {str(plain)[:40]!r}", accepted=accepted)
    return plain


def _setting(plain: Mapping[str, Any]) -> Any:
    """A frozen dataclass of whence: nothing else is made from what a file says."""
    name = plain["is"]
    kind = _ours(lambda key, found: key == name and isinstance(found, type) and dataclasses.is_dataclass(found), name)
    hints = get_type_hints(kind)
    unknown = [field for field in plain if field != "is" and field not in hints]
    if unknown:
        raise WhenceError(f"{name} has no field {unknown[0]!r}", accepted=", ".join(hints))
    given = {field: from_plain(value, hints[field]) for field, value in plain.items() if field != "is"}
    missing = [field.name for field in dataclasses.fields(kind) if field.name not in given and _needed(field)]
    if missing:
        raise WhenceError(f"{name} lacks {missing[0]}", accepted=", ".join(hints))
    return kind(**given)


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _is_leaf(plain: object, choices: tuple[Any, ...]) -> bool:
    """Whether a value is of one of these types; a whole number is a number, a truth value neither."""
    return type(plain) in choices or (type(plain) is int and float in choices)


def _is_called(name: str, found: object, kinds: tuple[type, ...], taken: int | None) -> bool:
    """taken: arguments of the function that is meant; a method may have the name of one of its parts."""
    if kinds and isinstance(found, kinds):
        return describe(found) == name
    if not isinstance(found, FunctionType) or describe(found) != name:
        return False
    return taken is None or found.__code__.co_argcount - len(found.__defaults__ or ()) == taken


def _ours(fits: Callable[[str, object], bool], name: str) -> Any:
    modules = [module for path, module in list(sys.modules.items()) if path.split(".")[0] == "whence"]
    for module in modules:
        for key, found in list(vars(module).items()):
            if fits(key, found):
                return found
    raise WhenceError(f"{name!r} is nothing that whence knows", accepted="what `describe` wrote of its own settings")


def digest(thing: object, length: int = 16) -> str:
    """A short stable fingerprint of a JSON-like value."""
    return hashed(describe(thing), length)


def content_hash(text: str) -> str:
    """sha256 of a script as a Content-Security-Policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


UNKNOWN = "unknown"
"""The owner of images whose column says nothing."""


def row_of_picture(name: str, places: Mapping[str, int]) -> int:
    """The row of a picture that --query names, or an error with the nearest names.

    Args:
        name: of the picture.
        places: name -> row of all pictures.
    """
    if name not in places:
        near = difflib.get_close_matches(name, places, 3) or [*places][:3]
        raise WhenceError(f"there is no picture {name!r}", f"--query {name}", f"{', '.join(near)} ...")
    return places[name]


def owner_of(value: object) -> str:
    """Whose an image is by the value of a column (creator, class), as text; UNKNOWN where there is none."""
    text = "" if value is None or value != value else str(value).strip()  # NaN differs from itself
    return text or UNKNOWN
