"""A coding agent does what it is asked: ``coding_agent.py FOLDER NAME``, codex or claude-code

The model (scripted_model.py) calls the agent's shell once, which writes a file, then answers. FOLDER
is where npm has put the agent; it has a home of its own there, so that nobody's settings count.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import run_all

ROOT, MODEL = os.environ["ROOT_URL"], os.environ["MODEL"]
FILE, CONTENT = "made.txt", "finished"
ANSWER = "It is done as you asked."
ASKED = "Write a file for me."
CODEX = f"""
model = "{MODEL}"
model_provider = "local"
[model_providers.local]
name = "local"
base_url = "{ROOT}/v1"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
"""


def codex(folder: Path, home: Path) -> tuple[list[str], dict[str, str]]:
    (home / "config.toml").write_text(CODEX)
    flags = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    return [f"{folder}/node_modules/.bin/codex", "exec", *flags, ASKED], {"CODEX_HOME": str(home)}


def claude_code(folder: Path, home: Path) -> tuple[list[str], dict[str, str]]:
    names = {
        "ANTHROPIC_BASE_URL": ROOT,
        "ANTHROPIC_API_KEY": "any",
        "ANTHROPIC_MODEL": MODEL,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": MODEL,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }
    return [f"{folder}/node_modules/.bin/claude", "-p", ASKED, "--allowedTools", "Bash"], names


AGENTS = {"codex": codex, "claude-code": claude_code}


def does_it(folder: Path, name: str) -> str:
    """The file that the call writes is there, the answer is told, the exit code is 0."""
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as work:
        command, names = AGENTS[name](folder.resolve(), Path(home))
        ran = subprocess.run(
            command,
            cwd=work,
            env={**os.environ, "HOME": home, **names},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
        )
        made = Path(work) / FILE
        found = made.read_text().strip() if made.exists() else None
    if (ran.returncode, found) != (0, CONTENT) or ANSWER not in ran.stdout:
        raise ValueError(
            f"exit code {ran.returncode}, {FILE}: {found!r}: {ran.stdout[-400:]} {ran.stderr[-600:]}"
        )
    return f"{FILE} is written, the answer told, exit code 0"


if __name__ == "__main__":
    where, agent = Path(sys.argv[1]), sys.argv[2]
    run_all({f"{agent} does what it is asked": lambda: does_it(where, agent)})
