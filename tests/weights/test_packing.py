"""The packed layout: bytes worked out by hand, and a slow bit-by-bit packer written from the docstring."""

import pytest
import torch

from slimwright.weights.packing import pack_codes, packed_row_bytes, planes, unpack_codes

ROW = [list(range(8))]  # one tail chunk of L = 8


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        # Two-bit plane, S = 2: byte 0 holds codes 0, 2, 4, 6 from the low bits up, byte 1 codes 1, 3, 5, 7.
        (2, [0, 1, 2, 3, 3, 2, 1, 0], "78 2d"),
        # Two-bit plane of the low bits 0 1 2 3 0 1 2 3, then the one-bit plane of bit 2: codes 4..7.
        (3, ROW[0], "88 dd f0"),
        # Four-bit plane, S = 4: byte j holds codes j and j + 4.
        (4, ROW[0], "40 51 62 73"),
        # Low nibbles 1 2 .. 8, then bit 4 of the codes 17 and 24 (the first and the last).
        (5, [17, 2, 3, 4, 5, 6, 7, 24], "51 62 73 84 81"),
        # Low nibbles 0..7, then the two-bit plane 3 2 1 0 3 2 1 0.
        (6, [48, 33, 18, 3, 52, 37, 22, 7], "40 51 62 73 77 22"),
        # Low nibbles all 15, two-bit plane 1 0 1 0 1 0 1 0, one-bit plane 1 1 0 0 0 0 0 1.
        (7, [95, 79, 31, 15, 31, 15, 31, 79], "ff ff ff ff 55 00 83"),
        (8, [0, 1, 2, 253, 254, 255, 128, 127], "00 01 02 fd fe ff 80 7f"),
        # Short tails are padded with zeros to 8 codes.
        (4, [1, 2, 3], "01 02 03 00"),
        (3, [7], "03 00 01"),
        (2, [3, 1, 2], "0b 01"),
        (8, [9], "09 00 00 00 00 00 00 00"),
    ],
)
def test_golden_bytes_of_a_tail(bits: int, codes: list[int], expected: str) -> None:
    packed = pack_codes(torch.tensor([codes], dtype=torch.uint8), bits)
    assert bytes(packed[0].tolist()) == bytes.fromhex(expected)
    assert unpack_codes(packed, bits, len(codes)).tolist() == [codes]


def test_golden_bytes_of_a_whole_chunk_and_a_tail() -> None:
    codes = [index % 16 for index in range(64)] + [15, 14]
    packed = pack_codes(torch.tensor([codes], dtype=torch.uint8), 4)
    chunk = [codes[j] | codes[j + 32] << 4 for j in range(32)]  # codes 0..31 low, 32..63 high
    assert packed[0].tolist() == [*chunk, 15, 14, 0, 0]


def slow_pack(row: list[int], bits: int) -> list[int]:
    """From the layout's docstring, one bit at a time."""
    out: list[int] = []
    for start in range(0, len(row), 64):
        chunk = row[start : start + 64]
        chunk += [0] * (-len(chunk) % 8)
        length, shift = len(chunk), 0
        for width in planes(bits):
            plane = [0] * (length * width // 8)
            stride = length * width // 8
            for index, code in enumerate(chunk):
                byte, slot = (index // 8, index % 8) if width == 1 else (index % stride, index // stride)
                for bit in range(width):
                    plane[byte] |= (code >> (shift + bit) & 1) << (slot * width + bit)
            out += plane
            shift += width
    return out


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 63, 64, 65, 100, 128, 191])
def test_equals_the_slow_packer(bits: int, columns: int) -> None:
    codes = torch.randint(2**bits, (3, columns), generator=torch.Generator().manual_seed(columns)).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.tolist() == [slow_pack(row, bits) for row in codes.tolist()]
    assert packed.shape == (3, packed_row_bytes(columns, bits))
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_are_independent(bits: int) -> None:
    codes = torch.randint(2**bits, (6, 77), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(pack_codes(codes, bits)[2:4], pack_codes(codes[2:4], bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_planes_make_up_the_bits(bits: int) -> None:
    assert sum(planes(bits)) == bits
    assert list(planes(bits)) == sorted(planes(bits), reverse=True)
