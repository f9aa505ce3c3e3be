"""How fast a model runs: prefill and decoding, or samples per second.

Source of the model of one request: the idealized runtime of Narayanan et al. (2023, "Cheaply Evaluating Inference
Efficiency Metrics for Autoregressive Transformer APIs"): T(p, o) = F(p) + g (o − 1), with p tokens of prompt and o ≥ 1
of output. F is the prefill, g the seconds of a further token.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

PROMPT = 256
OUTPUTS = (1, 9, 33)
"""Lengths of output; the slope of the time over them is what a token costs."""
REPEATS = 3
PATIENCE = 20.0
"""Seconds after which a length is not timed again."""


def median_seconds(work: Callable[[], object]) -> float:
    """Median of up to three runs after one to warm up; fewer where they take longer than 20 s together."""
    began = time.perf_counter()
    work()
    taken: list[float] = []
    while not taken or (len(taken) < REPEATS and time.perf_counter() - began < PATIENCE):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


@torch.inference_mode()
def generation_speed(model: Any, prompt: Tensor, outputs: Sequence[int] = OUTPUTS) -> dict[str, float]:
    """Tokens per second of ``generate`` as users call it: greedy, one sequence, with its key-value cache.

    Args:
        model: a language model that generates; an encoder-decoder reads the prompt in its encoder.
        prompt: (tokens,) int64.
        outputs: numbers of new tokens, the first of them 1; the prompt and the most of them must fit the positions.

    Returns:
        ``prefill_tokens_per_second``: the prompt's tokens over the time of the prompt and one new token;
        ``decode_tokens_per_second``: 1 over the slope of the time over the number of new tokens (least squares); left
        out where the times do not rise, because the clock cannot tell them apart.
    """

    inputs = {"input_ids": prompt[None]}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        inputs["attention_mask"] = torch.ones_like(prompt[None])

    def generate(count: int) -> Callable[[], object]:
        return lambda: model.generate(
            **inputs, do_sample=False, num_beams=1, min_new_tokens=count, max_new_tokens=count, pad_token_id=0
        )

    seconds = [median_seconds(generate(count)) for count in outputs]
    slope = float(np.polyfit(np.asarray(outputs, float), seconds, 1)[0])
    prefill = {"prefill_tokens_per_second": len(prompt) / seconds[0]}
    return {**prefill, "decode_tokens_per_second": 1 / slope} if slope > 0 else prefill


@torch.inference_mode()
def sample_speed(work: Callable[[], object], samples: int, unit: str) -> dict[str, float]:
    """``texts_per_second`` or ``images_per_second`` of a piece of work on a number of samples."""
    return {f"{unit}_per_second": samples / median_seconds(work)}
