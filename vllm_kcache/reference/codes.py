# SPDX-License-Identifier: Apache-2.0
"""K codes: what 4 bits an element keep of K, and how they lie in a page. The definition.

K of a channel is taken to mean 0 and deviation 1 and rotated by a Hadamard matrix, so that no
channel is larger than the others; then a token and head is quantised to 4 bits with one zero and
one scale. The query takes the deviation and the rotation instead, so that a product with a code is
a product with K, but for the rounding:

    q . k = q' . k' + q . mean,   k' = H((k - mean) / deviation),   q' = H(q * deviation)
"""

from __future__ import annotations

import torch

from vllm_kcache.cache.formats import SCALE_BYTES, code_bytes, code_channels
from vllm_kcache.reference.paging import accumulation_dtype
from vllm_kcache.types import KStats

LEVELS = 15
# The least normal float16, so that no scale is 0 or has lost bits; and the largest.
LEAST_SCALE = 2.0**-14
MOST_FLOAT16 = 65504.0
INT8_MOST = 127
LEAST_QUERY = 1e-20  # largest value of a q' that is rounded as if it had one
# Least deviation of a channel, as a share of the root mean square over the channels of its head: a
# channel that stood still in the text may move later, and must not drown the others then.
LEAST_DEVIATION = 1 / 128


def stats_of(mean: torch.Tensor, variance: torch.Tensor) -> KStats:
    """Constants of the codes from what was measured of K.

    Args:
        mean, variance: [Hkv, D] float64, of each channel. The variance is finite and at least 0.
    """
    width = variance.mean(-1, keepdim=True).sqrt()
    # A head that stands still altogether has no width: then 1 is as good as any.
    width = torch.where(width > 0, width, 1 / LEAST_DEVIATION)
    deviation = torch.maximum(variance.sqrt(), width * LEAST_DEVIATION)
    return KStats(mean.float(), deviation.float())


def rotate(x: torch.Tensor) -> torch.Tensor:
    """H x over the last dim: orthonormal Hadamard matrices over blocks of n channels, where n is
    the largest power of two that divides the dim.

    Entry (i, j) of a block is (-1)^popcount(i & j) / sqrt(n). H is its own inverse.

    Args:
        x: [..., D] float32 or float64.
    """
    size = x.shape[-1]
    block = size & -size
    shape = x.shape
    step = 1
    while step < block:
        pairs = x.reshape(*shape[:-1], size // (2 * step), 2, step)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((low + high, low - high), -2).reshape(shape)
        step *= 2
    return x * block**-0.5


def transform_keys(key: torch.Tensor, stats: KStats) -> torch.Tensor:
    """k' of K: [..., Hkv, D] of any dtype to the same in float32 (float64 for float64)."""
    dtype = accumulation_dtype(key.dtype)
    return rotate((key.to(dtype) - stats.mean.to(dtype)) / stats.deviation.to(dtype))


def restore_keys(transformed: torch.Tensor, stats: KStats) -> torch.Tensor:
    """K of k', [..., Hkv, D]: undoes `transform_keys`."""
    dtype = transformed.dtype
    return rotate(transformed) * stats.deviation.to(dtype) + stats.mean.to(dtype)


def transform_query(query: torch.Tensor, stats: KStats) -> tuple[torch.Tensor, torch.Tensor]:
    """q' and q . mean.

    Args:
        query: [B, Hq, D] of any dtype; query heads `h * G .. (h + 1) * G - 1` share KV head h.
    Returns:
        [B, Hq, D] and [B, Hq] in float32 (float64 for float64).
    """
    grouped = query.to(accumulation_dtype(query.dtype)).unflatten(1, (stats.mean.shape[0], -1))
    mean, deviation = stats.mean.to(grouped.dtype), stats.deviation.to(grouped.dtype)
    bias = (grouped * mean[:, None]).sum(-1)
    return rotate(grouped * deviation[:, None]).flatten(1, 2), bias.flatten(1, 2)


def round_query(transformed: torch.Tensor) -> torch.Tensor:
    """q' as estimates take it: 8 bits, in steps of its largest value / 127; half to even.

    To the error that codes make it adds mostly less than 1%.

    Args:
        transformed: [..., D]. q'.
    Returns:
        The same in whole steps.
    """
    most = transformed.abs().amax(-1, keepdim=True).clamp_min(LEAST_QUERY)
    # A number over a tensor would be its reciprocal times the number, which rounds twice.
    steps = torch.full_like(most, INT8_MOST) / most
    return (transformed * steps).round() / steps


def encode(transformed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise k' to 4 bits.

    zero = float16(min k'), scale = float16((max k' - min k') / 15), at least 2^-14; code =
    round((k' - zero) / scale) within 0..15, by the rounded zero and scale; half to even.

    Args:
        transformed: [..., D].
    Returns:
        codes [..., D] uint8, scale [...] float16, zero [...] float16.
    """
    least, most = transformed.amin(-1), transformed.amax(-1)
    zero = least.clamp(-MOST_FLOAT16, MOST_FLOAT16).half()
    scale = ((most - least) / LEVELS).clamp(LEAST_SCALE, MOST_FLOAT16).half()
    dtype = transformed.dtype
    steps = (transformed - zero[..., None].to(dtype)) / scale[..., None].to(dtype)
    return steps.round().clamp(0, LEVELS).to(torch.uint8), scale, zero


def decode(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """What codes say of k': [..., D] float32."""
    return codes.float() * scale.float()[..., None] + zero.float()[..., None]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes as bytes: [..., D] uint8 (0..15) to [..., Dp / 2] uint8.

    Of eight channels that follow each other, the first four are the low nibbles of four bytes and
    the last four the high nibbles: channel 8 i + j and 8 i + 4 + j are byte 4 i + j. Channels past
    D are 0.
    """
    padding = code_channels(codes.shape[-1]) - codes.shape[-1]
    halves = torch.nn.functional.pad(codes, (0, padding)).unflatten(-1, (-1, 2, 4))
    return (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2)


def unpack(packed: torch.Tensor, head_size: int) -> torch.Tensor:
    """Codes of bytes: [..., Dp / 2] uint8 to [..., D] uint8."""
    fours = packed.unflatten(-1, (-1, 4))
    return torch.stack((fours & 15, fours >> 4), -2).flatten(-3)[..., :head_size]


def write_codes(pages: torch.Tensor, head_size: int, page_ids: torch.Tensor,
                offsets: torch.Tensor, transformed: torch.Tensor) -> None:  # fmt: skip
    """Store the codes of tokens in their pages.

    Args:
        pages: [M, Hkv, S * (Dp / 2 + 4)] uint8. Written.
        page_ids, offsets: [n] int64. Where each token goes.
        transformed: [n, Hkv, D]. k'.
    """
    codes, scale, zero = encode(transformed)
    code_part, scale_part = code_parts(pages, head_size)
    code_part[page_ids, :, offsets] = pack(codes)
    scale_part[page_ids, :, offsets] = torch.stack((scale, zero), -1).view(torch.uint8)


def read_codes(pages: torch.Tensor, head_size: int) -> torch.Tensor:
    """What pages of codes say of k': [..., S, D] float32.

    Args:
        pages: [..., S * (Dp / 2 + 4)] uint8.
    """
    code_part, scale_part = code_parts(pages, head_size)
    # A copy, so that the bytes of a float16 lie where one may.
    scales = scale_part.contiguous().view(torch.float16)
    return decode(unpack(code_part, head_size), scales[..., 0], scales[..., 1])


def code_parts(pages: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of pages, [..., S, Dp / 2] uint8, and scale and zero, [..., S, 4] uint8."""
    page_tokens = pages.shape[-1] // code_bytes(head_size)
    past_codes = page_tokens * (code_bytes(head_size) - SCALE_BYTES)
    code_part = pages[..., :past_codes].unflatten(-1, (page_tokens, -1))
    return code_part, pages[..., past_codes:].unflatten(-1, (page_tokens, SCALE_BYTES))


def quantise_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 of the last dim, for rows.

    scale = float16(max |x| / 127), at least 2^-14; value = round(x / scale) within -127..127, by
    the rounded scale; half to even.

    Args:
        x: [..., D].
    Returns:
        [..., D] int8 and scale [...] float16.
    """
    scale = (x.abs().amax(-1) / INT8_MOST).clamp(LEAST_SCALE, MOST_FLOAT16).half()
    values = (x / scale[..., None].to(x.dtype)).round()
    return values.clamp(-INT8_MOST, INT8_MOST).to(torch.int8), scale
