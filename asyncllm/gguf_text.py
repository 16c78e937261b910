"""Converts the tokenizer of a GGUF file into the files of a Hugging Face folder.

Reads the tokenizer's metadata only, no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from asyncllm.errors import StartupError
from asyncllm.models.gguf import GgufFile, Meta

FileContent = dict[str, object]  # of a JSON file
T = TypeVar("T", str, int, float)

_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6  # kinds of tokens
_NAMES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
# end tokens of chat formats, besides the one that the file names
_ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>",
})  # fmt: skip

_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    return rf"{_SHORT}|{_BEFORE}\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased(digits: str, short: str = "") -> str:
    return (
        rf"{_BEFORE}{_UPPER}*{_LOWER}+{short}|{_BEFORE}{_UPPER}+{_LOWER}*{short}|"
        rf"\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


# tokenizer.ggml.pre -> how text is split before byte pairs are merged; "": GPT-2's way
_SPLITS = {
    "gpt-2": "",
    "smollm": "digits",
    "llama-bpe": _words("{1,3}"),
    "llama3": _words("{1,3}"),
    "llama-v3": _words("{1,3}"),
    "dbrx": _words("{1,3}"),
    "qwen2": _words(""),
    "deepseek-r1-qwen": _words(""),
    "tekken": _cased(""),
    "gpt-4o": _cased("{1,3}", f"{_SHORT}?"),
}
_WHOLE = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})  # keep words that are tokens
_WITH_BOS = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})  # if the file does not say


def tokenizer_files(file: GgufFile) -> dict[str, FileContent]:
    """Contents of tokenizer.json, tokenizer_config.json and generation_config.json.

    Raises:
        StartupError: the file has no tokenizer, or an unsupported kind.
    """
    meta = file.meta
    tokens, kinds = _tokens(file)
    model = meta.get("tokenizer.ggml.model")
    if model == "gpt2":
        made = _byte_pairs(file, tokens)
        with_bos = meta.get("tokenizer.ggml.pre") in _WITH_BOS
    elif model == "llama":
        made, with_bos = _sentencepiece(file, tokens, kinds), True
    else:
        raise StartupError(
            f"{file.path}: tokenizer.ggml.model {str(model)[:100]!r} is not supported; "
            f"only gpt2 and llama"
        )
    made["added_tokens"] = [
        _added(token, text, special=kind == _CONTROL)
        for token, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER)
    ]
    ids = {name: _id(file, key, len(tokens)) for name, key in _NAMES.items()}
    config: FileContent = {
        # no model-specific class of transformers: those rebuild parts of the file
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
        "add_bos_token": bool(meta.get("tokenizer.ggml.add_bos_token", with_bos)),
        "clean_up_tokenization_spaces": False,
    }
    if templates := _templates(meta):
        config["chat_template"] = templates
    ends = [ids["eos"], _id(file, "eot", len(tokens))]
    ends += [i for i, text in enumerate(tokens) if text in _ENDS and kinds[i] in (_CONTROL, _USER)]
    generation: FileContent = {
        "eos_token_id": list(dict.fromkeys(i for i in ends if i is not None)),
        **{f"{name}_token_id": ids[name] for name in ("bos", "pad") if ids[name] is not None},
    }
    made |= {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    return {
        "tokenizer.json": made,
        "tokenizer_config.json": config,
        "generation_config.json": generation,
    }


def _templates(meta: Meta) -> list[FileContent]:
    """The default and the named chat templates, as tokenizer_config.json lists them."""
    key = "tokenizer.chat_template"
    found = {"default": meta.get(key)}
    found |= {n.removeprefix(f"{key}."): t for n, t in meta.items() if n.startswith(f"{key}.")}
    return [{"name": name, "template": t} for name, t in found.items() if isinstance(t, str)]


def _tokens(file: GgufFile) -> tuple[list[str], list[int]]:
    tokens = _list(file, "tokens", str)
    if not tokens:
        raise StartupError(f"{file.path} has no list of tokens (tokenizer.ggml.tokens)")
    kinds = _list(file, "token_type", int) or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise StartupError(f"{file.path}: tokenizer.ggml.token_type does not fit the tokens")
    return tokens, kinds


def _list(file: GgufFile, key: str, kind: type[T]) -> list[T]:
    """The list at ``key``; empty if it is missing or has values of another type."""
    found = file.meta.get(f"tokenizer.ggml.{key}")
    if isinstance(found, list) and all(type(each) is kind for each in found):
        return found
    return []


def _id(file: GgufFile, key: str, size: int) -> int | None:
    found = file.meta.get(f"tokenizer.ggml.{key}_token_id")
    if found is None or found == 0xFFFFFFFF:
        return None
    if type(found) is not int or not 0 <= found < size:
        raise StartupError(
            f"{file.path}: tokenizer.ggml.{key}_token_id {str(found)[:100]} is not one of {size:,} "
            f"tokens"
        )
    return found


def _added(token: int, text: str, *, special: bool) -> FileContent:
    return {
        "id": token,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _model(tokens: Sequence[str], merges: Sequence[str], **options: object) -> FileContent:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": {text: token for token, text in enumerate(tokens)},
        "merges": merges,
    }


def _byte_pairs(file: GgufFile, tokens: list[str]) -> FileContent:
    """Byte-level BPE; "smollm" first splits digits one by one."""
    pre = file.meta.get("tokenizer.ggml.pre")
    if pre not in _SPLITS:
        raise StartupError(
            f"{file.path}: tokenizer.ggml.pre {str(pre)[:100]!r} is not supported; "
            f"{', '.join(_SPLITS)} are"
        )
    if not (merges := _list(file, "merges", str)):
        raise StartupError(f"{file.path} has no merges of byte pairs (tokenizer.ggml.merges)")
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "add_prefix_space": False}
    first: list[FileContent] = []
    if _SPLITS[pre] == "digits":
        first = [{"type": "Digits", "individual_digits": True}]
    elif _SPLITS[pre]:
        pattern = {"Regex": _SPLITS[pre]}
        first = [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}]
    by_regex = _SPLITS[pre] in ("", "digits")
    return {
        "normalizer": {"type": "NFC"} if pre in ("qwen2", "deepseek-r1-qwen") else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*first, {**byte_level, "use_regex": by_regex}],
        },
        "decoder": {**byte_level, "use_regex": True},
        "model": _model(tokens, merges, ignore_merges=pre in _WHOLE),
    }


def _sentencepiece(file: GgufFile, tokens: list[str], kinds: list[int]) -> FileContent:
    """SentencePiece's BPE, whose merges are derived from the scores of its tokens."""
    scores = _list(file, "scores", float)
    if len(scores) != len(tokens):
        raise StartupError(f"{file.path}: tokenizer.ggml.scores do not fit the tokens")
    prefix = bool(file.meta.get("tokenizer.ggml.add_space_prefix", True))
    unknown = [text for text, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    before = [{"type": "Prepend", "prepend": "\u2581"}] if prefix else []
    behind = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, space]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *behind],
        },
        "model": _model(
            tokens,
            [f"{left} {right}" for left, right in _merges(tokens, kinds, scores)],
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=_BYTE in kinds,
        ),
    }


def _merges(tokens: list[str], kinds: list[int], scores: list[float]) -> Iterator[tuple[str, str]]:
    """Pairs of tokens that merge into a token, the best-scored token first."""
    ids = {text: i for i, text in enumerate(tokens) if kinds[i] not in (_CONTROL, _BYTE, _UNKNOWN)}
    for text in sorted(ids, key=lambda text: (-scores[ids[text]], ids[text])):
        cuts = ((text[:at], text[at:]) for at in range(1, len(text)))
        pairs = [pair for pair in cuts if pair[0] in ids and pair[1] in ids]
        yield from sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
