"""Frames: round trips, columns, and that foreign bytes raise CodecError and nothing else."""

from __future__ import annotations

import sys
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncllm.codec import CodecError, decode, encode, i32, i64, message
from asyncllm.core.request import FinishReason, SamplingParams
from asyncllm.messages import (
    Abort,
    CompileGrammar,
    Drain,
    EndpointGone,
    Finished,
    Halt,
    KvComputed,
    OfferStep,
    RequestServed,
    StepPlan,
    StopHit,
    Submit,
    Tokens,
)
from asyncllm.records import AnsweredRequest, Failure, Logprobs
from tests.speed import quickest


def test_round_trip_keeps_values_and_types() -> None:
    params = SamplingParams(max_new_tokens=3, stop=("a", "bé"), logit_bias=((5, -1.5),))
    submit = Submit(7 << 40 | 1, i32([1, -2, 3]), params)
    back = decode(encode(submit))
    assert back == submit
    assert back.params == params


def test_a_message_without_fields_survives() -> None:
    assert decode(encode(Halt())) == Halt()


def test_a_message_with_one_field_survives() -> None:
    assert decode(memoryview(encode(Abort(1 << 41)))) == Abort(1 << 41)


def test_nested_tuples_survive() -> None:
    tokens = Tokens(
        1,
        i64([9]),
        i32([8]),
        b"\1",
        None,
        ((3, Logprobs(1, array("f", [-1.5]), i32([7]), array("f", [-2]))),),
    )
    assert decode(encode(tokens)) == tokens


def test_threads_encode_beside_each_other() -> None:
    """Packing columns runs Python code, in the middle of which another thread may have its turn."""
    messages = [Submit(i, i32([i] * 50), SamplingParams(max_new_tokens=i)) for i in range(1, 5)]
    wanted = [encode(msg) for msg in messages]

    def work(i: int) -> bool:
        return all(encode(messages[i]) == wanted[i] for _ in range(1000))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)


def test_columns() -> None:
    assert list(i32([1, -1, 2**31 - 1])) == [1, -1, 2**31 - 1]
    assert list(i64([3 << 40 | 9])) == [3 << 40 | 9]


def test_only_registered_types_are_encoded() -> None:
    with pytest.raises(TypeError, match="object is not a registered message"):
        encode(object())


def test_what_could_not_be_encoded_leaves_nothing_behind() -> None:
    with pytest.raises(TypeError, match="object cannot be a field"):
        encode(Finished(1, FinishReason.STOP, object()))  # type: ignore[arg-type]
    assert decode(encode(EndpointGone(2))) == EndpointGone(2)


def test_a_taken_tag_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tag 38 is taken by EndpointGone"):
        message(38)(type("Other", (), {}))
    assert decode(encode(EndpointGone(2))) == EndpointGone(2)


def test_a_tag_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="tag 128"):
        message(128)(type("Other", (), {}))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x91\x7e",  # unknown tag
        b"\x91\x26",  # Gone without its field
        b"\x93\x26\x01\x02",  # and with one too many
        b"\x92\x26",  # truncated
        b"\x92\x26\x01\x00",  # bytes after the message
        b"\xc4\x02\x26\x01",  # Gone and its field as bytes
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


GOOD = StepPlan(
    7, 1, i32([0, 3]), i32([5, 0]), i32([1, 2]), i32([0, 1]), i32([9, 1, 2, 3]), i32([-1, 4, 5]),
    bytearray(b"\1\1"),
)  # fmt: skip
TWO = Logprobs(1, array("f", [-1, -2]), i32([1, 2]), array("f", [-1, -2]))
TOKENS = Tokens(1, i64([5, 6]), i32([1, 2]), b"\0\1", TWO, ((5, TWO),))
ANSWERED = AnsweredRequest("/", 200, 1, 2, "stop", 0.1, -1, 2)
LATE = 1 << 40  # a step of a server that has run for months
LATE_ONES = (
    replace(GOOD, step=LATE),
    OfferStep(endpoint=0, step=LATE, num_tokens=1, mixed=False),
    KvComputed(rid=1, seq=0, step=LATE, start=0, slots=i32([1])),
)


@pytest.mark.parametrize(
    "msg", [GOOD, TOKENS, RequestServed((ANSWERED,)), Drain(3), *LATE_ONES], ids=lambda m: type(m)
)
def test_whole_messages_pass(msg: object) -> None:
    assert decode(encode(msg)) == msg


@pytest.mark.parametrize(
    "msg",
    [
        EndpointGone("1"),  # type: ignore[arg-type]
        EndpointGone(True),
        EndpointGone(1.0),  # type: ignore[arg-type]
        Drain("soon"),  # type: ignore[arg-type]
        Abort(-1),
        Abort(1 << 63),
        StopHit(1, -1),
        Finished(1, 9),  # type: ignore[arg-type]
        Finished(1, FinishReason.ERROR),
        Finished(1, FinishReason.ERROR, Failure("no", status=0)),
        Finished(1, FinishReason.STOP, Failure("no")),
        Finished(1, FinishReason.ERROR, ("no",)),  # type: ignore[arg-type]
        CompileGrammar(1, 1, "prose", ""),
        RequestServed((replace(ANSWERED, status=99),)),
        RequestServed((replace(ANSWERED, prompt_len=-1),)),
        RequestServed((replace(ANSWERED, ttft_s=float("nan")),)),
        RequestServed((("/", 200),)),  # type: ignore[arg-type]
        Submit(1, i32([]), ()),  # type: ignore[arg-type]
        Submit(1, b"", SamplingParams()),  # type: ignore[arg-type]
        Submit(1, array("f"), SamplingParams()),
        Submit(1, i32([]), SamplingParams(), "between"),
        Submit(1, i32([]), SamplingParams(stop="abc")),  # type: ignore[arg-type]
        replace(GOOD, step=0),
        replace(GOOD, num_decode=2),
        replace(GOOD, lanes=i32([0])),
        replace(GOOD, lanes=i32([0, -3])),
        replace(GOOD, counts=i32([1, 0])),
        replace(GOOD, slots=i32([9, 1, 2])),
        replace(GOOD, slots=i32([9, 1, 2, -3])),
        replace(GOOD, tokens=i32([1])),
        replace(GOOD, samples=bytearray(b"\1")),
        replace(GOOD, cached_counts=i32([-1, 2])),
        replace(GOOD, masks=bytearray(b"\1")),
        replace(TOKENS, rids=i64([5])),
        replace(TOKENS, rids=i64([5, -6])),
        replace(TOKENS, tokens=i32([1, -2])),
        replace(TOKENS, ends=b""),
        replace(TOKENS, logprobs=TWO.slice(0, 1)),
        replace(TOKENS, logprobs=replace(TWO, top_ids=i32([]))),
        replace(TOKENS, logprobs=replace(TWO, num_top=-1)),
        replace(TOKENS, prompt=((5, replace(TWO, num_top=2)),)),
    ],
    ids=repr,
)
def test_a_message_that_nobody_can_mean_is_a_codec_error(msg: object) -> None:
    with pytest.raises(CodecError):
        decode(encode(msg))


@given(st.binary(max_size=64))
def test_random_bytes_give_a_message_or_a_codec_error(frame: bytes) -> None:
    try:
        msg = decode(frame)
    except CodecError:
        return
    assert type(msg).__module__ == "asyncllm.messages"


@pytest.mark.parametrize("where", ["prompt", "outputs", "prediction"])
def test_a_request_fits_if_its_tokens_are_in_the_vocabulary(where: str) -> None:
    plain = Submit(1, i32([5]), SamplingParams(max_new_tokens=3))
    for ids, fits in (([0, 9], True), ([], True), ([3, 10], False), ([-1, 3], False)):
        if where == "prompt" and not ids:
            continue
        assert replace(plain, **{where: i32(ids)}).fits(10, 20) is fits
    assert not replace(plain, **{where: i32([5] * 21)}).fits(10, 20)


def test_a_long_request_is_checked_in_no_time() -> None:
    """By the event loop of the process that gets it."""
    ids = i32(range(1 << 18))
    request = Submit(1, ids, SamplingParams(max_new_tokens=3), outputs=ids, prediction=ids)
    assert quickest(lambda: request.fits(1 << 18, 1 << 20), 1e-3) < 1e-3
