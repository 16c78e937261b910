"""Incremental text equals the tokenizer's own decode, however the ids arrive."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from asyncllm.core.detokenize import BAD, PieceTable, TextStream, WindowStream

BYTE_CHARS = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = [
    "Hello",
    "Ġworld",
    "ä½ł",
    "å¥½",
    "ðŁĺ",
    "Ģ",
    "Ġ",
    "Ċ",
]  # ä½ł å¥½: 你好; ðŁĺ: 3/4 of an emoji


def byte_level() -> Tokenizer:
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*BYTE_CHARS, *WORDS]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>", "<\uff5cend▁x\uff5c>"])
    tokenizer.add_tokens([AddedToken("  ", special=False)])
    return tokenizer


def sentencepiece(strip: bool) -> Tokenizer:
    tokens = [
        "<unk>",
        *[f"<0x{i:02X}>" for i in range(256)],
        "▁Hello",
        "▁world",
        "好",
        "▁",
        "a",
        "�",
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


BYTE_LEVEL = byte_level()
PLAIN, STRIPPED = sentencepiece(False), sentencepiece(True)


def tokens_of(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size())]


def table_of(tokenizer: Tokenizer) -> PieceTable:
    tokens = tokens_of(tokenizer)
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    if tokenizer is BYTE_LEVEL:
        return PieceTable.of([_bytes(token) for token in tokens], special)
    byte_tokens = range(1, 257)
    pieces = [bytes([i - 1]) if i in byte_tokens else _spaced(t) for i, t in enumerate(tokens)]
    return PieceTable.of(pieces, special, byte_tokens, int(tokenizer is STRIPPED))


def _bytes(token: str) -> bytes:
    if not set(token) <= set(BYTE_CHARS):
        return token.encode()
    pretty = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(b): b for b in pretty}
    byte_of |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in pretty)}
    return bytes(byte_of[char] for char in token)


def _spaced(token: str) -> bytes:
    return token.replace("▁", " ").encode()


OF_BYTE = {_bytes(t)[0]: i for i, t in enumerate(BYTE_CHARS)}
TABLES = {id(t): table_of(t) for t in (BYTE_LEVEL, PLAIN, STRIPPED)}


def feed(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.push(i) for i in ids), stream.flush()]


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids of any kind, and ids whose bytes are the UTF-8 of any text, cut anywhere."""
    size = tokenizer.get_vocab_size()
    if tokenizer is BYTE_LEVEL:
        of_byte = OF_BYTE
    else:
        of_byte = {b: b + 1 for b in range(256)}
    chars = st.text("aé你😀\u200d🏽\n\ufffd ", max_size=6)
    cut = st.builds(lambda text, n: text.encode()[n:], chars, st.integers(0, 3))
    as_ids = st.builds(lambda data: [of_byte[b] for b in data], cut | st.binary(max_size=4))
    some = st.lists(st.integers(0, size + 3), max_size=4)
    return st.lists(some | as_ids, max_size=5).map(lambda parts: [i for p in parts for i in p])


@settings(derandomize=True, max_examples=100, deadline=None)
@given(ids=ids_of(BYTE_LEVEL), skip=st.booleans())
def test_byte_level_text_is_decode_of_all_ids(ids: list[int], skip: bool) -> None:
    stream = TABLES[id(BYTE_LEVEL)].stream(skip_special_tokens=skip)
    assert "".join(feed(stream, ids)) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


def byte_runs(ids: list[int], hidden: set[int]) -> list[list[int]]:
    """Neighbouring byte tokens, split from all others; hidden ids do not separate."""
    runs: list[list[int]] = []
    for i in (i for i in ids if i not in hidden and i < PLAIN.get_vocab_size()):
        if runs and 1 <= i <= 256 and 1 <= runs[-1][-1] <= 256:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def kept(run: list[int]) -> str:
    """A run's text: as decode has it, but complete characters before the first bad byte stay."""
    if not 1 <= run[0] <= 256:
        return PLAIN.decode(run, skip_special_tokens=False)
    data = bytes(i - 1 for i in run)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode() + BAD * (len(data) - error.start)


@pytest.mark.parametrize("tokenizer", [PLAIN, STRIPPED], ids=["plain", "stripped"])
@settings(derandomize=True, max_examples=100, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_sentencepiece_text_is_decode_of_all_ids(
    tokenizer: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    ids = data.draw(ids_of(PLAIN))
    got = "".join(feed(TABLES[id(tokenizer)].stream(skip_special_tokens=skip), ids))
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    runs = byte_runs(ids, special if skip else set())
    expected = "".join(map(kept, runs))
    if tokenizer is STRIPPED:
        expected = expected.removeprefix(" ")
    assert got == expected
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    # equal, except that a run which turns bad late keeps the characters it had completed
    if all(kept(run) == PLAIN.decode(run, skip_special_tokens=False) for run in runs):
        assert got == whole
    assert got.count(BAD) <= whole.count(BAD)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(prompt=ids_of(BYTE_LEVEL), ids=ids_of(BYTE_LEVEL), skip=st.booleans())
def test_text_after_a_prompt_is_what_decode_adds(
    prompt: list[int], ids: list[int], skip: bool
) -> None:
    before = BYTE_LEVEL.decode(prompt, skip_special_tokens=skip)
    whole = BYTE_LEVEL.decode(prompt + ids, skip_special_tokens=skip)
    got = "".join(feed(TABLES[id(BYTE_LEVEL)].stream(prompt, skip), ids))
    # a character that the prompt began and the stream finished is whole in the stream's text
    assert whole in (before + got, before.removesuffix(BAD) + got)


def test_character_begun_in_the_prompt_is_finished_whole() -> None:
    you = [BYTE_LEVEL.token_to_id(char) for char in "ä½ł"]
    table = TABLES[id(BYTE_LEVEL)]
    assert feed(table.stream(you[:2]), you[2:]) == ["你", ""]
    assert feed(table.stream(you[:2]), [BYTE_LEVEL.token_to_id("a")]) == ["a", ""]
    assert feed(table.stream(you[:2]), []) == [""]


def test_piece_is_the_whole_character_at_its_last_token() -> None:
    emoji = [BYTE_LEVEL.token_to_id(token) for token in ("ðŁĺ", "Ģ")]
    assert feed(TABLES[id(BYTE_LEVEL)].stream(), emoji) == ["", "😀", ""]
    fallback = [b + 1 for b in "😀".encode()]
    assert feed(TABLES[id(STRIPPED)].stream(), fallback) == ["", "", "", "😀", ""]


def test_unfinished_character_is_one_replacement_at_the_end() -> None:
    part = BYTE_LEVEL.token_to_id("ðŁĺ")
    assert feed(TABLES[id(BYTE_LEVEL)].stream(), [part]) == ["", BAD]


def test_first_space_goes_only_at_the_start_of_the_text() -> None:
    hello, world, bos = (STRIPPED.token_to_id(t) for t in ("▁Hello", "▁world", "<s>"))
    table = TABLES[id(STRIPPED)]
    assert "".join(feed(table.stream(), [hello, world])) == "Hello world"
    assert "".join(feed(table.stream([bos]), [hello])) == "Hello"
    assert "".join(feed(table.stream([bos, hello]), [world])) == " world"


def test_forced_token_is_shown_although_special_tokens_are_hidden() -> None:
    for tokenizer, eos in ((BYTE_LEVEL, "<|im_end|>"), (PLAIN, "</s>")):
        stream = TABLES[id(tokenizer)].stream(skip_special_tokens=True)
        token = tokenizer.token_to_id(eos)
        assert stream.push(token) == ""
        assert stream.push(token, force=True) == eos


@settings(derandomize=True, max_examples=50, deadline=None)
@given(text=st.text("ab cé你😀", max_size=8))
def test_window_stream_follows_a_decoder_without_a_table(text: str) -> None:
    tokenizer = Tokenizer(models.BPE(vocab=BYTE_LEVEL.get_vocab(), merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("b", "β")])
    ids = [i for char in text for i in _ids(char)]

    def decode(some: list[int], skip: bool) -> str:
        return tokenizer.decode(some, skip_special_tokens=skip)

    got = feed(WindowStream(decode), ids)
    assert "".join(got) == tokenizer.decode(ids)
    assert not any(BAD in piece for piece in got)
    assert "".join(feed(WindowStream(decode, ids), ids)) == tokenizer.decode(ids)


def _ids(char: str) -> list[int]:
    return [OF_BYTE[b] for b in char.encode()]


def test_window_stays_short_over_bytes_that_never_become_a_character() -> None:
    longest = 0

    def decode(some: list[int], skip: bool) -> str:
        nonlocal longest
        longest = max(longest, len(some))
        return BYTE_LEVEL.decode(some, skip_special_tokens=skip)

    bad = _ids("é")[1]
    text = "".join(feed(WindowStream(decode), [bad] * 200))
    assert text == BAD * 200
    assert longest <= 32


def test_all_splits_of_a_family_emoji_are_clean() -> None:
    family = "👨‍👩‍👧‍👦 done"
    got = feed(TABLES[id(BYTE_LEVEL)].stream(), [i for char in family for i in _ids(char)])
    assert "".join(got) == family
    assert not any(BAD in piece for piece in got)
