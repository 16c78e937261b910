"""The model's tokenizer: encodes, decodes, and reads its files and chat templates.

The only module that knows the tokenizer's file formats and transformers; knows no requests.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tokenizers import AddedToken, Tokenizer

from asyncllm.control_tokens import LONGEST, MOST, ControlTokens
from asyncllm.core.detokenize import PieceTable, TextStream, WindowStream
from asyncllm.errors import StartupError, reason_of
from asyncllm.plain import Json, JsonObject, typed
from asyncllm.spm import read_sentencepiece
from asyncllm.tekken import NAMED, byte_characters, read_tekken

MOST_TOKENS = 1 << 20  # more than any model has
SENTENCEPIECE, TEKKEN = "tokenizer.model", "tekken.json"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger("asyncllm.text")
_ONLY_FAST = "--tokenizer_mode slow: the model only has a fast tokenizer; using that"

Mode = Literal["fast", "slow", "auto"]


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """A loaded tokenizer. Immutable; every method may be called from any thread.

    Attributes:
        tokenizer: the fast tokenizer, or None where only a slow one exists.
        pieces: bytes that each id contributes to the text; b"" for ids without a token.
        table: how pieces are joined; None: an unknown decoder, so windows are decoded instead.
        special: ids of special tokens, hidden by ``skip_special_tokens``.
        templates: chat templates by name; "default" is the usual one. Empty: not a chat model.
        special_tokens: text of bos_token, eos_token, ... as templates use them.
        bos_id, eos_id: None if the folder does not name one.
        vocab_size: highest id + 1; the model's own may be larger (padding).
        max_piece_chars: length of the longest token in characters.
        controls: control tokens to tell from merely spelled ones; None: not told apart.
    """

    tokenizer: Tokenizer | None
    pieces: list[bytes]
    table: PieceTable | None
    special: frozenset[int]
    templates: Mapping[str, str]
    special_tokens: Mapping[str, str]
    bos_id: int | None
    eos_id: int | None
    vocab_size: int
    max_piece_chars: int
    _encode: Callable[[str, bool], list[int]]
    _decode: Callable[[list[int], bool], str]
    controls: ControlTokens | None = None
    _encode_named: Callable[[str], list[int]] | None = None

    def encode(self, text: str, add_special_tokens: bool) -> array[int]:
        """Ids of ``text``. Releases the GIL with a fast tokenizer.

        Raises:
            UnicodeEncodeError: ``text`` has a lone surrogate.
        """
        text.encode()  # the library raises a misleading TypeError for a lone surrogate
        return array("i", self._encode(text, add_special_tokens))

    def encode_named(self, text: str) -> array[int]:
        """Ids of a text in which real control tokens are written by ``controls.names`` and
        spelled ones are ordinary text. Raises UnicodeEncodeError."""
        assert self._encode_named is not None
        text.encode()
        return array("i", self._encode_named(text))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of all ``ids`` at once; ids without a token add nothing."""
        return self._decode(list(ids), skip_special_tokens)

    def spell(self, ids: Sequence[int]) -> list[str]:
        """The text that each of ``ids`` adds, special tokens shown; "": an incomplete
        character."""
        stream = self.stream((), False)
        out = [stream.push(i) for i in ids]
        if rest := stream.flush():
            out[-1] += rest
        return out

    def stream(self, tail: Sequence[int] = (), skip_special_tokens: bool = True) -> TextStream:
        """Incremental text of the ids that follow ``tail``; see :mod:`asyncllm.core.detokenize`."""
        if self.table is not None:
            return self.table.stream(tail, skip_special_tokens)
        return WindowStream(self._decode, tail, skip_special_tokens)


def load_tokenizer(
    model_dir: str,
    mode: Mode = "auto",
    trust_remote_code: bool = False,
    vocab_size: int = MOST_TOKENS,
) -> ModelTokenizer:
    """Load the tokenizer of a model folder. ``fast`` and ``auto`` are the same.

    Uses tokenizer.json, or else SentencePiece's tokenizer.model, or else tekken.json. transformers
    is only imported for ``slow`` or if none of these exists: the import takes seconds, and some of
    its classes rebuild parts of the file that must be used as they are.

    Args:
        vocab_size: the model's; tokens that tokenizer_config.json or added_tokens.json place beyond
            it are not added.

    Raises:
        StartupError: no tokenizer, or an unreadable one.
    """
    folder = Path(model_dir)
    config = _json(folder / "tokenizer_config.json")
    special = _special_tokens(folder, config)
    try:
        templates, more_special = _templates(folder, config), _more_special(config)
    except (TypeError, KeyError) as error:
        raise StartupError(f"{folder}: chat templates or special tokens: {error!r}") from error
    if (found := _read(folder, mode, "auto_map" in config)) is not None:
        tokenizer, names = found
        if names:
            # default of transformers' classes for such files before 5.0
            config.setdefault("add_bos_token", True)
            special = {**names, **special}
        named = [*special.values(), *more_special]
        _add_tokens(tokenizer, _added_tokens(folder, config, named), named, vocab_size)
        return _fast(tokenizer, config, special, templates)
    text = _by_transformers(folder, mode, trust_remote_code, config, special, templates)
    if text is None:
        _log.warning(_ONLY_FAST)
        return load_tokenizer(model_dir, "fast", trust_remote_code, vocab_size)
    return text


def with_controls(text: ModelTokenizer) -> ModelTokenizer:
    """``text`` with control tokens told apart from text that merely spells them.

    Applies to all added tokens but those made of white space. A second tokenizer shares vocabulary
    and rules, and knows these tokens by names that nobody can spell.

    Raises:
        StartupError: the tokenizer does not support it.
    """
    if text.tokenizer is None:
        raise StartupError("a slow tokenizer cannot tell control tokens from text that spells them")
    added = text.tokenizer.get_added_tokens_decoder()
    ids = {token.content: i for i, token in added.items() if token.content.strip()}
    if len(ids) > MOST or max(map(len, ids), default=0) > LONGEST:
        raise StartupError(
            f"the tokenizer has {len(ids)} added tokens of up to {max(map(len, ids))} characters; "
            f"at most {MOST} of {LONGEST} can be told apart"
        )
    plain = _alike(text.tokenizer)
    source = "".join(text.templates.values())

    def made(token: str) -> bool:
        """Whether the vocabulary also has this control token as an ordinary token."""
        controls = ids[token] in text.special or token in source
        return controls and ids[token] in plain.encode(token, add_special_tokens=False).ids

    controls = ControlTokens({token: made(token) for token in ids})
    # all at once: each call builds the tokenizer's automaton anew
    named = [
        _renamed(each, controls.names.get(each.content, each.content)) for each in added.values()
    ]
    plain.add_tokens([*named, AddedToken(controls.cut, normalized=False)])
    known = {plain.token_to_id(name): ids[token] for token, name in controls.names.items()}
    known |= {
        plain.token_to_id(token.content): i
        for i, token in added.items()
        if token.content not in ids
    }
    cut = plain.token_to_id(controls.cut)

    def encode(named: str) -> list[int]:
        (found,) = plain.encode_batch_fast([named], add_special_tokens=False)
        return [known.get(i, i) for i in found.ids if i != cut]

    return replace(text, controls=controls, _encode_named=encode)


def _alike(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer with the same vocabulary and rules but no added tokens."""
    made = Tokenizer(tokenizer.model)  # shared
    if tokenizer.normalizer is not None:
        made.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        made.pre_tokenizer = tokenizer.pre_tokenizer
    return made


def _renamed(token: AddedToken, name: str) -> AddedToken:
    return AddedToken(
        name,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _read(folder: Path, mode: Mode, own_code: bool) -> tuple[Tokenizer, dict[str, str]] | None:
    """Read the tokenizer from the folder's own file, and the special tokens named in that file.

    None: there is no such file; use transformers.
    """
    file, sentences, tekken = (folder / name for name in ("tokenizer.json", SENTENCEPIECE, TEKKEN))
    if file.is_file():
        if mode == "slow":
            return None
        try:
            return Tokenizer.from_buffer(file.read_bytes()), {}
        except (OSError, ValueError) as error:
            raise StartupError(f"cannot read {file}: {reason_of(error)}") from error
    if own_code or not (sentences.is_file() or tekken.is_file()):
        return None
    if mode == "slow":
        _log.warning(_ONLY_FAST)
    return read_sentencepiece(sentences) if sentences.is_file() else (read_tekken(tekken), NAMED)


def _fast(
    tokenizer: Tokenizer,
    config: JsonObject,
    special: dict[str, str],
    templates: dict[str, str],
) -> ModelTokenizer:
    tokenizer.no_truncation()  # a file may contain the settings of its training
    tokenizer.no_padding()
    # named special tokens are special even if the file lists them as ordinary tokens
    tokenizer.add_special_tokens(
        [
            AddedToken(content, special=True, normalized=False)
            for content in special.values()
            if tokenizer.token_to_id(content) is not None
        ]
    )
    added = tokenizer.get_added_tokens_decoder()
    tokens = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=False).items()}
    tokens.update((i, token.content) for i, token in added.items())
    size = max(tokens, default=-1) + 1
    ids = {name: tokenizer.token_to_id(content) for name, content in special.items()}
    bos = _bos_to_prepend(tokenizer, config, ids.get("bos_token"))

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        # encode() holds the GIL, the batch methods do not; this one keeps no offsets, which would
        # take ten times the text's size
        (found,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return [*bos, *found.ids] if add_special_tokens else found.ids

    def decode(some: list[int], skip_special_tokens: bool) -> str:
        return tokenizer.decode_batch([some], skip_special_tokens=skip_special_tokens)[0]

    hidden = frozenset(i for i, token in added.items() if token.special)
    decoder = json.loads(tokenizer.to_str())["decoder"]
    table = _table(decoder, [tokens.get(i, "") for i in range(size)], hidden)
    pieces = table.pieces if table else [decode([i], False).encode() for i in range(size)]
    return ModelTokenizer(
        tokenizer,
        pieces,
        table,
        hidden,
        templates,
        special,
        ids.get("bos_token"),
        ids.get("eos_token"),
        size,
        max(map(len, tokens.values()), default=1),
        encode,
        decode,
    )


def _add_tokens(
    tokenizer: Tokenizer,
    wanted: dict[int, AddedToken],
    special: Sequence[str],
    vocab_size: int,
) -> None:
    """Add the tokens of the folder's other files to tokenizer.json's, at the ids they specify.

    The library numbers tokens in the order in which they are added, so unnamed ids in between
    become placeholders. A token that the file already has keeps its id; special ones become
    special. Special tokens without an id get the next ids.
    """
    added = tokenizer.get_added_tokens_decoder()
    present = {repr(token) for token in added.values()}
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    free = max(size, max(added, default=-1) + 1)
    left_out: list[str] = []
    for i, token in sorted(wanted.items()):
        if tokenizer.token_to_id(token.content) is not None:
            if repr(token) not in present:
                token.special |= token.content in special
                tokenizer.add_tokens([token])
        elif free <= i < vocab_size:
            names = [f"<|reserved_token_{j}|>" for j in range(free, i)]
            tokenizer.add_tokens([*(AddedToken(name, special=True) for name in names), token])
            free = i + 1
        else:
            left_out.append(f"{token.content} ({i})")
    known = {token.content for token in (*added.values(), *wanted.values())}
    for content in dict.fromkeys(each for each in special if each not in known):
        if tokenizer.token_to_id(content) is None:
            if free >= vocab_size:
                left_out.append(content)
                continue
            free += 1
        tokenizer.add_tokens([AddedToken(content, special=True)])
    if left_out:
        _log.warning(
            "special and added tokens that stay ordinary text, since their ids are taken or beyond "
            "the model's vocabulary: %s",
            ", ".join(left_out[:3]) + (f" and {len(left_out) - 3} more" if left_out[3:] else ""),
        )


def _bos_to_prepend(tokenizer: Tokenizer, config: JsonObject, bos: int | None) -> list[int]:
    """[bos] if the configuration wants one and the file's post-processor does not add it."""
    if bos is None or not config.get("add_bos_token"):
        return []
    return [] if tokenizer.encode("", add_special_tokens=True).ids[:1] == [bos] else [bos]


# -- decoders --------------------------------------------------------------------------------------


def _table(
    decoder: JsonObject | None, tokens: list[str], special: frozenset[int]
) -> PieceTable | None:
    """The table of a byte-level or SentencePiece style decoder; None for any other."""
    steps = _flat(decoder)
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return PieceTable.of(_byte_level(tokens), special)
    replaced: list[tuple[str, str]] = []
    while kinds[:1] == ["Replace"]:
        pattern = typed(steps[0]["pattern"], dict).get("String")
        if pattern is None:
            return None
        replaced.append((pattern, typed(steps[0]["content"], str)))
        steps, kinds = steps[1:], kinds[1:]
    if not replaced or kinds not in (
        ["ByteFallback", "Fuse"],
        ["ByteFallback", "Fuse", "Strip"],
        ["Fuse"],
        ["Fuse", "Strip"],
    ):
        return None
    strip: JsonObject = {"content": " ", "start": 0, "stop": 0}
    if kinds[-1] == "Strip":
        strip = steps[-1]
    if strip["content"] != " " or strip["stop"]:
        return None
    byte_tokens: dict[int, bytes] = {}
    pieces: list[bytes] = []
    for i, token in enumerate(tokens):
        for old, new in replaced:
            token = token.replace(old, new)
        if "ByteFallback" in kinds and (byte := _byte_token(token)) is not None:
            byte_tokens[i] = byte
        pieces.append(byte_tokens.get(i) or token.encode())
    return PieceTable.of(pieces, special, byte_tokens.keys(), typed(strip["start"], int))


def _flat(decoder: JsonObject | None) -> list[JsonObject]:
    """The decoder's steps, with nested sequences flattened."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in typed(decoder["decoders"], list) for step in _flat(part)]
    return [decoder]


def _byte_level(tokens: list[str]) -> list[bytes]:
    """Bytes of byte-level BPE tokens: each of 256 characters stands for one byte.

    A token with any other character was added later and is meant literally.
    """
    byte_of = {ord(character): byte for byte, character in byte_characters().items()}
    alphabet = frozenset(map(chr, byte_of))
    return [
        token.translate(byte_of).encode("latin-1") if alphabet.issuperset(token) else token.encode()
        for token in tokens
    ]


def _byte_token(token: str) -> bytes | None:
    """The byte of ``<0xNN>``."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            return None
    return None


# -- by transformers -------------------------------------------------------------------------------


def _by_transformers(
    folder: Path,
    mode: Mode,
    trust_remote_code: bool,
    config: JsonObject,
    special: dict[str, str],
    templates: dict[str, str],
) -> ModelTokenizer | None:
    """Load with transformers. None: a slow one was requested, but only a fast one exists."""
    if not folder.is_dir():
        raise StartupError(f"{folder} is not a folder")
    # imported here: it takes seconds and is rarely needed
    from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

    try:
        try:  # the folder's own code for its configuration is never run
            model = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        except (ValueError, OSError):
            model = PreTrainedConfig()
        slow = AutoTokenizer.from_pretrained(
            str(folder),
            config=model,
            use_fast=mode != "slow",
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        why = " ".join(str(error).split())
        if "trust_remote_code" in why and not trust_remote_code:
            why = "it needs the folder's own code (--trust_remote_code)"
        raise StartupError(f"{folder} has no tokenizer that can be loaded: {why}") from error
    special = {**special, **{k: str(v) for k, v in slow.special_tokens_map.items() if v}}
    if isinstance(slow.chat_template, str):
        templates = {"default": slow.chat_template, **templates}
    if getattr(slow, "is_fast", False):
        if mode == "slow":
            return None
        return _fast(slow.backend_tokenizer, config, special, templates)
    return _slow(slow, special, templates)


def _slow(
    slow: PreTrainedTokenizerBase, special: dict[str, str], templates: dict[str, str]
) -> ModelTokenizer:
    """A slow transformers tokenizer: its decoder is unknown, so windows are decoded."""

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        return list(slow.encode(text, add_special_tokens=add_special_tokens))

    def decode(some: list[int], skip_special_tokens: bool) -> str:
        known = [i for i in some if 0 <= i < size]
        text = slow.decode(
            known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)

    vocab = slow.get_vocab()
    size = max(vocab.values(), default=-1) + 1
    return ModelTokenizer(
        None,
        [decode([i], False).encode("utf-8", "replace") for i in range(size)],
        None,
        frozenset(slow.all_special_ids),
        templates,
        special,
        slow.bos_token_id,
        slow.eos_token_id,
        size,
        max(map(len, vocab), default=1),
        encode,
        decode,
    )


# -- configuration files ---------------------------------------------------------------------------


def _json(path: Path) -> JsonObject:
    """Content of a JSON file; {} where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StartupError(f"cannot read {path}: {reason_of(error)}") from error
    if not isinstance(content, dict):
        raise StartupError(f"{path} is not a JSON object")
    return content


def _special_tokens(folder: Path, config: JsonObject) -> dict[str, str]:
    """Text of the named special tokens; an entry is a string or {"content": ...}."""
    named = {**_json(folder / "special_tokens_map.json"), **config}
    found: dict[str, str] = {}
    for name in SPECIAL_NAMES:
        value = named.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and content:
            found[name] = content
    return found


def _added_tokens(
    folder: Path, config: JsonObject, special: Sequence[str]
) -> dict[int, AddedToken]:
    """Added tokens by id, from tokenizer_config.json or, in older folders, from
    added_tokens.json."""
    try:
        if (listed := config.get("added_tokens_decoder")) is not None:
            return {int(i): _added_token(token) for i, token in typed(listed, dict).items()}
        return {
            typed(i, int): AddedToken(text, normalized=text not in special, special=text in special)
            for text, i in _json(folder / "added_tokens.json").items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise StartupError(f"{folder}: added tokens that cannot be read: {error}") from error


def _added_token(token: Json) -> AddedToken:
    fields = typed(token, dict)
    if not fields.get("content"):
        raise ValueError(f"{fields} has no content")
    return AddedToken(**{key: value for key, value in fields.items() if key != "__type"})


def _more_special(config: JsonObject) -> list[str]:
    """Special tokens without a name of their own."""
    found: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(key) or []
        for each in value.values() if isinstance(value, dict) else typed(value, list):
            content = each.get("content") if isinstance(each, dict) else each
            if isinstance(content, str) and content:
                found.append(content)
    return found


def _templates(folder: Path, config: JsonObject) -> dict[str, str]:
    """Chat templates by name. Precedence: .jinja files, chat_template.json, the config."""
    found: dict[str, str] = {}
    for holder in (config, _json(folder / "chat_template.json")):
        value = holder.get("chat_template")
        if isinstance(value, str):
            found["default"] = value
        elif isinstance(value, dict):
            found.update((name, typed(each, str)) for name, each in value.items())
        elif isinstance(value, list):
            named = [typed(each, dict) for each in value]
            found.update((typed(t["name"], str), typed(t["template"], str)) for t in named)
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    for name, path in files.items():
        if path.is_file():
            try:
                found[name] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise StartupError(f"cannot read {path}: {reason_of(error)}") from error
    return found
