"""Where the modules of a model are held: registered ones, and those in lists, dicts and attributes beside them."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn

MOST_NAMES = 16  # of one module: in a net that shares modules at every level the paths to one can be millions
MOST_VALUES = 100_000  # looked at beside the registered modules
OWN = set(nn.Module().__dict__)  # torch's: parameters, buffers, hooks
_LIBRARIES = ("torch", "numpy", "builtins", "normlab", "lightning", "pytorch_lightning")
MEMORY = "_before_surgery"  # what `memory.py` keeps on a module, which is no part of the model


@dataclass(frozen=True, eq=False)
class Place:
    """Something that holds a module.

    Attributes:
        name: as one would write it: `encoder.bn1`, `bns[0]`.
        holder: a module, a list, a dict, an object; of a tuple its own place; None of the model itself.
        key: a name, an index or a key.
    """

    name: str
    holder: Any
    key: Any

    def read(self) -> Any:
        """What is there now."""
        holder = self.holder.read() if isinstance(self.holder, Place) else self.holder
        within = _within(holder, self.key)
        return getattr(holder, self.key) if within is None else within[self.key]

    def write(self, value: Any) -> None:
        """Puts something else there; a tuple is replaced by another in the place that holds it."""
        if isinstance(self.holder, Place):
            old = self.holder.read()
            parts = [value if index == self.key else part for index, part in enumerate(old)]
            self.holder.write(type(old)(*parts) if hasattr(old, "_fields") else type(old)(parts))
        elif (within := _within(self.holder, self.key)) is not None:
            within[self.key] = value
        else:
            object.__setattr__(self.holder, self.key, value)


def _within(holder: Any, key: Any) -> Any:
    """What is indexed to read or write a place; None for an attribute in a slot."""
    if isinstance(holder, nn.Module):
        return holder._modules if key in holder._modules else holder.__dict__
    if isinstance(holder, (list, dict, tuple, deque)):
        return holder
    own = getattr(holder, "__dict__", {})
    return own if key in own else None


@dataclass(eq=False)
class Held:
    """A module and all that holds it.

    Attributes:
        module: the module.
        names: by which torch knows it; several if it is shared, 16 at most.
        registered: its places as a submodule.
        beside: those in lists, dicts, tuples and attributes, which torch does not see.
        stuck: what holds it so that nothing can be put in its place: a bound method, a closure, a set.
    """

    module: nn.Module
    names: list[str]
    registered: list[Place]
    beside: list[Place]
    stuck: list[str]

    @property
    def hidden(self) -> bool:
        """Whether torch does not see it at all."""
        return not self.names


def held_modules(model: nn.Module) -> list[Held]:
    """Every module of a model, once, in its order, and then those that only lists, dicts and attributes hold.

    What hooks, buffers and other objects' methods hold is not looked at.
    """
    found: dict[int, Held] = {}

    def known(module: nn.Module) -> Held:
        return found.setdefault(id(module), Held(module, [], [], [], []))

    def register(module: nn.Module, name: str, above: tuple[int, ...]) -> None:
        held = known(module)
        if id(module) in above or len(held.names) == MOST_NAMES:
            return
        held.names.append(name)
        for key, child in module._modules.items():
            if child is None:
                continue
            if len(held.names) == 1:
                known(child).registered.append(Place(_joined(name, key), module, key))
            else:
                _name_again(known(child), module, _joined(name, key), key)
            register(child, _joined(name, key), (*above, id(module)))

    register(model, "", ())
    known(model).registered.insert(0, Place("", None, ""))
    walk = _Walk(known)
    waiting, done = deque(list(found.values())), set()
    while waiting:
        held = waiting.popleft()
        if id(held.module) not in done:
            done.add(id(held.module))
            walk.attributes(held)
            waiting += [one for key, one in list(found.items()) if key not in done]
    return list(found.values())


def _name_again(held: Held, parent: nn.Module, name: str, key: str) -> None:
    """One more name of a place that is there already."""
    held.registered += [Place(name, parent, key)] if len(held.registered) < MOST_NAMES else []


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


class _Walk:
    """Goes through what a module's attributes hold, and notes the modules there."""

    def __init__(self, known: Any):
        self._known, self._seen, self._left = known, set[int](), MOST_VALUES
        self._kept: list[Any] = []  # so that an id stays that of the object seen

    def attributes(self, held: Held) -> None:
        if isinstance(held.module, torch.jit.ScriptModule):
            return  # what it holds beside its submodules are methods of its own
        name = held.names[0] if held.names else (held.beside[0].name if held.beside else held.stuck[0])
        for key, value in list(held.module.__dict__.items()):
            if key not in OWN and key != MEMORY:
                self._look(value, Place(_joined(name, key), held.module, key), None)
        if held.hidden:
            for key, child in held.module._modules.items():
                if child is not None:
                    self._known(child).beside.append(Place(_joined(name, key), held.module, key))

    def _look(self, value: Any, place: Place, stuck: str | None) -> None:
        if isinstance(value, nn.Module):
            held = self._known(value)
            if stuck is None:
                held.beside.append(place)
            else:
                held.stuck.append(stuck)
            return
        again = id(value) in self._seen and not isinstance(value, tuple)  # which has to be replaced wherever it is
        if again or not _may_hold(value) or self._left == 0:
            return
        self._left -= 1
        self._seen.add(id(value))
        self._kept.append(value)
        for inner, key, name, replaceable in _parts(value, place):
            why = stuck or (None if replaceable else f"{_kind(value)} {place.name}")
            self._look(inner, Place(name, place if isinstance(value, tuple) else value, key), why)


def _may_hold(value: Any) -> bool:
    if isinstance(value, (Tensor, type, str, bytes, int, float, bool, type(None))):
        return False
    plain = isinstance(value, (list, tuple, dict, set, frozenset, deque, partial, ReferenceType, SimpleNamespace))
    return plain or isinstance(value, (MethodType, FunctionType)) or is_dataclass(value) or _is_small_object(value)


def _is_small_object(value: Any) -> bool:
    """An object of the user's own, not a trainer or a library's machinery."""
    library = type(value).__module__.split(".")[0] in _LIBRARIES
    return not library and 0 < len(attributes(value)) <= 32


def _parts(value: Any, place: Place) -> Iterator[tuple[Any, Any, str, bool]]:
    """What a value holds: the part, its key, its name, and whether something else can be put there."""
    name = place.name
    if isinstance(value, dict):
        yield from ((part, key, f"{name}[{key!r}]", True) for key, part in list(value.items()))
    elif isinstance(value, (list, deque, tuple)):
        yield from ((part, index, f"{name}[{index}]", True) for index, part in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from ((part, None, name, False) for part in value)
    elif isinstance(value, partial):
        yield from ((part, None, name, False) for part in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, ReferenceType):
        yield value(), None, name, False
    elif isinstance(value, MethodType):
        yield value.__self__, None, name, False
    elif isinstance(value, FunctionType):
        yield from ((part, None, name, False) for part in _closed_over(value))
    else:
        yield from ((part, key, f"{name}.{key}", True) for key, part in attributes(value).items())


def attributes(value: Any) -> dict[str, Any]:
    """What an object of any class holds, in slots too."""
    slots = [slot for kind in type(value).__mro__ for slot in _names(vars(kind).get("__slots__", ()))]
    held = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot) and not slot.startswith("__")}
    return held | getattr(value, "__dict__", {})


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _closed_over(function: FunctionType) -> list[Any]:
    """What a function holds of its surroundings."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # an empty cell: a name that is not bound yet
            continue
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _kind(value: Any) -> str:
    names = {
        MethodType: "the method",
        FunctionType: "the function",
        partial: "the partial",
        ReferenceType: "the weakref",
    }
    return names.get(type(value), f"the {type(value).__name__}")
