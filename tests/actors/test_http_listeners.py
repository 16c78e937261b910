"""What comes in from other processes, with the keys and without sense: nothing of it does harm."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import astuple, is_dataclass, replace
from enum import IntEnum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import msgpack
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncllm import messages
from asyncllm.actors.allocator import Allocator
from asyncllm.actors.balancer import Balancer
from asyncllm.actors.base import Actor
from asyncllm.actors.grammar import GrammarCompiler
from asyncllm.actors.lockstep import Lockstep
from asyncllm.actors.runner import Runner
from asyncllm.actors.scheduler import Scheduler
from asyncllm.actors.system import ActorSystem
from asyncllm.actors.transport import CurveKeys, TransportSettings
from asyncllm.actors.watchdog import Watchdog
from asyncllm.actors.watchdog_settings import WatchdogConfig, WatchdogHooks
from asyncllm.codec import Column, encode, field_types, i32, i64, registered
from asyncllm.constrain.protocol import Constraint
from asyncllm.core.request import GRAMMARS, FinishReason, SamplingParams
from asyncllm.core.scheduling import SchedulerCore
from asyncllm.errors import RequestError
from asyncllm.messages import FRONTEND_SHIFT, Finished, Hello, StepDone, StepPlan, Submit
from asyncllm.topology import Contract, Topology
from tests.raw import raw

VOCAB, MAX_LEN, LANES, SLOTS = 50, 24, 4, 64
CONTRACT = Contract(protocol="p", options="o")
NAMES = ("allocator", "grammar", "scheduler", "balancer", "lockstep", "runner", "detokenizer",
         "tokenizer", "frontend", "watchdog", "nobody")  # fmt: skip
TYPES = {
    cls: tag
    for cls, tag in registered().items()
    if f"{cls.__module__}.".startswith(f"{messages.__name__}.")
}
PARAMS = field_types(SamplingParams)


class Device:
    """Every token is 1; refuses what a device could not compute."""

    def launch(self, plan: StepPlan) -> Pending:
        lanes, starts, counts = plan.lanes, plan.starts, plan.counts
        assert all(0 <= lane < LANES for lane in lanes)
        assert all(s + c <= MAX_LEN for s, c in zip(starts, counts, strict=True))
        assert all(-1 <= token < VOCAB for token in plan.tokens)
        tokens = i32(1 if samples else -1 for samples in plan.samples)
        return Pending(StepDone(plan.step, tokens, None))

    def close(self) -> None:
        pass


class Pending:
    gap_ms: float | None = None

    def __init__(self, done: StepDone) -> None:
        self.done = done

    def wait(self) -> StepDone:
        return self.done


class Builder:
    """Compiles nothing."""

    def __contains__(self, key: object) -> bool:
        return False

    def build(self, kind: str, text: str) -> None:
        raise RequestError("no")

    def keep(self, kind: str, text: str, compiled: Any) -> None:
        pass


class Sink(Actor[Any]):
    """Takes what its own process may be told; resolves ``ended`` when ``rid`` has ended."""

    remote = frozenset(TYPES)

    def __init__(self, name: str, rid: int = -1) -> None:
        super().__init__(name)
        self.rid, self.ended = rid, asyncio.get_running_loop().create_future()

    def receive(self, batch: list[Any]) -> None:
        for msg in batch:
            if isinstance(msg, Finished) and msg.rid == self.rid:
                self.ended.set_result(msg)


class Closed(Sink):
    """An actor of the leader to which other processes have nothing to say."""

    remote = frozenset()


def constrain(params: SamplingParams, thoughts: str, healed: object) -> Constraint | None:
    if params.grammar is not None:
        raise RequestError("not compiled")
    return None


def leader(keys: CurveKeys) -> ActorSystem:
    system = ActorSystem(
        0, TransportSettings("tcp://127.0.0.1:*", keys), topology=Topology.on_one_node(http=2)
    )
    core = SchedulerCore(
        num_lanes=LANES, num_slots=SLOTS, batch_max_tokens=16, chunked_prefill_size=8,
        eos_ids=(2,), num_ranks=0,
    )  # fmt: skip
    scheduler = Scheduler(core, runners=[0], vocab_size=VOCAB, max_len=MAX_LEN, constrain=constrain)
    runner = Runner(Device(), reports=True)
    runner.remote = frozenset()
    duty = WatchdogConfig(
        contract=CONTRACT, model_name="m", max_len=MAX_LEN, step_timeout_s=60.0,
    )  # fmt: skip
    watchdog = Watchdog(duty, WatchdogHooks(guard=lambda _: None, watch_s=0.0))
    keeper = GrammarCompiler(Builder())
    limits: dict[str, int] = {"vocab_size": VOCAB, "max_len": MAX_LEN}
    balancer = Balancer("cache_aware", num_slots=SLOTS, **limits)
    for actor in (
        Allocator(SLOTS), keeper, scheduler, balancer, Lockstep(), runner, watchdog,
    ):  # fmt: skip
        system.add(actor)
    for name in ("detokenizer", "tokenizer", "frontend"):
        system.add(Closed(name))
    return system


# -- messages --------------------------------------------------------------------------------------

RIDS = st.integers(0, 5).map(lambda i: (1 << FRONTEND_SHIFT) + i)
INTS = st.one_of(
    st.integers(-3, 70), RIDS, st.sampled_from([2**31 - 1, 2**31, 2**63 - 1, 2**64 - 1, -(2**63)])
)
FLOATS = st.one_of(st.floats(0, 2), st.floats(), st.integers(-1, 2))
BYTES = st.binary(max_size=9)
INT32S = st.lists(st.integers(-2, 60), max_size=8).map(lambda some: i32(some).tobytes())
COLUMNS = st.builds(
    msgpack.ExtType,
    st.sampled_from([1, 1, 1, 1, 2, 2, 3, 3, 4]),
    st.one_of(INT32S, INT32S, st.binary(max_size=17)),
)
STRINGS = st.one_of(st.sampled_from(["", "open", "frontend", *GRAMMARS]), st.text(max_size=5))
ANY = st.one_of(INTS, FLOATS, BYTES, COLUMNS, STRINGS, st.booleans(), st.none())


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Of the annotated type, as they travel."""
    if kind is SamplingParams:
        return packed()
    if is_dataclass(kind):
        return st.tuples(*map(values, field_types(kind).values()))
    plain = {int: INTS, float: FLOATS, bytes: BYTES, str: STRINGS, bool: st.booleans()}
    if kind in plain:
        return plain[kind]
    if get_origin(kind) is Column:
        return COLUMNS
    if kind is bytearray:
        return st.one_of(BYTES, st.lists(st.integers(0, 1), max_size=4).map(bytes))
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        return st.integers(-1, 6)
    if kind in (None, NoneType):
        return st.none()
    parts = get_args(kind)
    if get_origin(kind) is UnionType:
        return st.one_of(*map(values, parts))
    if parts[-1] is Ellipsis or get_origin(kind) is list:
        return st.lists(values(parts[0]), max_size=3).map(tuple)
    return st.tuples(*map(values, parts))


def packed() -> st.SearchStrategy[tuple[Any, ...]]:
    """Parameters of the right types: the default or any, field by field."""
    ordinary = astuple(SamplingParams(max_new_tokens=3))
    fields = [
        st.one_of(st.just(default), st.just(default), st.just(default), values(kind))
        for default, kind in zip(ordinary, PARAMS.values(), strict=True)
    ]
    return st.tuples(*fields)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    cls = draw(st.sampled_from([*TYPES, Submit, Submit]))
    fields = []
    for kind in field_types(cls).values():
        mostly = st.sampled_from([values(kind)] * 30 + [ANY])
        fields.append(draw(draw(mostly)))
    name = draw(
        st.sampled_from([*NAMES, *(["scheduler", "balancer"] * 3 if cls is Submit else [])])
    )
    head: bytes = msgpack.packb(name)
    return head + bytes(msgpack.packb((TYPES[cls], *fields)))


async def survives(rogues: list[bytes]) -> ActorSystem:
    """A request of an HTTP worker's is served after all these."""
    keys = CurveKeys.make()
    system = leader(keys)
    worker = ActorSystem(1, TransportSettings("tcp://127.0.0.1:*", keys))
    rid = (1 << FRONTEND_SHIFT) + 1000
    sink = Sink("detokenizer", rid)
    for actor in (sink, Sink("watchdog"), Sink("frontend"), Sink("tokenizer")):
        worker.add(actor)
    tasks = [asyncio.ensure_future(s.run()) for s in (system, worker)]
    submit = Submit(rid, i32([3, 4, 5]), SamplingParams(max_new_tokens=4, ignore_eos=True))
    with raw(system.address, keys) as sock:
        for name, msg in (
            ("watchdog", Hello(endpoint=1, contract=CONTRACT, node=0, address=worker.address)),
            ("", None),
            ("scheduler", submit),
        ):
            if msg is None:
                for rogue in rogues:
                    sock.send(rogue)
            else:
                sock.send(bytes(msgpack.packb(name)) + encode(msg))
        await asyncio.wait((sink.ended, *tasks), timeout=20, return_when=asyncio.FIRST_COMPLETED)
    over = system.over
    for each in (system, worker):
        each.stop()
    await asyncio.gather(*tasks)  # what ended one of them is raised
    assert not over
    end = sink.ended.result()
    assert (end.reason, end.num_tokens) == (FinishReason.LENGTH, 4)
    return system


@settings(
    max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(st.lists(frames(), max_size=30))
def test_nothing_that_a_process_with_the_keys_sends_ends_the_leader(rogues: list[bytes]) -> None:
    uvloop.run(survives(rogues))


def test_each_kind_of_senseless_request_is_dropped_and_counted() -> None:
    good = SamplingParams(max_new_tokens=3)
    rid = (1 << FRONTEND_SHIFT) + 7

    def submit(prompt: Any = i32([1]), more: Any = None, **changes: Any) -> bytes:  # noqa: B008
        params = {**{f: getattr(good, f) for f in PARAMS}, **changes}
        msg = replace(Submit(rid, prompt, SamplingParams(**params)), **(more or {}))
        return bytes(msgpack.packb("scheduler")) + encode(msg)

    bad = [
        submit(b"\0\0\0"), submit(array("f", [1])), submit(i32([VOCAB])), submit(i32([-1])), submit(i32([1] * MAX_LEN)),
        submit(max_new_tokens=None), submit(max_new_tokens=-1), submit(temperature=float("nan")),
        submit(temperature=-1.0), submit(top_k=-2), submit(seed=2**63), submit(logprobs=VOCAB + 1),
        submit(stop_token_ids=(VOCAB,)), submit(logit_bias=((-1, 1.0),)),
        submit(logit_bias=((1, float("inf")),)), submit(stop_sequences=((1,),)),
        submit(more={"outputs": i32([VOCAB])}), submit(more={"outputs": i64([1])}),
        submit(more={"outputs": i32([1] * MAX_LEN)}), submit(more={"imports": True}),
        submit(grammar=("prose", "")), submit(top_p="x"), submit(stop=(1,)), submit(ignore_eos=1),
    ]  # fmt: skip
    system = uvloop.run(survives(bad))
    assert system.foreign_frames == len(bad)
