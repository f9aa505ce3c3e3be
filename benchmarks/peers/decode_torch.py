"""Decoding with dense weights or another library's packed ones, in an environment of its own.

``python decode_torch.py KIND MODEL``, KIND: dense-bfloat16-compiled, dense-float32-compiled, torchao-int4,
torchao-int8-compiled, torchao-int4-compiled, quanto-int4. Prints one line when it is ready, then for each line of
``{"what": "decode", "prefill" or "first", "batch": N}`` on standard input the seconds of one step, of the prompt, or of
a short prompt and one step. What is compiled has a static cache, as torch.compile asks.
"""

import sys
import time

import torch
from answering import serve
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

PROMPT, PREFILL, ROOM = 32, 512, 256


def load(kind: str, directory: str) -> torch.nn.Module:
    dtype = torch.float32 if kind == "dense-float32-compiled" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    if kind.startswith("dense"):
        return model
    if kind == "quanto-int4":
        from optimum.quanto import freeze, qint4, quantize

        quantize(model, weights=qint4)
        freeze(model)
        # batches of rows need contiguous inputs, as version 0.2.7 does not see to itself
        model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        return model
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    if kind.startswith("torchao-int8"):
        quantize_(model, Int8WeightOnlyConfig())
    else:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=128))
    return model


class Decoder:
    """A model, and a cache for each batch in which decoding goes on."""

    def __init__(self, kind: str, directory: str) -> None:
        self.model = load(kind, directory)
        self.compiled = kind.endswith("-compiled")
        self.run = torch.compile(self.model.forward, dynamic=False) if self.compiled else self.model.forward
        self.caches = {}

    def cache(self, length: int, batch: int):
        if not self.compiled:
            return DynamicCache()
        config = self.model.config
        cache = StaticCache(config=config, max_cache_len=length)
        cache.early_initialization(
            batch, config.num_key_value_heads, config.hidden_size // config.num_attention_heads, self.model.dtype, "cpu"
        )
        return cache

    @torch.no_grad()
    def first(self) -> float:
        started = time.perf_counter()
        ids, cache = torch.randint(0, 1000, (1, PROMPT)), self.cache(ROOM, 1)
        token = self.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        self.run(input_ids=token, past_key_values=cache, position_ids=torch.tensor([[PROMPT]]))
        return time.perf_counter() - started

    @torch.no_grad()
    def decode(self, batch: int) -> float:
        steps = 8 if batch == 1 else 4 if batch <= 8 else 2
        if batch not in self.caches:
            ids = torch.randint(0, 1000, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
            cache = self.cache(ROOM, batch)
            token = self.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            self.caches[batch] = (cache, token, PROMPT)
        cache, token, length = self.caches[batch]
        started = 0.0
        for step in range(-1, steps):
            if step == 0:  # one step before, which does not count
                started = time.perf_counter()
            at = torch.full((batch, 1), length)
            token = self.run(input_ids=token, past_key_values=cache, position_ids=at).logits[:, -1:].argmax(-1)
            length += 1
        seconds = (time.perf_counter() - started) / steps
        self.caches[batch] = (cache, token, length)
        return seconds

    @torch.no_grad()
    def prefill(self) -> float:
        ids = torch.randint(0, 1000, (1, PREFILL), generator=torch.Generator().manual_seed(0))
        cache = self.cache(PREFILL, 1)
        started = time.perf_counter()
        self.run(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        return time.perf_counter() - started


def main() -> None:
    serve(Decoder(sys.argv[1], sys.argv[2]))


if __name__ == "__main__":
    main()
