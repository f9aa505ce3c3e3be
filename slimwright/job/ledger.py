"""The ledger: every tensor of the source, what was done to it, and why. Anything unaccounted fails the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from slimwright.checkpoint import Checkpoint, TensorInfo
from slimwright.errors import SlimwrightError
from slimwright.model.structure import Structure

ONLY_ZEROS = "its inputs are zero in every token of the calibration data"
"""How the reason of a weight begins that could not be solved for that."""

State = Literal["calibrated", "data-free", "kept", "dropped"]


@dataclass(frozen=True)
class Entry:
    """One line.

    Attributes:
        site: disk name of the source tensor.
        group: its choice group; its own name for tensors that are not sites.
        role: role in the model.
        state: calibrated (tokens seen), data-free, kept (reason) or dropped (with what).
        reason: why it is in that state.
        method: solver's spec; None where nothing was solved.
        grid: the grid's spec; None where kept.
        bits: bits per weight on disk, scales and padding included.
        bytes: bytes on disk of all its tensors.
        error_before: ||W - Q||² / ||W||² of plain rounding on that grid; where calibrated, of the site's outputs on the
            calibration data, (W - Q) H (W - Q)ᵀ / W H Wᵀ.
        error_after: the same of what was written.
        tokens: tokens that the solver saw.
        parameters: elements of the source tensor.
        block: module path of the block it lies in; None outside blocks.
        bytes_before: bytes in the source.
        activations: how what enters it is rounded; None: not.
        written: its name in what is written, where that is another: blocks before it were dropped.
        checksum: SHA-256 (hex) of the values that a solver with data returned, before they were packed; else empty.
    """

    site: str
    group: str
    role: str
    state: State
    reason: str
    method: str | None
    grid: str | None
    bits: float
    bytes: int
    error_before: float
    error_after: float
    tokens: int
    parameters: int
    block: str | None
    bytes_before: int
    checksum: str = ""
    activations: str | None = None
    written: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def dead_inputs(entries: Sequence[Entry], samples: Sequence[str]) -> list[str]:
    """A sentence for every block with weights whose inputs were zero on all samples: a user should know of it.

    Args:
        samples: names of the calibration's, in their order.
    """
    dead: dict[str, list[str]] = {}
    for entry in entries:
        if entry.reason.startswith(ONLY_ZEROS):
            dead.setdefault(entry.block or "", []).append(entry.site)
    return [
        f"The inputs of {' and '.join(repr(name) for name in names)}{f' in {block}' if block else ''} are zero on all "
        f"{len(samples)} samples of the calibration data ('{samples[0]}' is the first), so they were rounded without "
        "data: something before them gives nothing."
        for block, names in dead.items()
    ]


def kept_line(name: str, structure: Structure, reason: str, info: TensorInfo, written: bool) -> Entry:
    """The line of a tensor that stays as it is, or of a tied duplicate that is not written."""
    site = structure.sites.get(name)
    nbytes, parameters = info.nbytes if written else 0, info.numel
    bits = 8 * nbytes / parameters if parameters else 0.0
    group = site.choice_group if site else name
    role = structure.roles.get(name, "other")
    block = site.block if site else block_of(name, structure)
    return Entry(
        name, group, role, "kept", reason, None, None, bits, nbytes, 0.0, 0.0, 0, parameters, block, info.nbytes
    )  # fmt: skip


def block_of(name: str, structure: Structure) -> str | None:
    """Module path of the block that a tensor lies in, by its name in the model."""
    module = structure.to_module.get(name, name)
    blocks = (block.module for stack in structure.stacks for block in stack.blocks)
    return next((block for block in blocks if module.startswith(f"{block}.")), None)


def check_complete(entries: list[Entry], source: Checkpoint, written_bytes: int) -> None:
    """Every tensor of the source has exactly one line, and the lines' bytes are the bytes of the tensors written.

    Raises:
        SlimwrightError: something is unaccounted.
    """
    seen = [entry.site for entry in entries]
    missing = sorted(set(source.tensors) - set(seen))
    if missing or len(seen) != len(set(seen)) or set(seen) - set(source.tensors):
        raise SlimwrightError(
            f"The ledger does not account for every tensor ({len(missing)} missing, first: {missing[:1]}): this is a "
            "defect of slimwright; nothing was published."
        )
    total = sum(entry.bytes for entry in entries)
    if total != written_bytes:
        raise SlimwrightError(
            f"The ledger counts {total} bytes but {written_bytes} were written: this is a defect of slimwright; "
            "nothing was published."
        )
