"""Counters of the server, in Prometheus' text format."""

from __future__ import annotations

import bisect
from collections.abc import Callable

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Counter:
    """A number that grows, by label."""

    def __init__(self, help: str, label: str = "") -> None:
        self.help, self.label = help, label
        self.values: dict[str, float] = {} if label else {"": 0.0}

    def add(self, amount: float = 1.0, label: str = "") -> None:
        self.values[label] = self.values.get(label, 0.0) + amount

    def lines(self, name: str) -> list[str]:
        head = [f"# HELP {name} {self.help}", f"# TYPE {name} counter"]
        values = sorted(list(self.values.items()))
        return head + [f"{name}{_labels(self.label, label)} {value:g}" for label, value in values]


class Histogram:
    """Durations in seconds."""

    def __init__(self, help: str) -> None:
        self.help = help
        self.counts = [0] * (len(_SECONDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(_SECONDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str) -> list[str]:
        found, total = [f"# HELP {name} {self.help}", f"# TYPE {name} histogram"], 0
        for bound, count in zip((*(f"{bound:g}" for bound in _SECONDS), "+Inf"), list(self.counts)):
            total += count
            found.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*found, f"{name}_sum {self.sum:.6f}", f"{name}_count {total}"]


class Gauge:
    """A number as it is now."""

    def __init__(self, help: str, value: Callable[[], float]) -> None:
        self.help, self.value = help, value

    def lines(self, name: str) -> list[str]:
        return [f"# HELP {name} {self.help}", f"# TYPE {name} gauge", f"{name} {self.value():g}"]


class Metrics:
    """All of a server's counters. Those of the engine are written by its thread alone."""

    def __init__(self) -> None:
        self.all: dict[str, Counter | Histogram | Gauge] = {}
        self.responses = self._counter("http_responses", "HTTP responses", "status")
        self.finished = self._counter("finished", "Finished texts", "reason")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.generated_tokens = self._counter("generated_tokens", "Tokens made")
        self.steps = self._counter("steps", "Turns, each of which brings every running text a token")
        self.embedded = self._counter("embedded_texts", "Texts embedded")
        self.first_token = self._histogram("first_token_seconds", "From arrival to the first token")
        self.between_tokens = self._histogram("between_tokens_seconds", "Between two tokens of a text")

    def gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        self.all[f"slimwright_{name}"] = Gauge(help, value)

    def _counter(self, name: str, help: str, label: str = "") -> Counter:
        self.all[f"slimwright_{name}_total"] = made = Counter(help, label)
        return made

    def _histogram(self, name: str, help: str) -> Histogram:
        self.all[f"slimwright_{name}"] = made = Histogram(help)
        return made

    def text(self) -> str:
        """The format that Prometheus reads, version 0.0.4."""
        return "".join(f"{line}\n" for name, found in self.all.items() for line in found.lines(name))


def _labels(label: str, value: str) -> str:
    return f'{{{label}="{value}"}}' if label else ""
