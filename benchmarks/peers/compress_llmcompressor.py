"""A model put on a grid by llm-compressor's GPTQ, in its own environment: compress_llmcompressor.py SPEC.json.

SPEC: ``model``, ``auto`` (the class that loads it), ``calibration`` (a .pt file with a list of int64 ids), ``check``
(one of (rows, length)), ``scheme`` (one of its presets), ``out`` (directory), ``logits`` (a .pt file: ``dense`` and
``compressed`` outputs of the check rows in float32, ``versions``), ``threads``. The recipe is that of its examples:
every linear layer but the head.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer


def logits(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=row[None])[0].float() for row in rows])


def main() -> None:
    import compressed_tensors
    import llmcompressor
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    rows, check = torch.load(spec["calibration"]), torch.load(spec["check"])
    auto = getattr(transformers, spec.get("auto", "AutoModelForCausalLM"))
    dense = logits(auto.from_pretrained(spec["model"], dtype=torch.float32), check)
    model = auto.from_pretrained(spec["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    data = Dataset.from_dict({"input_ids": [r.tolist() for r in rows], "attention_mask": [[1] * len(r) for r in rows]})
    oneshot(
        model=model, dataset=data, recipe=GPTQModifier(targets="Linear", scheme=spec["scheme"], ignore=["lm_head"]),
        max_seq_length=max(map(len, rows)), num_calibration_samples=len(rows), shuffle_calibration_samples=False,
        processor=tokenizer,
    )  # fmt: skip
    compressed = logits(model, check)
    model.save_pretrained(spec["out"], save_compressed=True)
    versions = {
        "llm-compressor": llmcompressor.__version__, "compressed-tensors": compressed_tensors.__version__,
        "transformers": transformers.__version__, "torch": str(torch.__version__),
    }  # fmt: skip
    torch.save({"dense": dense, "compressed": compressed, "versions": versions}, spec["logits"])


if __name__ == "__main__":
    main()
