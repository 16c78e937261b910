"""LazyLLM takes asyncllm for LightLLM: ``lazyllm_client.py PYTHON``; exits 1 if a check fails.

It makes the command that would start LightLLM, whose options PYTHON's asyncllm must take, and asks
the server at ROOT_URL, which has such options, as it would ask LightLLM.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading

import lazyllm
from checks import agree, run_all

ROOT, MODEL_DIR = os.environ["ROOT_URL"], os.environ["MODEL_DIR"]
PROMPT = "The capital of France is"


def starts() -> str:
    command = lazyllm.deploy.lightllm().cmd(MODEL_DIR, MODEL_DIR).cmd()
    _, _, options = command.partition("api_server ")
    ran = subprocess.run(
        [sys.argv[1], "-m", "asyncllm", "--check", *shlex.split(options)],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    agree((ran.returncode, "rror" in ran.stderr), (0, False))
    return f"{len(shlex.split(options))} words"


def ask(prompt: str, *, stream: bool = False, **parameters: object) -> str:
    made = lazyllm.TrainableModule(MODEL_DIR, stream=stream)
    made.deploy_method(lazyllm.deploy.lightllm, url=f"{ROOT}/generate")
    return made.start()(prompt, parameters=parameters)


def asks() -> str:
    text = ask(PROMPT, max_new_tokens=8)
    agree(bool(text.strip()), True)
    return repr(text)


def streams() -> str:
    agree(ask(PROMPT, stream=True, max_new_tokens=8), ask(PROMPT, max_new_tokens=8))
    return "as without"


def stops() -> str:
    whole = ask(PROMPT, max_new_tokens=24)
    stop = whole[5:9]
    agree(ask(PROMPT, max_new_tokens=24, stop_sequences=[stop]), whole.partition(stop)[0])
    return repr(stop)


def is_refused() -> str:
    """It wants 8192 new tokens unless it is told otherwise, which this model's context has not."""
    try:
        ask(PROMPT)
    except Exception as error:
        agree("maximum context length is 8192 tokens" in str(error), True)
        return "8192 new tokens"
    raise ValueError("8192 new tokens were allowed")


def together() -> str:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(ask(PROMPT, max_new_tokens=4)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    agree((len(found), len(set(found))), (4, 1))
    return "4 at once"


run_all({check.__name__: check for check in (starts, asks, streams, stops, is_refused, together)})
