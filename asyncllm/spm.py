"""Loads SentencePiece's tokenizer.model as a fast tokenizer; needs the extra ``sentencepiece``.

The conversion uses the settings in the file itself, while the model-specific classes of
transformers assume some of them.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from asyncllm.errors import StartupError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_log = logging.getLogger("asyncllm.text")

# texts that the conversion is checked with
_PROBES = (
    "Hello world",
    " The  quick\tbrown\n\nfox, 12345 times.",
    "\n",
    "Größe, жук, 日本語, हिन्दी, e\u0301, ﬁ, 👩‍👩‍👧",
)


def read_sentencepiece(file: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a tokenizer.model, and the text of its named special tokens.

    If the conversion splits a text differently from sentencepiece, a warning is logged.

    Raises:
        StartupError: a library is missing, or the file is not a SentencePiece model.
    """
    if lacking := [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]:
        raise StartupError(
            f"{file} is a SentencePiece tokenizer, and there is no tokenizer.json; it needs "
            f"{' and '.join(lacking)}: pip install 'asyncllm[sentencepiece]'"
        )
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise StartupError(
            f"{file} is not a SentencePiece model, and there is no tokenizer.json: {error!s:.100}"
        ) from error
    from transformers import PreTrainedTokenizerFast  # here: the import takes seconds

    made = PreTrainedTokenizerFast.from_pretrained(str(file.parent)).backend_tokenizer
    _compare(file, made, model)
    ids = {
        "bos_token": model.bos_id(),
        "eos_token": model.eos_id(),
        "unk_token": model.unk_id(),
        "pad_token": model.pad_id(),
    }
    return made, {name: model.id_to_piece(i) for name, i in ids.items() if i >= 0}


def _compare(file: Path, made: Tokenizer, model: SentencePieceProcessor) -> None:
    for text in _PROBES:
        got, wanted = made.encode(text, add_special_tokens=False).ids, model.encode(text)
        if got != wanted:
            _log.warning(
                "%s: its conversion splits %r into %s, sentencepiece into %s; put a "
                "tokenizer.json beside it to use that instead",
                *(file, text, got, wanted),
            )
            return


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
