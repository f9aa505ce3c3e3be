"""A table of measurements, one row per document or query, and the metrics that are made of such tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimwright.errors import InputError
from slimwright.evaluate.bootstrap import Estimate, interval, paired_interval


@dataclass(frozen=True)
class Table:
    """What one model gave on each document or query.

    Attributes:
        names: of the rows.
        columns: (rows,) float64 by name, e.g. ``nats``, ``tokens``, ``bytes``.
    """

    names: tuple[str, ...]
    columns: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, names: Sequence[str], **columns: Sequence[float] | np.ndarray) -> Table:
        """A table of float64 columns.

        Raises:
            InputError: a column is not as long as there are names.
        """
        made = {name: np.asarray(values, np.float64) for name, values in columns.items()}
        for name, values in made.items():
            if values.shape != (len(names),):
                raise InputError(f"The column '{name}' has shape {values.shape}, but the table has {len(names)} rows.")
        return cls(tuple(names), made)

    def to_json(self) -> dict[str, Any]:
        return {"names": list(self.names), "columns": {name: list(map(float, c)) for name, c in self.columns.items()}}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Table:
        return cls.of(found["names"], **found["columns"])


def _same(ratio: np.ndarray) -> np.ndarray:
    return ratio


@dataclass(frozen=True)
class Metric:
    """A ratio of two columns' sums, and a rising function of it.

    Because the function rises, the ends of the ratio's interval are carried to the ends of the metric's.

    Attributes:
        name: as in reports.
        values: the column summed above the bar.
        weights: the column below it; None: every row counts once.
        transform: the function.
    """

    name: str
    values: str
    weights: str | None = None
    transform: Callable[[np.ndarray], np.ndarray] = _same

    def within(self, table: Table) -> bool:
        """Whether the table has what the metric needs."""
        return self.values in table.columns and (self.weights is None or self.weights in table.columns)

    def score(self, table: Table, seed: int = 0) -> Estimate:
        """The metric with its 95 % interval over the rows.

        Raises:
            InputError: a column is missing, or see :func:`slimwright.evaluate.bootstrap.interval`.
        """
        found = interval(*self._columns(table), seed=seed)
        return Estimate(*(float(self.transform(np.asarray(end))) for end in (found.value, found.low, found.high)))

    def difference(self, before: Table, after: Table, seed: int = 0) -> Estimate:
        """``after`` minus ``before`` with its paired 95 % interval over the rows.

        Raises:
            InputError: the tables have other rows, or as :meth:`score`.
        """
        if before.names != after.names:
            raise InputError(f"'{self.name}' cannot be compared in pairs: the tables hold other documents.")
        return paired_interval(self._columns(before), self._columns(after), seed, transform=self.transform)

    def change(self, before: Table, after: Table, seed: int = 0) -> dict[str, dict[str, float]]:
        """``{"before", "after", "difference"}``, each ``{value, low, high}``; the difference in pairs."""
        return {
            "before": self.score(before, seed).to_json(),
            "after": self.score(after, seed).to_json(),
            "difference": self.difference(before, after, seed).to_json(),
        }

    def _columns(self, table: Table) -> tuple[np.ndarray, np.ndarray]:
        if not self.within(table):
            raise InputError(f"'{self.name}' needs the columns '{self.values}' and '{self.weights or 'none'}'.")
        weights = np.ones(len(table.names)) if self.weights is None else table.columns[self.weights]
        return table.columns[self.values], weights
