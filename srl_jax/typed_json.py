"""Dataclasses to JSON data and back, by their annotations: strings, numbers, lists, options, literals and arrays.

Both ways are strict, and what does not fit is named by its place ("task.files[0].text"). A place is only put together
once something is wrong, from the inside out, while the exception climbs: reading a record that is right keeps no
account of where it is, which is what makes reading one cheap.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

_MAX_FREE_DEPTH = 60  # of a dict, the one kind of field whose shape is free
_EXACT = (str, int, bool)  # nothing but the type is to be checked; exact: True is not an int here

Reader = Callable[[Any, dict[str, int]], Any]


class CorruptRecord(ValueError):
    """Bytes that are not a record of this version, or a record that cannot be stored."""


@dataclass(frozen=True)
class Layout:
    """How an array field is stored; letters in `shape` stand for sizes that agree across one record's fields."""

    dtype: str
    shape: tuple[int | str, ...]


def to_json(value: Any, kind: Any, root: str = "") -> Any:
    """`value`, annotated `kind`, as JSON data; raises `CorruptRecord`. Places are spelled from `root` on."""
    try:
        return _write(value, kind, {})
    except _Misfit as misfit:
        raise CorruptRecord(misfit.spelled(root)) from misfit.__cause__


def from_json(value: Any, kind: Any, root: str = "") -> Any:
    """The inverse of `to_json`; raises `CorruptRecord`."""
    try:
        return _reader(kind)(value, {})
    except _Misfit as misfit:
        raise CorruptRecord(misfit.spelled(root)) from misfit.__cause__


class _Misfit(Exception):
    """What is wrong with a value, and its place: names and indices from the inside out."""

    def __init__(self, problem: str, *place: str | int) -> None:
        super().__init__(problem)
        self._problem, self._place = problem, list(place)

    def within(self, name: str | int) -> _Misfit:
        self._place.append(name)
        return self

    def spelled(self, root: str) -> str:
        for name in reversed(self._place):
            root = f"{root}[{name}]" if isinstance(name, int) else f"{root}.{name}" if root else name
        return f"{root or 'record'} {self._problem}"


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _write(value: Any, kind: Any, sizes: dict[str, int]) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, kind):
            raise _Misfit(f"is a {type(value).__name__}, must be {kind.__name__}")
        return {name: _write_part(vars(value)[name], hint, sizes, name) for name, hint in _hints(kind).items()}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _write_array(value, arguments[1], sizes)
    if origin is types.UnionType:
        return None if value is None else _write(value, arguments[0], sizes)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise _Misfit(f"is a {type(value).__name__}, must be a tuple")
        return [_write_part(item, arguments[0], sizes, i) for i, item in enumerate(value)]
    if kind is float and type(value) is int:
        return float(value)
    return _plain_reader(kind)(value, sizes)


def _write_part(value: Any, kind: Any, sizes: dict[str, int], name: str | int) -> Any:
    try:
        return _write(value, kind, sizes)
    except _Misfit as misfit:
        raise misfit.within(name) from misfit.__cause__


@functools.cache
def _reader(kind: Any) -> Reader:
    """The inverse of `_write` for values annotated `kind`, its branches taken once instead of at every record."""
    if dataclasses.is_dataclass(kind):
        return _object_reader(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _array_reader(arguments[1])
    if origin is types.UnionType:
        inner = _reader(arguments[0])
        return lambda value, sizes: None if value is None else inner(value, sizes)
    if origin is tuple:
        return _list_reader(arguments[0])
    return _plain_reader(kind)


def _object_reader(cls: type) -> Reader:
    fields = [(name, hint if hint in _EXACT else None, _reader(hint)) for name, hint in _hints(cls).items()]
    names = _hints(cls).keys()

    def read(value: Any, sizes: dict[str, int]) -> Any:
        if not isinstance(value, dict):
            raise _Misfit(f"must be an object, not {type(value).__name__}")
        if value.keys() != names:
            odd = min(value.keys() ^ names)
            state = "unknown" if odd in value else "missing"
            raise _Misfit(f"is {state}; the record was made by another version", odd[:40])
        parts = []
        for name, exact, reader in fields:
            part = value[name]
            if type(part) is not exact:
                try:
                    part = reader(part, sizes)
                except _Misfit as misfit:
                    raise misfit.within(name) from misfit.__cause__
            parts.append(part)
        return cls(*parts)

    return read


def _list_reader(kind: Any) -> Reader:
    exact = {kind} if kind in _EXACT else frozenset()
    reader = _reader(kind)

    def read(value: Any, sizes: dict[str, int]) -> Any:
        if not isinstance(value, list):
            raise _Misfit(f"must be a list, not {type(value).__name__}")
        if exact.issuperset(map(type, value)):
            return tuple(value)
        items = []
        for item in value:
            try:
                items.append(reader(item, sizes))
            except _Misfit as misfit:
                raise misfit.within(len(items)) from misfit.__cause__
        return tuple(items)

    return read


@functools.cache
def _plain_reader(kind: Any) -> Reader:
    """Strings, numbers, booleans, literals and free JSON objects: the same in memory and in JSON."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)

        def read(value: Any, _: dict[str, int]) -> Any:
            if value not in choices:
                raise _Misfit(f"is {value!r:.40}; must be one of {', '.join(choices)}")
            return value

    elif typing.get_origin(kind) is dict:

        def read(value: Any, _: dict[str, int]) -> Any:
            if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
                raise _Misfit("must be an object with string keys")
            if _deeper_than(value, _MAX_FREE_DEPTH):
                raise _Misfit(f"is nested more than {_MAX_FREE_DEPTH} deep")
            return dict(value)

    else:

        def read(value: Any, _: dict[str, int]) -> Any:
            if type(value) is not kind:  # exact: True is not an int here, nor 1 a float
                raise _Misfit(f"is a {type(value).__name__}, must be {kind.__name__}")
            if kind is float and not math.isfinite(value):
                raise _Misfit(f"is {value}; must be finite")
            return value

    return read


def _deeper_than(value: Mapping[str, Any], levels: int) -> bool:
    layer: list[Any] = [dict(value)]
    for _ in range(levels + 1):
        parts = [part.values() if isinstance(part, dict) else part for part in layer]
        layer = [item for part in parts for item in part if isinstance(item, (dict, list, tuple))]
        if not layer:
            return False
    return True


def _write_array(value: Any, layout: Layout, sizes: dict[str, int]) -> Any:
    wanted = np.dtype(layout.dtype)
    array = np.asarray(value)
    if array.dtype.kind not in {"f": "f", "i": "iu", "b": "b"}[wanted.kind]:
        raise _Misfit(f"has dtype {array.dtype}, must be {wanted}")
    with np.errstate(over="ignore"):  # what overflows becomes infinity and is refused below
        converted = np.ascontiguousarray(array, dtype=wanted)
    if wanted.kind == "i" and not np.array_equal(converted, array):
        raise _Misfit(f"holds integers that do not fit {wanted}")
    _check_shape(array.shape, layout.shape, sizes)
    _check_finite(converted)
    return {"shape": list(array.shape), "data": base64.b64encode(converted.tobytes()).decode("ascii")}


def _array_reader(layout: Layout) -> Reader:
    wanted = np.dtype(layout.dtype)

    def read(value: Any, sizes: dict[str, int]) -> np.ndarray:
        if not isinstance(value, dict) or value.keys() != {"shape", "data"} or not isinstance(value["data"], str):
            raise _Misfit("must be an object with shape and data")
        shape = value["shape"]
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise _Misfit("must be a list of sizes", "shape")
        _check_shape(tuple(shape), layout.shape, sizes)
        try:
            raw = binascii.a2b_base64(value["data"], strict_mode=True)
        except (binascii.Error, ValueError) as error:
            raise _Misfit(f"is not base64: {error}", "data") from error
        if len(raw) != math.prod(shape) * wanted.itemsize:
            raise _Misfit(f"holds {len(raw)} bytes, its shape {shape} needs another number", "data")
        if wanted.kind == "b" and raw.translate(None, b"\0\1"):
            raise _Misfit("holds a byte that is neither 0 nor 1", "data")
        array = np.frombuffer(raw, dtype=wanted).reshape(shape).copy()
        _check_finite(array)
        return array

    return read


def _check_finite(array: np.ndarray) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _Misfit("holds NaN or infinity")


def _check_shape(shape: tuple[int, ...], wanted: tuple[int | str, ...], sizes: dict[str, int]) -> None:
    if len(shape) != len(wanted):
        raise _Misfit(f"has shape {shape}, must have {len(wanted)} axes {wanted}")
    for size, want in zip(shape, wanted, strict=True):
        expected = want if isinstance(want, int) else sizes.setdefault(want, size)
        if size != expected:
            raise _Misfit(f"has shape {shape}, must be {wanted} with {want} = {expected}")
