"""Encodes typed messages as msgpack frames, and decodes and validates them.

A message is a slotted dataclass registered under a small integer tag. On the wire it is the
msgpack array ``[tag, field0, field1, ...]``. Fields are int, float, str, bytes, bool, None, columns
(``array`` of int32, int64 or float32: little-endian bytes on the wire), records (dataclasses of the
same kinds of fields), or tuples of these.

Incoming messages are validated: each field against its annotation, and the whole with the class's
own ``valid``, so that no actor gets a message that no correct sender could have sent.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from enum import Enum
from hashlib import sha256
from operator import attrgetter
from types import NoneType, UnionType
from typing import (
    Any,
    ClassVar,
    Generic,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import msgpack


class Message:
    """Base class of the messages between actors; :func:`message` registers its subclasses."""

    __slots__ = ()
    tag: ClassVar[int]
    _urgent: ClassVar[bool] = False

    @property
    def urgent(self) -> bool:
        """A full mailbox takes it all the same: others wait for it, or something else limits it."""
        return self._urgent

    def valid(self) -> bool:
        """Checks beyond types, such as lengths and ranges. Called for messages from another process
        after the types of all fields have been checked."""
        return True


T = TypeVar("T")
M = TypeVar("M", bound=Message)

INT32, INT64, FLOAT32 = "i", "q", "f"
_COLUMNS = {INT32: 1, INT64: 2, FLOAT32: 3}  # typecode -> msgpack's extension type
_TYPECODES = {code: typecode for typecode, code in _COLUMNS.items()}

Fields = Callable[[Any], tuple[object, ...]]  # of a message (after its tag) or a record
_Look = Callable[[Any], Any]  # from a type-checked wire value to the field's value
_TypeForm = tuple[
    frozenset[type], _Look | None
]  # the types on the wire, and a conversion if needed

_BY_TAG: dict[int, tuple[type[Message], _Look]] = {}
_FIELDS: dict[type, Fields] = {}
_RECORDS: set[type] = set()


class Column(Generic[T]):
    """Stands in for ``array`` when annotations are resolved: Python 3.11 cannot subscript it."""


class CodecError(ValueError):
    """A frame does not decode to a registered message."""


def _getter(*names: str) -> Fields:
    """Get these attributes as a tuple; attrgetter alone returns a bare value for a single name."""
    if len(names) > 1:
        return attrgetter(*names)
    get = attrgetter(*names)
    return lambda instance: (get(instance),)


@dataclass_transform(frozen_default=True)
def message(tag: int, *, urgent: bool = False) -> Callable[[type[M]], type[M]]:
    """Class decorator: make the class a dataclass and register it under ``tag`` (0..127).

    ``urgent``: see :attr:`Message.urgent`.

    Frozen for type checkers only: freezing at run time would add 1.2 us to each Delta.
    """

    def register(cls: type[M]) -> type[M]:
        if not 0 <= tag <= 127:
            raise ValueError(f"tag {tag} is not in 0..127")
        if tag in _BY_TAG:
            raise ValueError(f"tag {tag} is taken by {_BY_TAG[tag][0].__name__}")
        cls = dataclass(slots=True, unsafe_hash=True)(cls)
        cls.tag, cls._urgent = tag, urgent
        _FIELDS[cls] = _getter("tag", *_names(cls))
        _BY_TAG[tag] = cls, _row(field_types(cls).values())
        return cls

    return register


def registered() -> dict[type, int]:
    """Every message class with its tag."""
    return {cls: tag for tag, (cls, _) in _BY_TAG.items()}


def protocol() -> str:
    """A hash of all registered messages: changes with any name, tag, field or type."""
    kinds = [(f"{tag} {cls.__name__}", cls) for cls, tag in registered().items()]
    kinds += [(cls.__name__, cls) for cls in _RECORDS]
    lines = (f"{name} {[(f.name, str(f.type)) for f in fields(cls)]}" for name, cls in kinds)
    return sha256("\n".join(sorted(lines)).encode()).hexdigest()[:12]


def record(cls: type[T]) -> type[T]:
    """Class decorator: allow the dataclass ``cls`` as a field type of messages."""
    _RECORDS.add(cls)
    _FIELDS[cls] = _getter(*_names(cls))
    return cls


def encode(msg: Message) -> bytes:
    """Encode one message. Raises TypeError for an unregistered type or an unpackable field."""
    try:
        get = _FIELDS[type(msg)]
    except KeyError:
        raise TypeError(f"{type(msg).__name__} is not a registered message") from None
    frame: bytes = _PACKERS.pack(get(msg))
    return frame


def decode(frame: bytes | memoryview) -> Message:
    """Inverse of :func:`encode`. Raises CodecError, and nothing else, on any other bytes."""
    try:
        values = msgpack.unpackb(frame, use_list=False, ext_hook=_column)
        if type(values) is not tuple:
            raise _wrong(values, (tuple,))
        cls, read = _BY_TAG[values[0]]
        msg = cls(*read(values[1:]))
    except (ValueError, TypeError, LookupError, msgpack.UnpackException) as error:
        raise CodecError(f"{len(frame)} bytes do not decode to a message: {error!r}") from error
    if not msg.valid():
        raise CodecError(f"an invalid {cls.__name__}")
    return msg


def _plain(value: object) -> object:
    """Convert a column or a record to what msgpack writes."""
    if isinstance(value, array):
        return msgpack.ExtType(_COLUMNS[value.typecode], value.tobytes())
    if type(value) not in _RECORDS:
        raise TypeError(f"{type(value).__name__} cannot be a field")
    return _FIELDS[type(value)](value)


class _Packers(threading.local):
    """One packer per thread: creating one takes longer than packing a small message.

    It is per thread because another thread may run while it packs a column.
    """

    def __init__(self) -> None:
        self.pack = msgpack.Packer(default=_plain).pack


_PACKERS = _Packers()


def _column(code: int, data: bytes) -> array[int] | array[float]:
    column: array[int] = array(_TYPECODES[code])
    column.frombytes(data)
    return column


def _names(cls: type) -> list[str]:
    return [f.name for f in fields(cls)]


def field_types(cls: type) -> dict[str, object]:
    """The annotations of a message's or record's fields, ``Column`` in place of ``array``."""
    hints = get_type_hints(cls, localns={"array": Column})
    return {name: hints[name] for name in _names(cls)}


def _row(hints: Iterable[object]) -> _Look:
    """Reader of a tuple with one type per position."""
    forms = [_form(hint) for hint in hints]
    allowed = [kinds for kinds, _ in forms]
    looks = [(i, look) for i, (_, look) in enumerate(forms) if look is not None]

    def read(values: tuple[object, ...]) -> tuple[object, ...]:
        for value, kinds in zip(values, allowed, strict=True):
            if type(value) not in kinds:
                raise _wrong(value, kinds)
        if not looks:
            return values
        row = list(values)
        for i, look in looks:
            row[i] = look(row[i])
        return tuple(row)

    return read


def _many(hint: object) -> _Look:
    """Reader of a tuple of any length whose values have one type."""
    kinds, look = _form(hint)

    def read(values: tuple[object, ...]) -> tuple[object, ...]:
        if not kinds.issuperset(map(type, values)):
            raise _wrong(next(value for value in values if type(value) not in kinds), kinds)
        return values if look is None else tuple(map(look, values))

    return read


def _form(hint: object) -> _TypeForm:
    """How to check and convert values of type ``hint``; computed once per class."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (inner,) = (arg for arg in args if arg is not NoneType)
        kinds, look = _form(inner)
        return kinds | {NoneType}, look and (lambda value: None if value is None else look(value))
    if origin is tuple:
        return frozenset({tuple}), _many(args[0]) if ... in args else _row(args)
    if origin is list:
        read = _many(args[0])
        return frozenset({tuple}), lambda values: list(read(values))
    if origin is Column:
        typecodes = {float: (FLOAT32,), int: (INT32, INT64)}[args[0]]
        return frozenset({array}), _column_of(typecodes)
    assert isinstance(hint, type), hint
    if hint in _RECORDS:
        return frozenset({tuple}), _record(hint)
    if issubclass(hint, Enum):
        return frozenset({int}), hint
    if hint is bytearray:
        return frozenset({bytes}), bytearray
    return frozenset({int, float} if hint is float else {hint}), None


def _record(cls: type) -> _Look:
    names, read = _names(cls), _row(field_types(cls).values())
    return lambda values: cls(**dict(zip(names, read(values), strict=True)))


def _column_of(typecodes: tuple[str, ...]) -> _Look:
    def read(column: array[int] | array[float]) -> array[int] | array[float]:
        if column.typecode not in typecodes:
            raise TypeError(f"a column of {column.typecode!r} instead of {typecodes}")
        return column

    return read


def _wrong(value: object, kinds: Iterable[type]) -> TypeError:
    wanted = " or ".join(sorted(kind.__name__ for kind in kinds))
    return TypeError(f"{type(value).__name__} instead of {wanted}")


def i32(values: Iterable[int]) -> array[int]:
    """A column of int32."""
    return array(INT32, values)


def i64(values: Iterable[int]) -> array[int]:
    """A column of int64 (request ids)."""
    return array(INT64, values)
