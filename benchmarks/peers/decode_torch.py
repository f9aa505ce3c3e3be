"""Decoding with another library's packed weights, in its own environment: ``python decode_torch.py KIND MODEL``.

KIND: torchao-int4, torchao-int8, quanto-int4. Prints one line when it is ready, then for each line of
``{"what": "decode" or "prefill", "batch": N}`` on standard input the seconds of one step or of the prompt.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache

PROMPT, STEPS, PREFILL = 32, 8, 512


def load(kind: str, directory: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    if kind == "quanto-int4":
        from optimum.quanto import freeze, qint4, quantize

        quantize(model, weights=qint4)
        freeze(model)
        return model
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    if kind == "torchao-int8":
        quantize_(model, Int8WeightOnlyConfig())
    else:
        from torchao.prototype.int4_opaque_tensor import Int4WeightOnlyOpaqueTensorConfig

        quantize_(model, Int4WeightOnlyOpaqueTensorConfig(group_size=128))
    return model


@torch.inference_mode()
def decode(model: torch.nn.Module, batch: int) -> float:
    ids = torch.randint(0, 1000, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    started = time.perf_counter()
    for _ in range(STEPS):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return (time.perf_counter() - started) / STEPS


@torch.inference_mode()
def prefill(model: torch.nn.Module) -> float:
    ids = torch.randint(0, 1000, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    model(ids, logits_to_keep=1)
    return time.perf_counter() - started


def main() -> None:
    model = load(sys.argv[1], sys.argv[2])
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        seconds = prefill(model) if asked["what"] == "prefill" else decode(model, asked["batch"])
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
