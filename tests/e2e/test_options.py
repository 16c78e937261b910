"""Each option of LightLLM's reference that works here, observed on a server started with it.

Three servers on a tiny model show all of them. It is a table: its only input is the last token, and
``NEXT`` says which comes then, so that every answer is known.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from asyncllm.environment import memory_available
from tests.e2e.process import Server, free_port

# the options of the reference, in its order
NAMES = [
    "run_mode", "host", "port", "httpserver_workers",
    "zmq_mode", "pd_master_ip", "pd_master_port", "pd_decode_rpyc_port",
    "config_server_host", "config_server_port", "model_name", "model_dir",
    "tokenizer_mode", "load_way", "trust_remote_code", "max_total_token_num",
    "mem_fraction", "batch_max_tokens", "running_max_req_size", "max_req_total_len",
    "eos_id", "tool_call_parser", "nnodes", "node_rank",
    "multinode_httpmanager_port", "multinode_router_gloo_port", "tp", "dp",
    "nccl_host", "nccl_port", "use_config_server_to_init_nccl", "mode",
]  # fmt: skip

CALLS = {
    "q": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    "l": '{"name": "f", "parameters": {}}',
    "m": '[TOOL_CALLS] [{"name": "f", "arguments": {}}]',
}  # by the letter behind which the model writes it, as one token; then it ends
LETTERS = "abcdefghij"  # each is followed by the next one
END = 301
WORDS = '''
from transformers import PreTrainedTokenizer

class Words(PreTrainedTokenizer):
    """A token for each word, whatever it is."""
    def __init__(self, **more):
        self.words = {word: i for i, word in enumerate(VOCAB)}
        self.texts = VOCAB
        super().__init__(**more)
    vocab_size = property(lambda self: len(self.words))
    def get_vocab(self): return {**self.words, **self.added_tokens_encoder}
    def _tokenize(self, text, **more): return text.split()
    def _convert_token_to_id(self, token): return self.words.get(token, 0)
    def _convert_id_to_token(self, index): return self.texts[index]
    def convert_tokens_to_string(self, tokens): return "".join(tokens)
    def save_vocabulary(self, folder, prefix=None): return ()
'''


# -- the model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(tiny_dir, tmp_path_factory.mktemp("options") / "table"))
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    for i, text in enumerate(CALLS.values()):
        del vocab[f"w{256 + i}"]
        vocab[text.replace(" ", "Ġ").replace("\n", "Ċ")] = 256 + i
    path.write_text(json.dumps(content))
    template = "{% for m in messages %} {{ m.content }}{% endfor %}"
    tokenizer_config = {"eos_token": "<|end_of_text|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    write_table(folder, {letter: 256 + i for i, letter in enumerate(CALLS)})
    return folder


def write_table(folder: Path, called: dict[str, int]) -> None:
    """Layers that add nothing, and an output matrix that knows what follows each token."""
    ids = letter_ids(folder)
    follows = {ids[a]: ids[b] for a, b in zip(LETTERS, LETTERS[1:] + LETTERS[0], strict=True)}
    follows |= {ids[letter]: token for letter, token in called.items()}
    follows |= dict.fromkeys(called.values(), END)
    for path in folder.glob("model-0*.safetensors"):
        layers = load_file(path)
        zeroed = {n: t * 0 for n, t in layers.items() if "o_proj" in n or "down_proj" in n}
        save_file(layers | zeroed, path)
    path = folder / "model-embed.safetensors"
    ends = load_file(path)
    embed = torch.randn(ends["lm_head.weight"].shape, generator=torch.Generator().manual_seed(1))
    head = torch.zeros_like(embed)
    for token, following in follows.items():
        head[following] += embed[token]
    dtype = ends["lm_head.weight"].dtype
    save_file(
        ends | {"model.embed_tokens.weight": embed.to(dtype), "lm_head.weight": head.to(dtype)},
        path,
    )


def letter_ids(folder: Path) -> dict[str, int]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return {letter: tokenizer.token_to_id(letter) for letter in LETTERS + "".join(CALLS)}


@pytest.fixture(scope="module")
def words_dir(table_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a second tokenizer, in Python of its own; both are in the folder."""
    folder = Path(shutil.copytree(table_dir, tmp_path_factory.mktemp("options") / "words"))
    config = {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": ["words.Words", None]}}
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    texts = [f"w{i}" for i in range(300)]
    for letter, token in letter_ids(folder).items():
        texts[token] = letter
    texts[256 : 256 + len(CALLS)] = CALLS.values()
    (folder / "words.py").write_text(f"VOCAB = {texts!r}\n{WORDS}")
    return folder


# -- the servers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def servers(
    table_dir: Path, words_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Server]]:
    """By name; started one after the other, since they share two cores."""
    logs, ids = tmp_path_factory.mktemp("logs"), letter_ids(table_dir)
    common = ("--device", "cpu", "--running_max_req_size")
    one = Server(
        table_dir, logs / "one", *common, "2", "--host", "127.0.0.2", "--httpserver_workers", "2",
        "--zmq_mode", "tcp://", "--model_name", "chosen", "--tokenizer_mode", "fast",
        "--load_way", "HF", "--max_total_token_num", "1100", "--batch_max_tokens", "16",
        "--max_req_total_len", "1000", "--eos_id", str(ids["d"]), str(ids["h"]), str(END),
        "--control_tokens_in_content", "token",
        "--tool_call_parser", "llama3", "--mode", "ppl_int8kv", "--mode", "triton_flashdecoding",
    )  # fmt: skip
    one.url = f"http://127.0.0.2:{one.port}"
    with one:
        two = Server(
            words_dir, logs / "two", *common, "8", "--host", "::1", "--tp", "2",
            "--nccl_host", "127.0.0.3", "--nccl_port", str(free_port()),
            "--zmq_mode", "ipc:///tmp/", "--tokenizer_mode", "auto",
            "--max_total_token_num", "4096", "--tool_call_parser", "qwen25",
            "--mode", "triton_fp8kv", "triton_gqa_attention", "--llm_kv_type", "fp8kv",
        )  # fmt: skip
        two.url = f"http://[::1]:{two.port}"
        with two:
            three = Server(
                words_dir, logs / "three", *common, "8", "--tokenizer_mode", "slow",
                "--trust_remote_code", "--mem_fraction", "0.004", "--tool_call_parser", "mistral",
                "--mode", "triton_gqa_flashdecoding", "--llm_kv_type", "int8kv",
                "--tp", "2", "--dp", "2",
            )  # fmt: skip
            with three:
                yield {"one": one, "two": two, "three": three}


# -- what shows --------------------------------------------------------------------------------------


def listens_on(host: str) -> Callable[[Server], None]:
    def check(server: Server) -> None:
        assert (host, server.port) in server.listeners()
        assert {h for h, port in server.listeners() if port == server.port} == {host}
        assert json.loads(server.get("/liveness")) == {"status": "ok"}

    return check


def two_serve(server: Server) -> None:
    """The other process serves while rank 0 is stopped."""
    assert len(server.children()) == 1
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        assert json.loads(server.get("/liveness")) == {"status": "ok"}
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


def talks_over(folder: bool) -> Callable[[Server], None]:
    def check(server: Server) -> None:
        assert bool(list(Path("/tmp").glob(f"asyncllm-{server.process.pid}-*"))) == folder
        if not folder:  # HTTP's, and one of each process
            assert len(server.listeners()) == 3

    return check


def is_named(name: str) -> Callable[[Server], None]:
    def check(server: Server) -> None:
        assert json.loads(server.get("/get_model_name")) == {"model_name": name}
        assert server.post("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 1})

    return check


def serves_the_folder(server: Server) -> None:
    """Its name, its vocabulary, its weights."""
    ids = [model["id"] for model in json.loads(server.get("/v1/models"))["data"]]
    assert ids == ["words"]
    assert says(server, "e", 4) == ("fghi", "length")
    assert "size 320" in refusal(server, {"prompt": [320], "max_tokens": 1})


def says(server: Server, prompt: str, max_tokens: int) -> tuple[str, str]:
    choice = server.complete_text(prompt, max_tokens)["choices"][0]
    return choice["text"], choice["finish_reason"]


def counts(text: str, num_tokens: int) -> Callable[[Server], None]:
    def check(server: Server) -> None:
        assert server.post("/tokens", {"text": text}) == {"ntokens": num_tokens}

    return check


def loads_hf(server: Server) -> None:
    assert says(server, "a", 2) == ("bc", "length")


def has_slots(num: int) -> Callable[[Server], None]:
    return lambda server: same(server.metric("asyncllm_kv_slots_total"), num)


def same(got: object, wanted: object) -> None:
    assert got == wanted


def takes_its_share(server: Server) -> None:
    """K/V takes what weights and work space leave of it: 2 layers, K and V, 2 heads of 16 int8 and a
    scale."""
    share = 0.004 * memory_available()
    used = server.metric("asyncllm_kv_slots_total") * 2 * 2 * 2 * (16 + 2)
    assert 0.2 * share < used < 1.5 * share


def steps_take(num: int) -> Callable[[Server], None]:
    """A prompt of 100 tokens and one new one take so many steps."""

    def check(server: Server) -> None:
        before = server.metric("asyncllm_steps_total")
        server.post("/v1/completions", {"prompt": [300] + [5] * 99, "max_tokens": 1})
        assert server.metric("asyncllm_steps_total") - before == num

    return check


def runs_at_most_two(server: Server) -> None:
    """Six answers of 50 tokens take three times as many steps as one."""
    before = server.metric("asyncllm_steps_total")
    body = {"prompt": "x", "n": 6, "max_tokens": 50, "ignore_eos": True}
    assert len(server.post("/v1/completions", body)["choices"]) == 6
    assert server.metric("asyncllm_steps_total") - before >= 150


def holds_at_most_1000(server: Server) -> None:
    assert "limit 1000" in refusal(server, {"prompt": [5] * 950, "max_tokens": 51})
    body = {"prompt": [5] * 950, "max_tokens": 50, "ignore_eos": True}
    assert server.post("/v1/completions", body)["usage"]["completion_tokens"] == 50


def ends_at_d_and_h(server: Server) -> None:
    assert says(server, "a", 20) == ("bc", "stop")
    assert says(server, "e", 20) == ("fg", "stop")
    assert says(server, "i", 2) == ("ja", "length")


def parses_calls(letter: str) -> Callable[[Server], None]:
    """Of the three formats it is the only one that becomes a call and leaves no text."""

    def check(server: Server) -> None:
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        whole = []
        for other in CALLS:
            messages = [{"role": "user", "content": other}]
            body = {"messages": messages, "tools": tools, "temperature": 0, "max_tokens": 5}
            message = server.post("/v1/chat/completions", body)["choices"][0]["message"]
            called = [call["function"]["name"] for call in message.get("tool_calls") or []]
            assert called or message["content"] == CALLS[other]
            whole += [other] * (called == ["f"] and not message["content"])
        assert whole == [letter]

    return check


def has_two_ranks(server: Server) -> None:
    assert len(server.children()) == 1
    assert "rank1" in server.text(), "it logs as the second rank"
    assert says(server, "a", 5) == ("bcdef", "length")


def has_two_groups(server: Server) -> None:
    slots = [server.metric(f'asyncllm_group_kv_slots_total{{group="{i}"}}') for i in (0, 1)]
    assert slots[0] == slots[1] == server.metric("asyncllm_kv_slots_total") / 2


def ranks_meet(server: Server) -> None:
    given = [word for word in server.process.args if isinstance(word, str)]  # type: ignore[union-attr]
    port = int(given[given.index("--nccl_port") + 1])
    assert ("127.0.0.3", port) in server.listeners()


def keeps(slot: str, kernel: str) -> Callable[[Server], None]:
    """K/V of a token take so much on a rank, where float32 takes 512 bytes, two's 256; the kernel
    is a GPU's."""

    def check(server: Server) -> None:
        assert f" slots of {slot} KiB" in server.text()
        assert server.text().count(f"--mode {kernel} has no effect: it names a GPU kernel") == 1
        assert says(server, "a", 2) == ("bc", "length")

    return check


def refusal(server: Server, body: dict[str, object]) -> str:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post("/v1/completions", body)
    with caught.value as error:
        return error.read().decode()


# option -> where it was given, and what shows; all values that work are there
OBSERVED: dict[str, list[tuple[str, Callable[[Server], None]]]] = {
    "host": [("one", listens_on("127.0.0.2")), ("two", listens_on("::1"))],
    "port": [("three", listens_on("127.0.0.1"))],
    "httpserver_workers": [("one", two_serve)],
    "zmq_mode": [("one", talks_over(folder=False)), ("two", talks_over(folder=True))],
    "model_name": [("one", is_named("chosen"))],
    "model_dir": [("two", serves_the_folder)],
    # bytes are 5 tokens, words are 3
    "tokenizer_mode": [("one", counts("x y z", 5)), ("two", counts("x y z", 5)),
                       ("three", counts("x y z", 3))],
    "load_way": [("one", loads_hf)],
    "trust_remote_code": [("three", counts("unheard of", 2))],
    "max_total_token_num": [("one", has_slots(1100)), ("two", has_slots(4096))],
    "mem_fraction": [("three", takes_its_share)],
    "batch_max_tokens": [("one", steps_take(7)), ("two", steps_take(1))],
    "running_max_req_size": [("one", runs_at_most_two)],
    "max_req_total_len": [("one", holds_at_most_1000)],
    "eos_id": [("one", ends_at_d_and_h)],
    "tool_call_parser": [("one", parses_calls("l")), ("two", parses_calls("q")),
                         ("three", parses_calls("m"))],
    "tp": [("two", has_two_ranks)],
    "dp": [("three", has_two_groups)],
    "nccl_host": [("two", ranks_meet)],
    "nccl_port": [("two", ranks_meet)],
    # two layers, K and V, two heads of 16 bytes with a scale or two; two's ranks have one head each.
    # ppl_fp16, which does not read 8 bits, is given to a server of test_groups.py
    "mode": [("one", keeps("0.2", "triton_flashdecoding")),
             ("two", keeps("0.1", "triton_gqa_attention")),
             ("three", keeps("0.1", "triton_gqa_flashdecoding"))],
}  # fmt: skip

# these need two servers, which test_nodes.py starts with all of them
OF_NODES = ("nnodes", "node_rank", "multinode_httpmanager_port", "multinode_router_gloo_port")
# and these a cluster: test_cluster.py and test_config_server.py
OF_CLUSTERS = (
    "run_mode", "pd_master_ip", "pd_master_port", "pd_decode_rpyc_port", "config_server_host",
    "config_server_port", "use_config_server_to_init_nccl",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "server", "shows"),
    [(name, *seen) for name, places in OBSERVED.items() for seen in places],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_shows(
    name: str, server: str, shows: Callable[[Server], None], servers: dict[str, Server]
) -> None:
    shows(servers[server])


def test_the_ready_line_names_the_address(servers: dict[str, Server]) -> None:
    for server in servers.values():
        assert server.ready.startswith(f"asyncllm is ready: {server.url} serves ")


def test_what_users_spell_is_text_or_tokens(servers: dict[str, Server]) -> None:
    """--control_tokens_in_content: token, its default, and where it cannot be told apart."""

    def count(server: Server, content: str) -> int:
        body = {"messages": [{"role": "user", "content": content}]}
        return int(server.post("/v1/messages/count_tokens", body)["input_tokens"])

    mark = "<|end_of_text|>"
    one, two = (count(servers[name], mark) - count(servers[name], "") for name in ("one", "two"))
    assert (one, two) == (1, len(mark))
    assert "a slow tokenizer cannot tell control tokens from text" in servers["three"].text()


def test_code_of_a_folder_is_not_run_without_leave(words_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "asyncllm", "--model_dir", str(words_dir), "--device", "cpu",
         "--tokenizer_mode", "slow", "--port", str(free_port())],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "trust_remote_code" in done.stderr.splitlines()[-1]


def test_every_option_of_the_reference_that_works_is_observed() -> None:
    assert len(NAMES) == 32
    assert sorted([*OBSERVED, *OF_NODES, *OF_CLUSTERS]) == sorted(NAMES)
