"""Repetition, frequency and presence penalties, and additions to single logits: sparse, in place.

Touches only logits of tokens that a history or a list names. Owns the counters; knows neither
requests nor what the numbers are for.
"""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512
_PROGRAMS = 16  # per row; each walks the history in strides
_IN_PROMPT = tl.constexpr(1 << 30)  # counter bit: seen in the prompt; below it, times generated

_COLUMNS = [
    "rows_ptr",
    "lanes_ptr",
    "lens_ptr",
    "prompt_lens_ptr",
    "presence_ptr",
    "frequency_ptr",
    "repetition_ptr",
    "penalize_prompt_ptr",
]


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def _count_kernel(
    history_ptr,
    counts_ptr,
    lanes_ptr,
    lens_ptr,
    prompt_lens_ptr,
    penalize_prompt_ptr,
    history_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lens_ptr + row)
    prompt_len = tl.load(prompt_lens_ptr + row)
    first = tl.where(tl.load(penalize_prompt_ptr + row) != 0, 0, prompt_len)
    history_ptr += tl.load(lanes_ptr + row).to(tl.int64) * history_stride
    counts_ptr += row * VOCAB
    first += tl.program_id(1) * BLOCK
    for begin in range(first, length, tl.num_programs(1) * BLOCK):
        position = begin + tl.arange(0, BLOCK)
        token = tl.load(history_ptr + position, mask=position < length, other=-1)
        known = (token >= 0) & (token < VOCAB)
        tl.atomic_add(counts_ptr + token, 1, mask=known & (position >= prompt_len))
        tl.atomic_or(counts_ptr + token, _IN_PROMPT, mask=known & (position < prompt_len))


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def _apply_kernel(
    logits_ptr,
    history_ptr,
    counts_ptr,
    rows_ptr,
    lanes_ptr,
    lens_ptr,
    prompt_lens_ptr,
    presence_ptr,
    frequency_ptr,
    repetition_ptr,
    penalize_prompt_ptr,
    logits_stride,
    history_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lens_ptr + row)
    first = tl.where(tl.load(penalize_prompt_ptr + row) != 0, 0, tl.load(prompt_lens_ptr + row))
    presence = tl.load(presence_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    repetition = tl.load(repetition_ptr + row)
    history_ptr += tl.load(lanes_ptr + row).to(tl.int64) * history_stride
    logits_ptr += tl.load(rows_ptr + row).to(tl.int64) * logits_stride
    counts_ptr += row * VOCAB
    first += tl.program_id(1) * BLOCK
    for begin in range(first, length, tl.num_programs(1) * BLOCK):
        position = begin + tl.arange(0, BLOCK)
        token = tl.load(history_ptr + position, mask=position < length, other=-1)
        known = (token >= 0) & (token < VOCAB)
        # whoever takes the count away, of all positions of a token, changes the logit
        count = tl.atomic_xchg(counts_ptr + token, 0, mask=known)
        mine = known & (count != 0)
        x = tl.load(logits_ptr + token, mask=mine, other=0.0).to(tl.float32)
        x = tl.where(x > 0, x / repetition, x * repetition)
        made = tl.where(mine, count & (_IN_PROMPT - 1), 0)
        x -= frequency * made.to(tl.float32)
        x -= tl.where(made > 0, presence, 0.0)
        tl.store(logits_ptr + token, x, mask=mine)


@triton.jit(
    do_not_specialize=["num"],
    do_not_specialize_on_alignment=["rows_ptr", "tokens_ptr", "values_ptr"],
)
def _bias_kernel(
    logits_ptr,
    rows_ptr,
    tokens_ptr,
    values_ptr,
    num,
    stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + i, mask=i < num, other=-1).to(tl.int64)
    token = tl.load(tokens_ptr + i, mask=i < num, other=-1)
    value = tl.load(values_ptr + i, mask=i < num, other=0.0)
    live = (row >= 0) & (token >= 0) & (token < VOCAB)
    tl.atomic_add(logits_ptr + row * stride + token, value, mask=live)


def penalty_counts(num_rows: int, vocab_size: int, device: torch.device) -> Tensor:
    """Counters for ``penalize``: [num_rows, vocab_size] int32 zeros, which every call leaves zero.

    4 bytes per entry (0.5 MB a row at 128k tokens); more rows than these go in several launches.
    """
    return torch.zeros((num_rows, vocab_size), dtype=torch.int32, device=device)


def penalize(
    logits: Tensor,
    history: Tensor,
    counts: Tensor,
    rows: Tensor,
    lanes: Tensor,
    lens: Tensor,
    prompt_lens: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
    penalize_prompt: Tensor,
) -> Tensor:
    """Apply repetition, then frequency and presence penalties to ``logits`` in place.

    Repetition divides positive and multiplies negative logits of tokens seen (Keskar et al., 2019,
    §4.1); frequency (per occurrence) and presence subtract, over generated tokens. A token is seen
    if generated, or in the prompt where ``penalize_prompt``.

    Args:
        logits: [n, vocab_size], rows may be strided. In fp32 the sum is exact to rounding; 16-bit
            logits round the result and so swallow small penalties of large logits.
        history: [num_lanes, max_len] int32, token of each position.
        counts: from ``penalty_counts``, all zero; not to be used on two streams at once.
        rows: [p] int32 or int64, rows of ``logits``, no row twice.
        lanes, lens, prompt_lens: [p] int32: lane, tokens in it, of which prompt. lens 0 marks
            padding: nothing is changed.
        presence, frequency, repetition: [p] float32.
        penalize_prompt: [p] int32 or bool.

    Returns:
        logits. The result does not depend on the order in which the device works.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``penalize_ref``. Two launches per ``len(counts)`` rows. Does not synchronise; safe
    in CUDA graphs.
    """
    _check_logits(logits)
    vocab_size, p = logits.shape[1], len(rows)
    columns = (lanes, lens, prompt_lens, presence, frequency, repetition, penalize_prompt)
    if any(c.shape != (p,) or not c.is_contiguous() for c in (rows, *columns)):
        raise ValueError(
            f"columns need {p} contiguous entries: {[tuple(c.shape) for c in columns]}"
        )
    if history.dim() != 2 or history.dtype != torch.int32 or history.stride(1) != 1:
        raise ValueError(f"history {tuple(history.shape)} {history.dtype}: int32 rows expected")
    if counts.dtype != torch.int32 or counts.shape[1:] != (vocab_size,) or not len(counts):
        raise ValueError(f"counts {tuple(counts.shape)} {counts.dtype} do not fit {vocab_size}")
    if not counts.is_contiguous():
        raise ValueError("counts must be contiguous")
    for begin in range(0, p, len(counts)):
        some = slice(begin, begin + len(counts))
        grid = (min(len(counts), p - begin), _PROGRAMS)
        _count_kernel[grid](
            history,
            counts,
            lanes[some],
            lens[some],
            prompt_lens[some],
            penalize_prompt[some],
            history.stride(0),
            VOCAB=vocab_size,
            BLOCK=_BLOCK,
            num_warps=4,
        )
        _apply_kernel[grid](
            logits,
            history,
            counts,
            rows[some],
            *(c[some] for c in columns),
            logits.stride(0),
            history.stride(0),
            VOCAB=vocab_size,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return logits


def add_bias(logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    """``logits[rows, tokens] += values`` in place; -inf bans a token.

    Args:
        logits: [n, vocab_size] float32, rows may be strided.
        rows: [b] int32 or int64; -1 marks padding.
        tokens: [b] int32 or int64; those outside the vocabulary are left out.
        values: [b] float32. Entries for the same logit add up; of more than two finite ones the
            order is open.

    Returns:
        logits.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``add_bias_ref``. Does not synchronise; safe in CUDA graphs.
    """
    _check_logits(logits)
    b = len(rows)
    if logits.dtype != torch.float32 or values.dtype != torch.float32:
        raise ValueError(f"logits {logits.dtype} and values {values.dtype} must be float32")
    if any(c.shape != (b,) or not c.is_contiguous() for c in (rows, tokens, values)):
        raise ValueError(f"rows, tokens and values need {b} contiguous entries")
    if b:
        _bias_kernel[(triton.cdiv(b, 128),)](
            logits,
            rows,
            tokens,
            values,
            b,
            logits.stride(0),
            VOCAB=logits.shape[1],
            BLOCK=128,
            num_warps=4,
        )
    return logits


def penalize_ref(
    logits: Tensor,
    history: Tensor,
    rows: Tensor,
    lanes: Tensor,
    lens: Tensor,
    prompt_lens: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
    penalize_prompt: Tensor,
) -> Tensor:
    """``penalize`` in plain torch, with dense counts; also in place."""
    vocab_size = logits.shape[1]
    for i in range(len(rows)):
        known = history[lanes[i], : lens[i]].long()
        made = torch.bincount(known[prompt_lens[i] :], minlength=vocab_size)
        seen = made
        if penalize_prompt[i]:
            seen = torch.bincount(known, minlength=vocab_size)
        x = logits[rows[i]].float()
        turned = torch.where(x > 0, x / repetition[i], x * repetition[i])
        x = torch.where(seen > 0, turned, x)
        x = x - frequency[i] * made - presence[i] * (made > 0)
        logits[rows[i]] = x.to(logits.dtype)
    return logits


def add_bias_ref(logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    """``add_bias`` in plain torch; also in place."""
    live = (rows >= 0) & (tokens >= 0) & (tokens < logits.shape[1])
    where = (rows[live].long(), tokens[live].long())
    return logits.index_put_(where, values[live], accumulate=True)


def _check_logits(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.stride(1) != 1 or not logits.is_floating_point():
        raise ValueError(f"logits must be [n, vocab_size], rows contiguous: {tuple(logits.shape)}")
