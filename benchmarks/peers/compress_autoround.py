"""A model put on a grid by AutoRound, in its own environment: compress_autoround.py SPEC.json.

SPEC as of compress_llmcompressor.py. Its defaults: 200 steps a block in batches of 8 sequences, symmetric groups of
128, every linear layer but the head; written in the layout of GPTQ checkpoints.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

BATCH = 8


def logits(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=row[None])[0].float() for row in rows])


def main() -> None:
    import auto_round
    from auto_round import AutoRound

    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    rows, check = torch.load(spec["calibration"]), torch.load(spec["check"])
    auto = getattr(transformers, spec.get("auto", "AutoModelForCausalLM"))
    dense = logits(auto.from_pretrained(spec["model"], dtype=torch.float32), check)
    model = auto.from_pretrained(spec["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    data = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.stack(list(rows)).split(BATCH)
    ]
    rounding = AutoRound(
        model, tokenizer, scheme=spec["scheme"], iters=200, batch_size=BATCH, nsamples=len(rows),
        seqlen=len(rows[0]), dataset=data, device_map="cpu",
    )  # fmt: skip
    rounding.quantize()
    compressed = logits(rounding.model, check)
    rounding.save_quantized(spec["out"], format="auto_gptq")
    versions = {
        "auto-round": auto_round.__version__, "transformers": transformers.__version__,
        "torch": str(torch.__version__),
    }  # fmt: skip
    torch.save({"dense": dense, "compressed": compressed, "versions": versions}, spec["logits"])


if __name__ == "__main__":
    main()
