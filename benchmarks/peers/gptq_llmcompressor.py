"""GPTQ by llm-compressor, in its own environment: ``python gptq_llmcompressor.py MODEL TOKENS HELDOUT OUT TOKENIZER``.

TOKENS and HELDOUT are files with (rows, length) int64 ids; OUT gets the held-out logits, and stdout one JSON object:
seconds without loading, anonymous memory at the peak above the loaded model's, versions.
"""

import json
import sys
import threading
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def anonymous() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def main() -> None:
    import llmcompressor
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    directory, tokens, heldout, out, tokenizer = sys.argv[1:6]
    rows = torch.load(tokens)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    recipe = GPTQModifier(
        targets="Linear", scheme="W4A16", ignore=["lm_head"], dampening_frac=0.01, block_size=128, actorder="static"
    )
    base, peak, running = anonymous(), 0, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, anonymous())
            time.sleep(0.02)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started, spent = time.perf_counter(), time.process_time()
    oneshot(
        model=model, dataset=data, recipe=recipe, max_seq_length=rows.shape[1], num_calibration_samples=len(rows),
        shuffle_calibration_samples=False, processor=AutoTokenizer.from_pretrained(tokenizer),
    )  # fmt: skip
    seconds, cpu = time.perf_counter() - started, time.process_time() - spent
    running = False
    watcher.join()
    with torch.no_grad():
        logits = torch.cat([model(input_ids=row[None]).logits.float() for row in torch.load(heldout)])
    torch.save(logits, out)
    found = {"seconds": seconds, "cpu_seconds": cpu, "loaded_bytes": base, "peak_bytes": peak}
    print(json.dumps(found | {"version": llmcompressor.__version__}))


if __name__ == "__main__":
    main()
