"""The packed layout of integer codes: bit planes in chunks of 64, one sequential stream of bytes per matrix.

A row of codes of ``bits`` bits is cut into chunks of 64 codes. Each chunk occupies exactly ``8 * bits`` bytes and holds
one *plane* per power of two that makes up ``bits`` (3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1), widest plane first. A plane
of width ``p`` over a chunk of ``L`` codes has ``L * p / 8`` bytes; byte ``j`` holds, from its low bits up, the codes
``j, j + S, j + 2S, ...`` with ``S = L * p / 8`` (``p`` = 8, 4, 2), and the one-bit plane is in plain order (bit ``i``
of byte ``j`` is code ``8 j + i``). The low bits of a code lie in the widest plane. The last chunk of a row may be
shorter: its length is the rest of the row rounded up to a multiple of 8 and the same formulas hold with that ``L``.

Why it is as it is, since every later version reads it:

- *One stream, in order.* The planes of a chunk lie side by side, rows follow each other without gaps, so a kernel
  walks the mapped file once from front to back whatever the bit width is; nothing is repacked at load.
- *Vector widths.* 64 codes of 4 bits are 32 bytes: one 256-bit load, a mask and a shift give codes 0..31 and 32..63 in
  natural order. The two-bit plane is one 128-bit load and three shifts; the one-bit plane is a 64-bit mask, which is an
  AVX-512 mask register as it stands. No shuffle crosses a lane and no code straddles a byte, unlike a plain bit string,
  in which 3-, 5-, 6- and 7-bit codes do.
- *Any row count, any group.* Rows are independent, so a thread or a GPU program takes any range of rows. Groups of 32,
  64, 128, ... begin on a half or whole chunk; any other group length is legal and costs only index arithmetic.
- *Little waste.* Padding is at most 7 codes a row.
"""

import torch
from torch import Tensor

from slimwright import kernels
from slimwright.kernels import solve

CHUNK = 64


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the bit planes that make up a code of ``bits`` bits (1..8), widest first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def packed_row_bytes(columns: int, bits: int) -> int:
    """Bytes that one row of ``columns`` codes of ``bits`` bits occupies."""
    return (columns + 7) // 8 * bits


def _pack_chunks(codes: Tensor, bits: int) -> Tensor:
    """(..., L) codes with L % 8 == 0 → (..., L * bits / 8) bytes: one chunk."""
    length, parts, shift = codes.shape[-1], [], 0
    for width in planes(bits):
        plane = codes if bits == width else (codes >> shift) & ((1 << width) - 1)
        shift += width
        if width == 8:
            parts.append(plane)
            continue
        per_byte = 8 // width
        if width == 1:
            lanes = plane.unflatten(-1, (length // 8, 8)).unbind(-1)
        else:
            lanes = plane.unflatten(-1, (per_byte, length // per_byte)).unbind(-2)
        packed = lanes[0].clone()
        for index in range(1, per_byte):
            packed |= lanes[index] << (index * width)
        parts.append(packed)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _unpack_chunks(packed: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of :func:`_pack_chunks`."""
    codes, shift, start = None, 0, 0
    for width in planes(bits):
        size = length * width // 8
        plane = packed[..., start : start + size]
        start += size
        if width != 8:
            mask = (1 << width) - 1
            lanes = [(plane >> (index * width)) & mask for index in range(8 // width)]
            plane = torch.stack(lanes, dim=-1).flatten(-2) if width == 1 else torch.cat(lanes, dim=-1)
        codes = plane if codes is None else codes | (plane << shift)
        shift += width
    assert codes is not None
    return codes


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes.

    Args:
        codes: (rows, columns) uint8, every value below ``2**bits``.
        bits: 1..8.

    Returns:
        (rows, :func:`packed_row_bytes`) uint8.
    """
    rows, columns = codes.shape
    if kernels.available(codes):
        return solve.pack(codes, bits)
    whole = columns // CHUNK * CHUNK
    parts = []
    if whole:
        parts.append(_pack_chunks(codes[:, :whole].unflatten(1, (-1, CHUNK)), bits).flatten(1))
    if columns > whole:
        tail = codes[:, whole:]
        parts.append(_pack_chunks(torch.nn.functional.pad(tail, (0, -tail.shape[1] % 8)), bits))
    if not parts:
        return codes.new_zeros(rows, 0)
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of :func:`pack_codes`: (rows, bytes) uint8 → (rows, columns) uint8."""
    if kernels.available(packed):
        return solve.unpack(packed, bits, columns)
    whole = columns // CHUNK * CHUNK
    cut = whole // 8 * bits
    parts = []
    if whole:
        parts.append(_unpack_chunks(packed[:, :cut].unflatten(1, (-1, CHUNK // 8 * bits)), bits, CHUNK).flatten(1))
    if columns > whole:
        length = (columns - whole + 7) // 8 * 8
        parts.append(_unpack_chunks(packed[:, cut:], bits, length)[:, : columns - whole])
    if not parts:
        return packed.new_zeros(packed.shape[0], 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
