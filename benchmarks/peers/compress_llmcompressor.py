"""A model put on a grid by llm-compressor's GPTQ, in its own environment: compress_llmcompressor.py SPEC.json.

SPEC: ``model``, ``calibration`` and ``check`` (.pt files of (rows, length) int64 ids), ``scheme`` (one of its presets),
``out`` (directory), ``logits`` (a .pt file: ``dense`` and ``compressed`` logits of the check rows in float32,
``versions``), ``threads``. The recipe is that of its examples: every linear layer but the head.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def logits(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=row[None]).logits.float() for row in rows])


def main() -> None:
    import compressed_tensors
    import llmcompressor
    import transformers
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    rows, check = torch.load(spec["calibration"]), torch.load(spec["check"])
    dense = logits(AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32), check)
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    oneshot(
        model=model, dataset=data, recipe=GPTQModifier(targets="Linear", scheme=spec["scheme"], ignore=["lm_head"]),
        max_seq_length=rows.shape[1], num_calibration_samples=len(rows), shuffle_calibration_samples=False,
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
