"""Random orthogonal matrices: Hadamard's where the size allows it, else from a QR factorization (card: rotate)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def orthogonal(size: int, *, mode: str = "hadamard", seed: int = 0) -> Tensor:
    """A random orthogonal matrix (size, size) float64.

    Args:
        mode: ``hadamard``: a Hadamard matrix with random signs of its columns, over ``sqrt(size)``; ``random``:
            uniformly distributed, as ``hadamard`` is where no Hadamard matrix of this size can be built.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = hadamard(size) if mode == "hadamard" else None
    if matrix is not None:
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        return matrix * signs / math.sqrt(size)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def hadamard(size: int) -> Tensor | None:
    """A Hadamard matrix (size, size) of ±1 in float64, ``H Hᵀ = size · I``; None where this builds none.

    The Kronecker product of Sylvester's matrices (powers of two) with the smallest of Paley's that fits: of size q + 1
    for a prime q ≡ 3 mod 4, or 2 (q + 1) for a prime q ≡ 1 mod 4.
    """
    if size < 1:
        return None
    core = size
    while core % 2 == 0:
        core //= 2
    while core <= size:
        matrix = _paley(core)
        if matrix is not None:
            while matrix.shape[0] < size:
                matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
            return matrix
        core *= 2
    return None


def _paley(size: int) -> Tensor | None:
    if size in (1, 2):
        small = [[1.0]] if size == 1 else [[1.0, 1.0], [1.0, -1.0]]
        return torch.tensor(small, dtype=torch.float64)
    if size % 4:
        return None
    if _is_prime(size - 1):  # size - 1 is 3 mod 4: Paley's first construction
        border = torch.ones(size, dtype=torch.float64)
        skew = torch.zeros(size, size, dtype=torch.float64)
        skew[0], skew[:, 0], skew[0, 0] = border, -border, 0
        skew[1:, 1:] = _residues(size - 1)
        return skew + torch.eye(size, dtype=torch.float64)
    q = size // 2 - 1
    if q % 4 != 1 or not _is_prime(q):
        return None
    conference = torch.ones(q + 1, q + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = _residues(q)
    product = torch.kron(conference, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    corner = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return product + torch.kron(torch.eye(q + 1, dtype=torch.float64), corner)


def _residues(q: int) -> Tensor:
    """(q, q): whether ``column - row`` is a square modulo the prime q: 1, or -1, or 0 on the diagonal."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    return character[(torch.arange(q) - torch.arange(q)[:, None]) % q]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
