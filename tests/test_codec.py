"""Frames: round trips, columns, and that foreign bytes raise CodecError and nothing else."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncllm.codec import CodecError, decode, encode, floats, i32, i64, ints, longs, message
from asyncllm.core.request import SamplingParams
from asyncllm.messages import Abort, Halt, Heartbeat, Submit, Tokens


def test_round_trip_keeps_values_and_types() -> None:
    params = SamplingParams(max_new_tokens=3, stop=("a", "bé"), logit_bias=((5, -1.5),))
    submit = Submit(7 << 40 | 1, i32([1, -2, 3]), params.pack())
    back = decode(encode(submit))
    assert back == submit
    assert SamplingParams.unpack(back.params) == params


def test_a_message_without_fields_survives() -> None:
    assert decode(encode(Halt())) == Halt()


def test_a_message_with_one_field_survives() -> None:
    assert decode(memoryview(encode(Abort(1 << 41)))) == Abort(1 << 41)


def test_nested_tuples_survive() -> None:
    tokens = Tokens(1, b"", b"", b"", b"", 0, b"", b"", ((3, b"x", 1, b"y", b"z"),))
    assert decode(encode(tokens)) == tokens


def test_columns() -> None:
    assert list(ints(i32([1, -1, 2**31 - 1]))) == [1, -1, 2**31 - 1]
    assert list(longs(i64([3 << 40 | 9]))) == [3 << 40 | 9]
    assert list(floats(bytes.fromhex("0000c03f"))) == [1.5]
    assert len(i32([1, 2])) == 8
    assert len(i64([1, 2])) == 16


def test_only_registered_types_are_encoded() -> None:
    with pytest.raises(TypeError, match="object is not a registered message"):
        encode(object())


def test_a_taken_tag_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tag 31 is taken by Heartbeat"):
        message(31)(type("Other", (), {}))
    assert decode(encode(Heartbeat(2))) == Heartbeat(2)


def test_a_tag_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="tag 128"):
        message(128)(type("Other", (), {}))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x91\x7e",  # unknown tag
        b"\x91\x1f",  # Heartbeat without its field
        b"\x93\x1f\x01\x02",  # and with one too many
        b"\x92\x1f",  # truncated
        b"\x92\x1f\x01\x00",  # bytes after the message
        b"\xc1",  # never used by msgpack
        b"\x90",  # no tag
        b"\x05",  # no array
        b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1
        b"\x91" * 5000,  # deeper than any message
        b"\x91\xa1\xff",  # not UTF-8
        b"GET / HTTP/1.1\r\n\r\n",
        msgpack.packb([[1, {}]]),
    ],
    ids=lambda f: repr(f[:12]),
)
def test_other_bytes_are_codec_errors(frame: bytes) -> None:
    with pytest.raises(CodecError):
        decode(frame)


@given(st.binary(max_size=64))
def test_random_bytes_give_a_message_or_a_codec_error(frame: bytes) -> None:
    try:
        msg = decode(frame)
    except CodecError:
        return
    assert type(msg).__module__ == "asyncllm.messages"
