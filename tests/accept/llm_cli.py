"""The ``llm`` command against BASE_URL and MODEL, as a shell user has it; exits 1 on a failure.

Run by the Python that has ``llm``. Its settings, logs and three models (chat, completions,
responses) live in a folder that is deleted at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

MODELS = {
    "chat": {"supports_schema": True},
    "text": {"completion": True},
    "resp": {"responses": True},
}
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "good": {"type": "boolean"}},
    "required": ["age", "good"],
    "additionalProperties": False,
}


class Shell:
    """``llm`` with a folder of its own."""

    def __init__(self, folder: Path) -> None:
        entries = [
            {
                "model_id": name,
                "model_name": os.environ["MODEL"],
                "api_base": os.environ["BASE_URL"],
            }
            | more
            for name, more in MODELS.items()
        ]
        # JSON is YAML too
        (folder / "extra-openai-models.yaml").write_text(json.dumps(entries))
        self._environ = os.environ | {"LLM_USER_PATH": str(folder)}

    def __call__(self, *args: str) -> str:
        """What it prints; raises CalledProcessError."""
        return subprocess.run(
            [sys.executable, "-m", "llm", *args],
            env=self._environ, check=True, text=True, capture_output=True, timeout=120,
        ).stdout.strip()  # fmt: skip

    def same(self, model: str, *args: str) -> str:
        """The answer at temperature 0, which a stream must bring too."""
        options = ("-m", model, "-o", "temperature", "0", *args)
        whole, streamed = self(*options, "--no-stream"), self(*options)
        assert whole, "an empty answer"
        assert streamed == whole, (streamed, whole)
        return whole

    def logged(self) -> str:
        usage = json.loads(self("logs", "list", "-n", "1", "--json"))[0]
        assert usage["input_tokens"] > 0, usage
        assert usage["output_tokens"] > 0, usage
        return f"{usage['input_tokens']} in, {usage['output_tokens']} out"

    def schema(self) -> str:
        """Closed: under an open one, as ``llm`` makes of "age int, good bool", this model adds
        properties without end."""
        text = self("-m", "chat", "-o", "max_tokens", "200", "-o", "temperature", "0",
                    "--schema", json.dumps(SCHEMA), "Invent a dog")  # fmt: skip
        assert set(json.loads(text)) == {"age", "good"}, text
        return text


def checks(llm: Shell) -> dict[str, Callable[[], str]]:
    short = ("-o", "max_tokens", "12")
    return {
        "models": lambda: llm("models", "list", "-m", "chat"),
        "chat": lambda: llm.same("chat", *short, "Hi"),
        "usage of a stream": llm.logged,
        "system prompt": lambda: llm.same("chat", *short, "-s", "Answer in French", "Hi"),
        "conversation": lambda: llm("-m", "chat", *short, "-c", "And who are you?"),
        "schema": llm.schema,
        "completion": lambda: llm.same("text", *short, "One, two,"),
        "responses": lambda: llm.same("resp", "-o", "max_tokens", "16", "Hi"),
    }


failed = 0
with tempfile.TemporaryDirectory() as scratch:
    for name, run in checks(Shell(Path(scratch))).items():
        try:
            line = f"PASS {name} {run()}"
        except subprocess.CalledProcessError as error:
            line = f"FAIL {name} {error.stderr}"
        except Exception as error:
            line = f"FAIL {name} {type(error).__name__} {error}"
        failed += line.startswith("FAIL")
        sys.stdout.write(line.replace("\n", " ")[:200] + "\n")
        sys.stdout.flush()
sys.stdout.write(f"{failed} failed\n")
sys.exit(failed > 0)
