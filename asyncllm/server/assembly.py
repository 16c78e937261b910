"""Creates the actors of a process from what it has loaded."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import fields, replace

from asyncllm import __version__
from asyncllm.actors.access import Access
from asyncllm.actors.agent import Agent
from asyncllm.actors.allocator import Allocator
from asyncllm.actors.balancer import Balancer
from asyncllm.actors.base import AnyActor
from asyncllm.actors.channel import Channel
from asyncllm.actors.config_client import ConfigServerClient
from asyncllm.actors.detokenizer import Detokenizer
from asyncllm.actors.director import Director
from asyncllm.actors.frontend import Frontend
from asyncllm.actors.frontend_settings import ClusterSettings, FrontendLimits, mark_of
from asyncllm.actors.grammar import GrammarCompiler
from asyncllm.actors.lockstep import Lockstep
from asyncllm.actors.renderer import TemplateRenderer
from asyncllm.actors.runner import Runner
from asyncllm.actors.scheduler import Scheduler
from asyncllm.actors.tokenizer import Tokenizer
from asyncllm.actors.transport import netloc
from asyncllm.actors.watchdog import Watchdog
from asyncllm.actors.watchdog_settings import WatchdogConfig, WatchdogHooks
from asyncllm.api.common.answer import Vocab
from asyncllm.api.common.defaults import Defaults
from asyncllm.api.common.request import ServedModel
from asyncllm.config import FLAGS, roles
from asyncllm.core.pacing import Pacer
from asyncllm.core.scheduling import SchedulerCore
from asyncllm.core.speculation import Speculation
from asyncllm.engine.jit_monitor import JitMonitor
from asyncllm.environment import cpu_count
from asyncllm.messages import AnnounceMaster
from asyncllm.server.cluster import cluster_port, config_server_of, master_of
from asyncllm.server.launch import Boot, tls_context
from asyncllm.server.loading import Loaded, most_rows
from asyncllm.server.transfer import make_transfer
from asyncllm.topology import KV_TRANSFER

TGI_NAMES = ("tgi", "dummy")  # what clients of text-generation-inference call any model
MOST_MASK_THREADS = 4  # one is enough for usual loads; a model on a CPU needs the cores itself


def _reader(boot: Boot) -> str:
    """The actor that gets a leader's output."""
    return "agent" if boot.config.run_mode in roles.NODES else "detokenizer"


def _asks(boot: Boot) -> str:
    """The actor that requests grammars."""
    return "agent" if boot.config.run_mode in roles.NODES else "tokenizer"


def make_allocator(p: Loaded) -> AnyActor:
    return Allocator(
        p.num_slots.full,
        use_tree=not p.boot.config.disable_dynamic_prompt_cache,
        window=p.window,
        num_sliding=p.num_slots.sliding,
        shared_prefixes=p.device is not None and p.device.engine.sharing.costs is not None,
    )


def make_scheduler(p: Loaded) -> AnyActor:
    resolved = p.boot.resolved
    assert p.constraints is not None
    transfers = [rank.id for rank in p.boot.group if KV_TRANSFER in rank.roles]
    core = SchedulerCore(
        num_lanes=resolved.running_max_req_size,
        num_slots=p.num_slots.full,
        batch_max_tokens=resolved.batch_max_tokens,
        chunked_prefill_size=resolved.chunked_prefill_size,
        eos_ids=resolved.eos_ids,
        share_prompts=p.boot.config.diverse_mode,
        window=p.window,
        num_sliding=p.num_slots.sliding,
        num_ranks=len(transfers),
        speculation=_speculation(p),
        constraint_s=p.boot.config.constraint_time_limit,
    )
    return Scheduler(
        core,
        runners=[rank.id for rank in p.boot.group],
        vocab_size=p.spec.vocab_size,
        max_len=resolved.max_req_total_len,
        pacer=Pacer(p.times, p.boot.config.prefill_share),
        reader=_reader(p.boot),
        transfers=transfers,
        workers=max(1, min(MOST_MASK_THREADS, cpu_count() // 4)),
        balanced=len(p.boot.topology.groups) > 1,
        in_step=p.boot.topology.in_step,
        constrain=p.constraints.of,
    )


def _speculation(p: Loaded) -> Speculation | None:
    if p.boot.config.speculative == "none":
        return None
    return Speculation(p.boot.config.speculative_tokens, most_rows(p.boot), p.times)


def make_balancer(p: Loaded) -> AnyActor:
    config = p.boot.config
    return Balancer(
        config.dp_balancer,
        num_slots=0 if config.disable_dynamic_prompt_cache else p.num_slots.full,
        together=config.diverse_mode,
        vocab_size=p.spec.vocab_size,
        max_len=p.boot.resolved.max_req_total_len,
    )


def make_runner(p: Loaded) -> AnyActor:
    assert p.device is not None
    monitor, sharing = JitMonitor(), p.device.engine.sharing
    if p.boot.resolved.device == "cuda":
        monitor.arm()
    leads = p.boot.topology.leads(p.boot.endpoint)
    return Runner(
        p.device,
        reports=leads,
        jit_after_warmup=lambda: monitor.count,
        kv_reads_saved=lambda: sharing.saved,
        transfers=p.boot.config.run_mode == roles.PREFILL,
    )


def make_kv_transfer(p: Loaded) -> AnyActor:
    assert p.device is not None
    return make_transfer(p.boot, p.spec, p.device.engine, p.listener)


def make_detokenizer(p: Loaded) -> AnyActor:
    assert p.text is not None
    return Detokenizer(p.text)


def make_tokenizer(p: Loaded) -> AnyActor:
    assert p.text is not None
    assert p.chats is not None
    resolved = p.boot.resolved
    most_new = resolved.generation_config.get("max_new_tokens")
    assert most_new is None or isinstance(most_new, int), most_new
    return Tokenizer(
        p.text,
        TemplateRenderer(p.chats),
        limit=resolved.max_req_total_len,
        vocab_size=p.spec.vocab_size,
        input_limit=resolved.max_req_input_len,
        most_new=most_new,
        truncation=p.boot.config.long_truncation_mode,
        heals=p.boot.config.token_healing_mode,
    )


def make_director(p: Loaded, channel: Channel) -> AnyActor:
    config = p.boot.config
    return Director(
        channel,
        config.select_p_d_node_strategy,
        counts=roles.counts(config.pd_master_mode),
        vocab_size=p.spec.vocab_size,
    )


def make_agent(p: Loaded, channel: Channel) -> AnyActor:
    return Agent(
        channel,
        [] if roles.asks_config_server(p.boot.config) else [master_of(p.boot.config)],
        vocab_size=p.spec.vocab_size,
        max_len=p.boot.resolved.max_req_total_len,
    )


def make_config_client(p: Loaded, channel: Channel) -> AnyActor:
    boot = p.boot
    announces = None
    if boot.config.run_mode == roles.MASTER:
        announces = AnnounceMaster(boot.cluster_host, channel.port)
    return ConfigServerClient(channel, config_server_of(boot.config), announces)


def _place_of(boot: Boot) -> ClusterSettings:
    """What the frontend needs to know about the cluster."""
    config = boot.config
    has_config_server = roles.asks_config_server(config)
    if config.run_mode == roles.MASTER:
        mark = mark_of(netloc(boot.cluster_host, config.port)) if has_config_server else ""
        port = cluster_port(config)
        return ClusterSettings(
            asks="director", cluster_port=port, has_config_server=has_config_server, mark=mark
        )
    if has_config_server:
        there = f"this is a {config.run_mode} node; requests go to a pd_master"
        return ClusterSettings(asks="agent", elsewhere=there, has_config_server=True)
    if config.run_mode in roles.NODES:
        host, port = master_of(config)
        there = f"this is a {config.run_mode} node; requests go to its pd_master at {host}:{port}"
        return ClusterSettings(asks="agent", elsewhere=there)
    return ClusterSettings()


def make_frontend(p: Loaded, on_open: Callable[[], None]) -> AnyActor:
    assert p.text is not None
    assert p.dialect is not None
    config, resolved, text = p.boot.config, p.boot.resolved, p.text
    pieces = text.pieces
    num_frontends = len(p.boot.topology.placed("frontend"))
    return Frontend(
        served=ServedModel(
            name=resolved.served_names[0],
            listed=resolved.served_names[:1] + config.served_model_name[1:],
            accepted=frozenset(
                (*resolved.served_names, *(TGI_NAMES if config.use_tgi_api else ()))
            ),
            model_name=resolved.model_name,
            max_len=resolved.max_req_total_len,
            vocab_size=p.spec.vocab_size,
            created=int(time.time()),
            tgi=config.use_tgi_api,
            completion_tokens=config.completions_default_max_tokens,
            dialect=p.dialect,
            defaults=Defaults(resolved.generation_config),
        ),
        vocab=Vocab(
            piece=lambda i: pieces[i] if i < len(pieces) else b"",
            decode=text.decode,
            spell=text.spell,
            special=text.special,
        ),
        sockets=[socket.socket(fileno=os.dup(p.boot.listen_fd))],
        limits=FrontendLimits(
            max_running=-(-resolved.running_max_req_size * config.dp // num_frontends),
            max_waiting=-(-config.max_waiting // num_frontends),
            max_body=resolved.max_body_size,
            max_header=config.max_header_size,
            max_headers=config.max_headers,
            idle_s=config.keep_alive_timeout,
            body_s=config.body_timeout,
            keep_alive_s=config.sse_keep_alive,
            native_keep_alive="sse_keep_alive" in config.explicit,
        ),
        access=Access(
            keys=config.api_key,
            origins=config.cors_allow_origins,
            tls=tls_context(config),
            proxies=config.trust_forwarded_for,
        ),
        info=_info(p),
        place=_place_of(p.boot),
        on_open=on_open,
    )


def _info(p: Loaded) -> dict[str, object]:
    """All resolved options except secret ones."""
    config, resolved = p.boot.config, p.boot.resolved
    values: dict[str, object] = {
        name: getattr(config, name) for name in FLAGS if not FLAGS[name].secret
    }
    known = {field.name for field in fields(resolved)}
    values |= {name: getattr(resolved, name) for name in values.keys() & known}
    num_slots = config.max_total_token_num or resolved.num_slots
    values |= {"eos_id": resolved.eos_ids, "max_total_token_num": num_slots}
    return values | {"version": __version__}


def _makers(
    on_open: Callable[[], None], channel: Channel | None
) -> dict[str, Callable[[Loaded], AnyActor]]:
    """The factory of each actor, by its name."""
    makers: dict[str, Callable[[Loaded], AnyActor]] = {
        "allocator": make_allocator,
        "grammar": lambda p: GrammarCompiler(p.grammars, asks=_asks(p.boot)),
        "scheduler": make_scheduler,
        "balancer": make_balancer,
        "lockstep": lambda _: Lockstep(),
        "runner": make_runner,
        "kv_transfer": make_kv_transfer,
        "detokenizer": make_detokenizer,
        "tokenizer": make_tokenizer,
        "frontend": lambda p: make_frontend(p, on_open),
    }
    if channel is not None:
        makers |= {
            "director": lambda p: make_director(p, channel),
            "agent": lambda p: make_agent(p, channel),
            "config_client": lambda p: make_config_client(p, channel),
        }
    return makers


def place(
    loaded: Loaded, hooks: WatchdogHooks, on_open: Callable[[], None], channel: Channel | None
) -> list[AnyActor]:
    """Create the actors of this process, in start order.

    Args:
        hooks: how the watchdog ends the process.
        on_open: called when this process starts serving HTTP.
        channel: to other servers, if the process has one.
    """
    boot = loaded.boot
    config, resolved = boot.config, boot.resolved
    makers = _makers(on_open, channel)
    made = {name: makers[name](loaded) for name in boot.me.actors if name != "watchdog"}
    runner = made.get("runner")
    for name in boot.topology.served_here(boot.endpoint):
        made[name].remote = frozenset()
    for actor in made.values() if not boot.coordinates else ():
        actor.remote = frozenset({*actor.remote, *actor.orders})
    watchdog_config = WatchdogConfig(
        contract=boot.contract,
        model_name=resolved.served_names[0],
        max_len=resolved.max_req_total_len,
        step_timeout_s=config.step_timeout,
        dead_after_s=config.dead_after,
        heartbeat_s=min(1.0, config.dead_after / 4),
        linears=loaded.linears,
    )
    if isinstance(runner, Runner):
        watchdog_config = replace(
            watchdog_config, busy_since=runner.busy_since, in_flight=runner.in_flight
        )
    return [*made.values(), Watchdog(watchdog_config, hooks)]
