"""State dataclasses ↔ bytes: one line of JSON, then the arrays it points to.

No pickle: restoring a session reads data and runs nothing. Fields are looked up by name and
checked, so that a state saved by another version is refused with the field that differs.
"""

import dataclasses
import json
import types
import typing
from typing import Any, Final, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

State = TypeVar("State")

MAGIC: Final = b"livesat-tracks-1\n"
KINDS: Final = {"<f4", "<f8", "<i8", "|b1"}


def pack(state: object) -> bytes:
    """A tree of dataclasses, lists, string- or int-keyed dicts, numbers and arrays → bytes."""
    arrays: list[NDArray[Any]] = []
    tree = json.dumps(_plain(state, arrays), separators=(",", ":"), allow_nan=False)
    head = [[array.dtype.str, list(array.shape)] for array in arrays]
    lines = MAGIC + json.dumps(head).encode() + b"\n" + tree.encode() + b"\n"
    return lines + b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


def unpack(kind: type[State], data: bytes) -> State:
    """The bytes of `pack` → a `kind`, equal to the one that was packed.

    Raises:
        ValueError: not such bytes, cut short, or of another version of `kind`.
    """
    if not data.startswith(MAGIC):
        raise ValueError(f"expected a saved track state, got {data[:16]!r}")
    try:
        head, tree, rest = data[len(MAGIC) :].split(b"\n", 2)
        arrays: list[NDArray[Any]] = []
        for dtype, shape in json.loads(head):
            if dtype not in KINDS:
                raise ValueError(f"expected an array of {sorted(KINDS)}, got {dtype!r}")
            count = int(np.prod(shape, dtype=np.int64))
            size = count * np.dtype(dtype).itemsize
            arrays.append(np.frombuffer(rest[:size], dtype, count).reshape(shape).copy())
            rest = rest[size:]
        if rest:
            raise ValueError(f"expected no bytes behind the arrays, got {len(rest)}")
        return cast("State", _typed(kind, json.loads(tree), arrays, kind.__name__))
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(f"not a saved {kind.__name__}: {error}") from error


def _plain(value: Any, arrays: list[NDArray[Any]]) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name), arrays) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return len(arrays) - 1
    if isinstance(value, list):
        return [_plain(item, arrays) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return {str(key): _plain(item, arrays) for key, item in items}
    assert value is None or isinstance(value, bool | int | float | str), type(value)
    return value


def _typed(kind: Any, value: Any, arrays: list[NDArray[Any]], where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        inner = [arg for arg in args if arg is not type(None)]
        return None if value is None else _typed(inner[0], value, arrays, where)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind)]
        if not isinstance(value, dict) or set(names) != set(cast("dict[str, Any]", value)):
            raise ValueError(f"expected {where} with {names}, got {value!r:.200}")
        fields = {n: _typed(hints[n], value[n], arrays, f"{where}.{n}") for n in names}
        return cast("Any", kind)(**fields)
    if origin is np.ndarray:
        return arrays[value]
    if origin is list:
        return [_typed(args[0], item, arrays, where) for item in value]
    if origin is dict:
        return {args[0](k): _typed(args[1], v, arrays, f"{where}[{k}]") for k, v in value.items()}
    if kind is float and isinstance(value, int):
        return float(value)
    if not isinstance(value, kind):
        raise ValueError(f"expected {where} to be {kind.__name__}, got {value!r}")
    return value
