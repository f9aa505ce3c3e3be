"""Continuous batching: one thread that makes a token of every running text, and lets texts join and leave between
tokens.

A turn brings every text that is past its prompt one token, and feeds parts of the other prompts, in the order of
arrival, as many as there is room for (:mod:`slimwright.serving.batch`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from slimwright.errors import InputError
from slimwright.serving import sampling
from slimwright.serving.batch import Batcher, Part
from slimwright.serving.metrics import Metrics
from slimwright.serving.requests import BusyError, Deliver, Finish, Piece, Request, TokenScore
from slimwright.serving.text import Detokenizer, Stops

_log = logging.getLogger("slimwright.serving")


@dataclass(eq=False)
class _Text:
    """A request that waits or runs."""

    request: Request
    deliver: Deliver
    arrived: float
    detokenizer: Detokenizer
    stops: Stops
    numbers: torch.Generator | None
    cancelled: bool = False
    done: bool = False
    cache: Cache | None = None
    fed: int = 0
    token: int = -1
    made: int = 0
    last: float = 0.0
    pending: str = ""
    pending_tokens: int = 0
    scores: list[TokenScore] = field(default_factory=list)

    @property
    def is_fed(self) -> bool:
        """Whether it is past its prompt."""
        return self.fed == len(self.request.prompt)


class Ticket:
    """Stands for a submitted request."""

    def __init__(self, engine: Engine, text: _Text) -> None:
        self._engine, self._text = engine, text

    def cancel(self) -> None:
        """Give it up; what it holds is freed before the next token. Nothing happens if it has ended."""
        self._text.cancelled = True
        self._engine.wake()


class Engine:
    """Texts of many requests from one model.

    Args:
        model: a causal language model of transformers on the CPU.
        tokenizer: its own.
        slots: texts that run at once.
        queue: texts that may wait.
        ends: tokens that end a text.
        metrics: to count in.
        memory: bytes that the caches of all running texts may take together.

    Raises:
        NotBuiltError: the model cannot be served.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, slots: int, queue: int, ends: frozenset[int], metrics: Metrics,
        memory: int,
    ) -> None:  # fmt: skip
        self.batcher = Batcher(model)
        self._tokenizer, self.slots, self._queue, self._ends = tokenizer, slots, queue, ends
        self._metrics = metrics
        self.most_tokens = memory // self.batcher.token_bytes
        """Prompts and answers of all running texts together; also of one."""
        self._lock = threading.Condition()
        self._waiting: deque[_Text] = deque()
        self._running: list[_Text] = []
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="slimwright-engine", daemon=True)
        metrics.gauge("waiting", "Texts that wait", lambda: len(self._waiting))
        metrics.gauge("running", "Texts that run", lambda: len(self._running))

    def start(self) -> None:
        self._thread.start()

    def submit(self, requests: Sequence[tuple[Request, Deliver]]) -> list[Ticket]:
        """Queue some requests, all or none.

        Raises:
            BusyError: there is no room, or the engine is stopping; InputError: there never is so much room.
        """
        if len(requests) > self._queue + self.slots:
            raise InputError(
                f"{len(requests)} texts are asked for in one request, but this server takes {self._queue + self.slots} "
                "at once: ask for fewer."
            )
        now = time.monotonic()
        texts = [
            _Text(
                request, deliver, now, Detokenizer(self._tokenizer, request.prompt), Stops(request.stop),
                sampling.generator(request.sampling),
            )
            for request, deliver in requests
        ]  # fmt: skip
        with self._lock:
            if self._stopping:
                raise BusyError("The server is stopping: try another one.")
            if len(self._waiting) + len(texts) > self._queue + max(0, self.slots - len(self._running)):
                raise BusyError(f"{len(self._waiting)} requests wait already: try again later.")
            self._waiting.extend(texts)
            self._lock.notify()
        return [Ticket(self, text) for text in texts]

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function that uses the model between two forwards."""
        future: Future[Any] = Future()
        with self._lock:
            if self._stopping:
                raise BusyError("The server is stopping: try another one.")
            self._calls.append((function, future))
            self._lock.notify()
        return future

    def wake(self) -> None:
        with self._lock:
            self._lock.notify()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def stop(self, seconds: float | None = None) -> None:
        """Take no more, finish what was taken, and end the thread.

        Args:
            seconds: after which what still runs is given up; None: never.
        """
        with self._lock:
            self._stopping = True
            self._lock.notify()
        if self._thread.ident is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            with self._lock:
                for text in (*self._waiting, *self._running):
                    text.cancelled = True
            self._thread.join()

    # -- the thread ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:  # a defect: whoever waits is told, and /health says that the engine does not run
            with self._lock:
                self._stopping = True
                texts, calls = [*self._running, *self._waiting], self._calls
            self._fail(texts, error)
            for _, future in calls:
                future.set_exception(BusyError("The engine has failed: start the server again."))

    def _turn(self) -> bool:
        """Do what there is to do, one token of every text among it; False: it is all done and no more will come."""
        with self._lock:
            while not (self._waiting or self._running or self._calls or self._stopping):
                self._lock.wait()
            if self._stopping and not (self._waiting or self._running or self._calls):
                return False
            calls, self._calls = self._calls, deque()
        for function, future in calls:
            _answer(function, future)
        self._leave()
        self._join()
        self._forward(self._parts())
        return True

    def _leave(self) -> None:
        """End what was cancelled or takes too long."""
        now = time.monotonic()
        with self._lock:
            texts = [*self._running, *self._waiting]
        for text in texts:
            if text.cancelled:
                self._end(text, "cancelled")
            elif now - text.arrived > text.request.seconds:
                self._end(text, "timeout")

    def _join(self) -> None:
        """Let waiting texts run, in the order of arrival, while there is a slot and memory for all that they may
        become."""
        with self._lock:
            used = sum(text.request.tokens for text in self._running)
            while self._waiting and len(self._running) < self.slots:
                used += self._waiting[0].request.tokens
                if used > self.most_tokens:
                    return
                self._running.append(self._waiting.popleft())

    def _parts(self) -> list[tuple[_Text, Part]]:
        """What this turn brings."""
        parts = []
        for text in (fed := [text for text in self._running if text.is_fed]):
            parts.append((text, self._part(text, [text.token], len(text.request.prompt) + text.made - 1)))
        room = self.batcher.room(len(fed))
        for text in self._running:
            if not text.is_fed and room > 0:
                prompt = text.request.prompt
                count = self.batcher.take(len(prompt), text.fed, room)
                parts.append((text, self._part(text, prompt[text.fed : text.fed + count], text.fed)))
                room -= count
        return parts

    def _part(self, text: _Text, tokens: Sequence[int], start: int) -> Part:
        text.cache = text.cache or self.batcher.cache()
        return Part(text.cache, tokens, start, text.request.adapter)

    def _forward(self, parts: Sequence[tuple[_Text, Part]]) -> None:
        """Run them, and choose the next token of each text that is past its prompt then."""
        if not parts:
            return
        try:
            logits = self.batcher.run([part for _, part in parts])
            best = logits.argmax(-1).tolist()
        except Exception as error:
            for text, part in parts:  # each by itself, so that one that cannot be run ends no other
                if len(parts) > 1 and self.batcher.intact(part):
                    self._forward([(text, part)])
                else:
                    self._fail([text], error)
            return
        self._metrics.steps.add()
        for row, (text, part) in enumerate(parts):
            if not text.is_fed:
                text.fed += len(part.tokens)
                self._metrics.prompt_tokens.add(len(part.tokens))
            try:
                if text.is_fed:
                    self._take(text, logits[row], best[row])
            except Exception as error:
                self._fail([text], error)

    def _take(self, text: _Text, logits: Tensor, best: int) -> None:
        """Choose the next token and deliver what it brings.

        Args:
            logits: (vocabulary,); best: the likeliest token.
        """
        request, now = text.request, time.monotonic()
        token = best if text.numbers is None else sampling.draw(logits, request.sampling, text.numbers)
        (self._metrics.between_tokens if text.made else self._metrics.first_token).add(
            now - (text.last if text.made else text.arrived)
        )
        self._metrics.generated_tokens.add()
        text.token, text.last, text.made = token, now, text.made + 1
        text.pending_tokens += 1
        if token in self._ends:
            self._end(text, "stop")
            return
        if request.logprobs is not None:
            text.scores.append(sampling.score(logits, token, request.logprobs))
        shown, stopped = text.stops.add(text.detokenizer.add(token))
        text.pending += shown
        if stopped:
            self._end(text, "stop", whole=True)
        elif text.made >= request.most:
            self._end(text, "length")
        elif request.stream and (text.pending or text.scores):
            self._deliver(text, None)

    def _end(self, text: _Text, finish: Finish, whole: bool = False, error: str = "") -> None:
        """Free what a text holds and deliver the last of it.

        Args:
            whole: whether its text is complete: a stop string has come.
        """
        if text.done:
            return
        text.done, text.cache = True, None
        with self._lock:
            for places in (self._running, self._waiting):
                if text in places:
                    places.remove(text)
        if not whole:
            shown, stopped = text.stops.add(text.detokenizer.rest())
            text.pending += shown if stopped else shown + text.stops.rest()
            finish = "stop" if stopped and finish == "length" else finish
        self._metrics.finished.add(label=finish)
        self._deliver(text, finish, error)

    def _deliver(self, text: _Text, finish: Finish | None, error: str = "") -> None:
        piece = Piece(text.pending, text.pending_tokens, tuple(text.scores), finish, error)
        text.pending, text.pending_tokens, text.scores = "", 0, []
        try:
            text.deliver(piece)
        except RuntimeError:  # the loop that waited for it has ended
            text.cancelled = True

    def _fail(self, texts: Sequence[_Text], error: Exception) -> None:
        """End texts whose forward failed; the others go on."""
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if not memory:
            _log.exception("a forward failed", exc_info=error)
        what = "there is not enough memory" if memory else f"an unexpected {type(error).__name__} in the model"
        for text in texts:
            self._end(text, "error", whole=True, error=f"The answer failed: {what}.")


def _answer(function: Callable[[], Any], future: Future[Any]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
