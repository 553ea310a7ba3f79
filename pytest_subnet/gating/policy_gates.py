"""Which assertions a policy can make, and what it can tell them: read off their signatures."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
import warnings
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Literal, TypeAlias, Union, get_args, get_origin

import pytest_subnet
from pytest_subnet.errors import SubnetError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

OTHER = "other"
"""The key for a second pair: the tuned checkpoint of another run, on the same base."""

_SAYABLE = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "list": "an array of strings",
}
"""What TOML can say, by the name of the type, in the order in which messages name it."""


Subject: TypeAlias = Literal["pair", "trajectory", ""]


@dataclass(frozen=True, slots=True)
class Gate:
    """An assertion as a policy sees it.

    Attributes:
        name: its public name.
        call: the assertion.
        subject: what its first argument is; empty if that is nothing a policy names.
        other: the parameter that takes a second pair; empty if there is none.
        keys: its further parameters as a policy calls them, with the types each takes.
        required: those that have no default.
        unset: those that have a default and take None instead: `"none"` in a policy.
    """

    name: str
    call: Callable[..., object]
    subject: Subject
    other: str
    keys: Mapping[str, frozenset[str]]
    required: tuple[str, ...]
    unset: tuple[str, ...]

    @property
    def sayable(self) -> tuple[str, ...]:
        """The keys that a policy can use."""
        return tuple(key for key, types in self.keys.items() if types & _SAYABLE.keys())

    @property
    def needs_python(self) -> bool:
        """Whether it needs an argument that TOML cannot say."""
        return not self.subject or not set(self.required) <= set(self.sayable)

    def takes(self, key: str) -> str:
        """What the value of `key` may be, in words."""
        return " or ".join(words for name, words in _SAYABLE.items() if name in self.keys[key])

    def accepts(self, key: str, value: object) -> bool:
        """Whether `value`, as TOML gives it, is of a type that `key` takes."""
        types = self.keys[key]
        match value:
            case list():
                return "list" in types and all(isinstance(each, str) for each in value)
            case bool():
                return "bool" in types
            case int():
                return bool(types & {"int", "float"})
            case _:
                return type(value).__name__ in types & {"float", "str"}


def gate_names() -> list[str]:
    """The public names of all assertions."""
    return [name for name in pytest_subnet.__all__ if name.startswith("assert_")]


@functools.cache
def gate(name: str) -> Gate:
    """The assertion of that public name."""
    call = getattr(pytest_subnet, name)
    module = sys.modules[call.__module__]
    first, *more = inspect.signature(call).parameters.values()
    of_first = _types(first.annotation, module)
    subjects: dict[str, Subject] = {"ModelPair": "pair", "Trajectory": "trajectory"}
    keys, required, unset, other = {}, [], [], ""
    for each in more:
        name_in_policy, types = each.name, _types(each.annotation, module)
        if each.name == "message":  # a function; a policy shows the text as it is
            continue
        if "ModelPair" in types and not other:
            other, name_in_policy, types = each.name, OTHER, frozenset({"str"})
        keys[name_in_policy] = types
        if each.default is inspect.Parameter.empty:
            required.append(name_in_policy)
        elif each.default is not None and "None" in types:
            unset.append(name_in_policy)
    return Gate(
        name=name,
        call=call,
        subject=next((what for kind, what in subjects.items() if kind in of_first), ""),
        other=other,
        keys=keys,
        required=tuple(required),
        unset=tuple(unset),
    )


def objection(gate: Gate, arguments: Mapping[str, object]) -> str:
    """What the assertion has against `arguments` before it looks at a pair; empty for nothing."""
    others = {gate.other: _stand_in(gate.subject)} if gate.other else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is only doubtful is said when the test runs
            gate.call(_stand_in(gate.subject), **{**arguments, **others})
    except (TypeError, ValueError) as error:
        return str(error)
    except (_LookedAtError, SubnetError):
        return ""
    return ""


class _LookedAtError(Exception):
    """The assertion has taken its arguments and wants to see what it is to judge."""


class _Unopened:
    """Stands where a pair or a run will be."""

    def __getattribute__(self, name: str) -> object:
        raise _LookedAtError


def _stand_in(subject: Subject) -> object:
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.trajectories import Trajectory

    kind = ModelPair if subject == "pair" else Trajectory
    return object.__new__(type(kind.__name__, (_Unopened, kind), {}))


def _types(annotation: object, module: ModuleType) -> frozenset[str]:
    """The names of the types in an annotation, its aliases resolved as seen from `module`."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    try:
        return frozenset(_names(ast.parse(text, mode="eval").body, module))
    except SyntaxError:  # no annotation
        return frozenset()


def _names(node: ast.expr, module: ModuleType) -> set[str]:
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _names(left, module) | _names(right, module)
        case ast.Subscript(value=ast.Name(id="Sequence" | "Iterable" | "list" | "tuple")):
            return {"list"} if "str" in ast.unparse(node.slice) else {ast.unparse(node)}
        case ast.Subscript(value=ast.Name(id="Literal")):
            return {type(part).__name__ for part in _constants(node.slice)}
        case ast.Constant(value=str(text)):
            return set(_types(text, module))
        case ast.Name(id=name) if name not in _SAYABLE:
            value, home = _found(name, module)
            return {name} if value is None else _behind(value, home)
        case _:
            return {ast.unparse(node)}


def _constants(node: ast.expr) -> list[object]:
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return [part.value for part in parts if isinstance(part, ast.Constant)]


def _behind(value: object, home: ModuleType) -> set[str]:
    """The types of an alias that was evaluated, or the name of a class."""
    if isinstance(value, str):  # an alias of what only type checkers import
        return set(_types(value, home))
    if get_origin(value) is Literal:
        return {type(part).__name__ for part in get_args(value)}
    if get_origin(value) in (Union, UnionType):
        return {each for part in get_args(value) for each in _behind(part, home)}
    return {"None" if value is NoneType else getattr(value, "__name__", str(value))}


def _found(name: str, module: ModuleType) -> tuple[object, ModuleType]:
    """What `name` is in `module`, be it imported for type checkers only, and where it is from."""
    if hasattr(module, name):
        return getattr(module, name), module
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name and node.module.startswith("pytest_subnet"):
                    home = importlib.import_module(node.module)
                    return getattr(home, alias.name, None), home
    return None, module
