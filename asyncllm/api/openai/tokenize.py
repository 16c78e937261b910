"""/tokenize and /detokenize as vLLM has them: ids of a text or of a chat's prompt, text of ids.

Knows bodies and answers; asks no tokenizer.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationInfo

from asyncllm.api.common.request import ModelName, Prompt, ServedModel, served_by
from asyncllm.api.common.request_model import (
    Checked,
    Integer,
    Items,
    Range,
    RequestModel,
    UnicodeStr,
    WithSpecialTokens,
    parse,
)
from asyncllm.api.common.validation import Body, preview, reject
from asyncllm.api.openai import request as openai


class TokenizeRequest(RequestModel):
    """The rest of a chat's fields are those of /v1/chat/completions."""

    model: ModelName = None
    prompt: UnicodeStr | None = Field(None, description="a text; or messages instead")
    messages: Items[Any] | None = Field(None, description="as of /v1/chat/completions")
    add_special_tokens: WithSpecialTokens = True
    return_token_strs: bool = Field(False, description="the text of each token too")


def _ids(value: object, info: ValidationInfo) -> array[int]:
    served = served_by(info)
    if not isinstance(value, list):
        reject(f"tokens must be an array, not {preview(value)}", "tokens")
    if len(value) > served.max_len:
        reject(
            f"tokens: {len(value)} ids, at most {served.max_len} (--max_req_total_len)", "tokens"
        )
    return served.ids_of(value, "tokens")


class DetokenizeRequest(RequestModel):
    model: ModelName = None
    tokens: Annotated[Sequence[int], Checked(_ids, list[Annotated[Integer, Range(0, None)]])] = (
        Field(description="token ids")
    )


@dataclass(frozen=True, slots=True)
class ToTokenize:
    """What /tokenize is asked: a prompt, and whether the text of each token is wanted too."""

    prompt: Prompt
    add_special_tokens: bool
    with_texts: bool


def tokenize(body: Body, served: ServedModel) -> ToTokenize:
    """A /tokenize body.

    Raises:
        RequestError: 400. ModelNotFound: 404.
    """
    asked = parse(TokenizeRequest, body, served)
    if (asked.prompt is None) == (asked.messages is None):
        reject("/tokenize takes a prompt, or messages", "prompt")
    if asked.prompt is not None:
        text = Prompt(text=asked.prompt)
        return ToTokenize(text, asked.add_special_tokens, asked.return_token_strs)
    names = (
        "messages", "tools", "add_generation_prompt", "continue_final_message",
        "chat_template_kwargs",
    )  # fmt: skip
    chat = openai.chat({name: body[name] for name in names if name in body}, served)
    return ToTokenize(chat.prompts[0], False, asked.return_token_strs)


def tokenized(ids: Sequence[int], texts: Sequence[str] | None, served: ServedModel) -> Any:
    """The answer of /tokenize."""
    return {
        "count": len(ids),
        "max_model_len": served.max_len,
        "tokens": list(ids),
        "token_strs": None if texts is None else list(texts),
    }


def detokenize(body: Body, served: ServedModel) -> Sequence[int]:
    """The ids. Raises RequestError (400), ModelNotFound (404)."""
    return parse(DetokenizeRequest, body, served).tokens
