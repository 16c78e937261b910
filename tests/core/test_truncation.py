"""The ends of long texts: the same ids as of the whole, for a part of the work."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from asyncllm.core.truncation import encode_ends, shortened
from asyncllm.text import ModelTokenizer, load_tokenizer

PROSE = (Path(__file__).parents[2] / "LICENSE").read_text() * 20
RANDOM = random.Random(5)
WORDS = PROSE.split()


@pytest.fixture(scope="module")
def text(demo_dir: Path) -> ModelTokenizer:
    return load_tokenizer(str(demo_dir))


@pytest.mark.parametrize(
    "long",
    [
        PROSE,
        " ".join(RANDOM.choices(WORDS, k=40_000)),
        PROSE.replace(" ", ""),
        "\n".join(RANDOM.choices(WORDS, k=40_000)),
        "\n".join("\t" * (i % 7) + f"x[{i}] = {i * 7919} # {i:08b}" for i in range(9000)),
        "".join(RANDOM.choices("\u6f22\u5b57\u8a9e\u8a00\u6a21\u578b\u3002", k=200_000)),
        "".join(RANDOM.choices("\U0001f600\U0001f9d1\u200d\u2764", k=100_000)),
        "a" * 300_000,
        "".join(RANDOM.choices("0123456789", k=200_000)),
        "<|im_start|>user\nhi<|im_end|>\n" * 10_000,
    ],
    ids=[
        "prose",
        "shuffled",
        "no spaces",
        "lines",
        "code",
        "Chinese",
        "emoji",
        "one letter",
        "digits",
        "special",
    ],
)
def test_ids_are_those_of_the_whole(text: ModelTokenizer, long: str) -> None:
    done = [0]

    def encode(part: str) -> array[int]:
        done[0] += len(part)
        return text.encode(part, False)

    whole = text.encode(long, False)
    for head, tail in ((0, 1), (0, 1000), (500, 0), (500, 501), (1, 1), (0, len(whole) + 1)):
        done[0] = 0
        ids, cut = encode_ends(long, encode, head, tail, text.max_piece_chars)
        assert ids == shortened(whole, head, tail), (head, tail)
        assert cut == (len(whole) > head + tail)
        if head + tail < len(whole):
            assert done[0] < len(long)


def test_of_a_long_run_the_text_is_right(text: ModelTokenizer) -> None:
    """How 300,000 spaces are split depends on where one begins."""
    long = "a" + " " * 300_000
    ids, cut = encode_ends(long, lambda part: text.encode(part, False), 2, 100, 81)
    assert (len(ids), cut) == (102, True)
    assert text.decode(ids[:2]).rstrip(" ") == "a"
    assert text.decode(ids[2:]).strip(" ") == ""


def test_special_tokens_of_the_ends_stay(tmp_path: Path, demo_dir: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(demo_dir / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )

    def encode(part: str) -> array[int]:
        return array("i", tokenizer.encode(part).ids)

    whole = encode(PROSE)
    assert (whole[0], whole[-1]) == (1, 2)
    for head, tail in ((0, 100), (50, 50), (50, 0)):
        assert encode_ends(PROSE, encode, head, tail, 81) == (shortened(whole, head, tail), True)


def test_tokens_of_any_length_come_to_an_end() -> None:
    """A tokenizer that makes few tokens of everything: no more is tried than the longest explain."""
    sizes = []

    def encode(part: str) -> array[int]:
        sizes.append(len(part))
        return array("i", range(len(part) // 10_000))

    ids, cut = encode_ends("x" * 50_000_000, encode, 0, 100, 100)
    assert cut
    assert len(ids) <= 100
    assert sum(sizes) < 400_000
