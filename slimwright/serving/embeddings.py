"""Vectors of texts, one request after the other in one thread."""

from __future__ import annotations

import asyncio
import base64
import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from slimwright.evaluate.embed import embed
from slimwright.serving.metrics import Metrics
from slimwright.serving.requests import BusyError


class Embedder:
    """An encoder.

    Args:
        model: a ``SentenceTransformer``, or a transformers encoder.
        tokenizer: its own.
        longest: tokens that a text may have.
        queue: requests that may wait.
        metrics: to count in.
    """

    def __init__(self, model: Any, tokenizer: Any, longest: int, queue: int, metrics: Metrics) -> None:
        self._model, self._tokenizer, self.longest, self._queue = model, tokenizer, longest, queue
        # Its own, because the model changes how its tokenizer pads and cuts while other threads count.
        self._counting = copy.deepcopy(tokenizer)
        self.lengths(["a"])
        self._metrics = metrics
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, "slimwright-embedder")
        metrics.gauge("waiting", "Requests that wait or run", lambda: self._waiting)

    def lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text, those that the model adds included."""
        return [len(ids) for ids in self._counting(texts, verbose=False)["input_ids"]]

    async def embed(self, texts: list[str]) -> Tensor:
        """(texts, features) float32.

        Raises:
            BusyError: too many requests wait.
        """
        if self._waiting > self._queue:
            raise BusyError(f"{self._waiting} requests wait already: try again later.")
        self._waiting += 1
        try:
            vectors = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, texts)
        finally:
            self._waiting -= 1
        self._metrics.embedded.add(len(texts))
        return vectors

    @torch.no_grad()
    def _run(self, texts: list[str]) -> Tensor:
        return embed(self._model, self._tokenizer, texts, longest=self.longest)

    def stop(self) -> None:
        self._thread.shutdown()


def as_base64(vector: Tensor) -> str:
    """Little-endian float32, as OpenAI writes it."""
    return base64.b64encode(vector.contiguous().numpy().astype("<f4").tobytes()).decode()
