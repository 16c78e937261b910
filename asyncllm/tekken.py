"""Loads Mistral's tekken.json, a list of byte strings by rank, as a fast (Rust) BPE tokenizer.

Files that list no special tokens get the ones that Mistral used at that time.
"""

from __future__ import annotations

import binascii
import json
from base64 import b64decode
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from asyncllm.errors import StartupError

NAMED: Final = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
# for files older than the field special_tokens, in order
_FIRST_SPECIAL: Final = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] "
    "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
)


def read_tekken(file: Path) -> Tokenizer:
    """The tokenizer of a tekken.json; special tokens come first.

    Raises:
        StartupError: not such a file.
    """
    try:
        content = json.loads(file.read_bytes())
        config = content["config"]
        pattern, num_special = str(config["pattern"]), int(config["default_num_special_tokens"])
        num_ranks = int(config["default_vocab_size"]) - num_special
        ranked = [
            b64decode(entry["token_bytes"], validate=True) for entry in content["vocab"][:num_ranks]
        ]
        special = _special(content.get("special_tokens"), num_special)
        if len(set(ranked)) != len(ranked):
            raise ValueError("two tokens have the same bytes")
        return _tokenizer(pattern, ranked, special)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise StartupError(f"{file} is not a tekken tokenizer: {error!r:.200}") from error


def byte_characters() -> dict[int, str]:
    """The character that stands for each byte in byte-level BPE.

    Printable Latin-1 stands for itself, the other 68 bytes for U+0100 and on, in order (GPT-2).
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {byte: chr(byte) for byte in own} | {b: chr(0x100 + i) for i, b in enumerate(others)}


def _special(listed: list[dict[str, object]] | None, num: int) -> list[str]:
    """All special tokens; unnamed ranks get a name made of their number."""
    if listed is None:
        named = dict(enumerate(_FIRST_SPECIAL.split()))
    else:
        named = {int(str(entry["rank"])): str(entry["token_str"]) for entry in listed}
    if any(not 0 <= rank < num for rank in named):
        raise ValueError(f"a special token has a rank that is not below {num}")
    return [named.get(rank, f"<SPECIAL_{rank}>") for rank in range(num)]


def _tokenizer(pattern: str, ranked: list[bytes], special: list[str]) -> Tokenizer:
    characters = byte_characters()
    spelt = {token: "".join(characters[byte] for byte in token) for token in ranked}
    vocab = {text: rank for rank, text in enumerate(special)}
    vocab |= {spelt[token]: len(special) + i for i, token in enumerate(ranked)}
    rank_of = {token: i for i, token in enumerate(ranked)}
    merges: list[tuple[str, str]] = []
    for token in ranked:
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        halves = [(a, b) for a, b in halves if a in rank_of and b in rank_of]
        halves.sort(key=lambda pair: (rank_of[pair[0]], rank_of[pair[1]]))
        merges += ((spelt[a], spelt[b]) for a, b in halves)
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    return tokenizer
