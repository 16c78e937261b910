"""The start page: models, links and a first command, as HTML, text or JSON.

Knows models and links; knows neither requests nor answers.
"""

from __future__ import annotations

import json
import shlex
from html import escape
from typing import Final

from asyncllm import __version__
from asyncllm.api.common.request import ServedModel

LINKS: Final = {
    "/docs": "try every route in the browser",
    "/openapi.json": "all routes, for tools",
    "/v1/models": "the models",
    "/metrics": "numbers, for Prometheus",
    "/health": "whether it takes requests",
}
_PAGE: Final = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>asyncllm: {name}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50em; margin: 3em auto; padding: 0 1em }}
pre {{ padding: 1em; overflow-x: auto; border: 1px solid #8888; border-radius: 4px }}
:root {{ color-scheme: light dark }}
</style>
<h1>{name}</h1>
<p>asyncllm {version} serves {models} with the APIs of OpenAI, Anthropic and LightLLM.</p>
<pre>{curl}</pre>
<ul>
{links}
</ul>
</html>
"""


def curl_line(url: str, name: str, *, secured: bool) -> str:
    """A command for a shell that streams an answer.

    Args:
        url: of the server, without a path.
        name: of the model.
        secured: a key must be sent.
    """
    message = {"role": "user", "content": "Why is the sky blue?"}
    body = {
        "model": name, "stream": True, "temperature": 0, "max_tokens": 100, "messages": [message]
    }  # fmt: skip
    key = " -H 'Authorization: Bearer KEY'" if secured else ""
    return (
        f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )


def page(served: ServedModel, url: str, *, secured: bool) -> str:
    """For a browser: one HTML page that needs nothing from elsewhere."""
    return _PAGE.format(
        name=escape(served.name),
        version=__version__,
        models=" and ".join(f"<code>{escape(name)}</code>" for name in served.listed),
        curl=escape(curl_line(url, served.name, secured=secured)),
        links="\n".join(
            f'<li><a href="{path}">{path}</a>: {what}</li>' for path, what in LINKS.items()
        ),
    )


def plain(served: ServedModel, url: str, *, secured: bool) -> str:
    """The same for a terminal."""
    links = "\n".join(f"{url}{path}  {what}" for path, what in LINKS.items())
    return (
        f"asyncllm {__version__} serves {' and '.join(served.listed)}\n\n"
        f"{curl_line(url, served.name, secured=secured)}\n\n{links}\n"
    )


def facts(served: ServedModel) -> dict[str, object]:
    """The same for a program."""
    return {
        "server": "asyncllm",
        "version": __version__,
        "models": list(served.listed),
        "links": list(LINKS),
    }
