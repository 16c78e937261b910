"""Typed messages <-> msgpack frames.

A message is a slotted dataclass registered under a small integer tag. On the wire it is the
msgpack array ``[tag, field0, field1, ...]``. Fields are int, float, str, bytes, bool, None, columns
(``array`` of int32, int64 or float32: little-endian bytes on the wire), records (dataclasses of the
same kinds of fields), or tuples of these.

What comes in is checked: each field against its annotation, and the whole against the class's own
``valid``, so that no actor meets a message that no sender could have meant.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from enum import Enum
from hashlib import sha256
from operator import attrgetter
from types import NoneType, UnionType
from typing import (
    Any,
    Generic,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import msgpack

T = TypeVar("T")
Reader = Callable[[Any], Any]  # raises TypeError or ValueError where a value is not of its type

INT32, INT64, FLOAT32 = "i", "q", "f"
_COLUMNS = {INT32: 1, INT64: 2, FLOAT32: 3}  # typecode -> msgpack's extension type
_TYPECODES = {code: typecode for typecode, code in _COLUMNS.items()}

_BY_TAG: dict[int, tuple[type, tuple[Reader, ...]]] = {}
_ENCODERS: dict[type, tuple[int, Callable[[Any], Any]]] = {}
_RECORDS: dict[type, Callable[[Any], tuple[Any, ...]]] = {}


class Column(Generic[T]):
    """Stands for ``array`` in annotations, which Python 3.11 cannot subscript."""


class CodecError(ValueError):
    """A frame does not decode to a registered message."""


def _getter(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    """All fields as one tuple; attrgetter alone returns a bare value for a single name."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda msg: tuple(getattr(msg, name) for name in names)


@dataclass_transform(frozen_default=True)
def message(tag: int) -> Callable[[type[T]], type[T]]:
    """Class decorator: make the class a dataclass and register it under ``tag`` (0..127).

    A method ``valid(self) -> bool`` says what types cannot: lengths, ranges. It is asked, after
    the types of all fields, for messages that come in from another process.

    Frozen for type checkers only: at run time that would cost a Delta 1.2 us more.
    """

    def register(cls: type[T]) -> type[T]:
        if not 0 <= tag <= 127:
            raise ValueError(f"tag {tag} is not in 0..127")
        if tag in _BY_TAG:
            raise ValueError(f"tag {tag} is taken by {_BY_TAG[tag][0].__name__}")
        cls = dataclass(slots=True, unsafe_hash=True)(cls)
        _ENCODERS[cls] = (tag, _getter(_names(cls)))
        _BY_TAG[tag] = cls, _readers(cls)
        return cls

    return register


def registered() -> dict[type, int]:
    """Every message with its tag."""
    return {cls: tag for tag, (cls, _) in _BY_TAG.items()}


def protocol() -> str:
    """Version of all messages that are registered: changes with any name, tag, field or type."""
    kinds = [(f"{tag} {cls.__name__}", cls) for cls, tag in registered().items()]
    kinds += [(cls.__name__, cls) for cls in _RECORDS]
    lines = (f"{name} {[(f.name, str(f.type)) for f in fields(cls)]}" for name, cls in kinds)
    return sha256("\n".join(sorted(lines)).encode()).hexdigest()[:12]


def record(cls: type[T]) -> type[T]:
    """Let instances of the dataclass ``cls`` be fields of messages."""
    _RECORDS[cls] = _getter(_names(cls))
    return cls


def encode(msg: object) -> bytes:
    """Frame one message. Raises TypeError for an unregistered type or an unpackable field."""
    try:
        tag, get = _ENCODERS[type(msg)]
    except KeyError:
        raise TypeError(f"{type(msg).__name__} is not a registered message") from None
    frame: bytes = msgpack.packb((tag, *get(msg)), default=_plain)
    return frame


def decode(frame: bytes | memoryview) -> Any:
    """Inverse of :func:`encode`. Raises CodecError, and nothing else, on any other bytes."""
    try:
        tag, *values = msgpack.unpackb(frame, use_list=False, ext_hook=_column)
        cls, readers = _BY_TAG[tag]
        msg = cls(*[read(value) for read, value in zip(readers, values, strict=True)])
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise CodecError(f"{len(frame)} bytes do not decode to a message: {error!r}") from error
    if (valid := getattr(cls, "valid", None)) is not None and not valid(msg):
        raise CodecError(f"an impossible {cls.__name__}")
    return msg


def _plain(value: object) -> object:
    """What msgpack writes in place of a column or a record."""
    if isinstance(value, array):
        return msgpack.ExtType(_COLUMNS[value.typecode], value.tobytes())
    return _RECORDS[type(value)](value)


def _column(code: int, data: bytes) -> array[Any]:
    column: array[Any] = array(_TYPECODES[code])
    column.frombytes(data)
    return column


def _names(cls: type) -> list[str]:
    return [f.name for f in fields(cls)]


def field_types(cls: type) -> dict[str, Any]:
    """The annotations of a message's or record's fields, ``Column`` in place of ``array``."""
    return get_type_hints(cls, localns={"array": Column})


def _readers(cls: type) -> tuple[Reader, ...]:
    hints = field_types(cls)
    return tuple(_reader(hints[name]) for name in _names(cls))


def _reader(hint: Any) -> Reader:
    """Checks and converts a value of the annotated type ``hint``."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (inner,) = (_reader(arg) for arg in args if arg is not NoneType)
        return lambda value: None if value is None else inner(value)
    if origin is tuple:
        return _tuple_reader(args)
    if origin is list:
        each = _reader(args[0])
        return lambda values: [each(value) for value in _of_tuple(values)]
    if origin is Column:
        return _column_reader({float: (FLOAT32,), int: (INT32, INT64)}[args[0]])
    if hint in _RECORDS:
        return _record_reader(hint)
    if issubclass(hint, Enum):
        return lambda value: hint(value)
    if hint is bytearray:
        return lambda value: bytearray(_bytes(value))
    return _scalar_reader((int, float) if hint is float else (hint,))


def _scalar_reader(kinds: tuple[type, ...]) -> Reader:
    def read(value: Any) -> Any:
        if type(value) not in kinds:
            raise TypeError(f"{type(value).__name__} instead of {kinds[-1].__name__}")
        return value

    return read


_bytes = _scalar_reader((bytes,))


def _column_reader(typecodes: tuple[str, ...]) -> Reader:
    def read(value: Any) -> Any:
        if type(value) is not array or value.typecode not in typecodes:
            raise TypeError(f"{type(value).__name__} instead of a column of {typecodes}")
        return value

    return read


def _tuple_reader(args: tuple[Any, ...]) -> Reader:
    readers = [_reader(arg) for arg in args if arg is not ...]

    def read_all(values: Any) -> tuple[Any, ...]:
        (each,) = readers
        return tuple(map(each, _of_tuple(values)))

    def read_each(values: Any) -> tuple[Any, ...]:
        return tuple([read(value) for read, value in zip(readers, _of_tuple(values), strict=True)])

    return read_all if ... in args else read_each


def _record_reader(cls: type) -> Reader:
    names, readers = _names(cls), _readers(cls)

    def read(values: Any) -> Any:
        return cls(**{n: r(v) for n, r, v in zip(names, readers, _of_tuple(values), strict=True)})

    return read


def _of_tuple(value: Any) -> tuple[Any, ...]:
    if type(value) is not tuple:
        raise TypeError(f"{type(value).__name__} instead of an array")
    return value


def i32(values: Iterable[int]) -> array[int]:
    """A column of int32."""
    return array(INT32, values)


def i64(values: Iterable[int]) -> array[int]:
    """A column of int64 (request ids)."""
    return array(INT64, values)
