"""Greedy tokens and logits of a checkpoint in plain transformers, in float32: greedy_transformers.py SPEC.json.

SPEC: ``directory``, ``prompts`` (lists of tokens), ``new_tokens``, ``texts`` (lists of tokens), ``result`` (a .pt file:
``tokens``, ``logits``, ``versions``). Runs in any environment with transformers and what the format needs.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
torch.set_num_threads(int(spec.get("threads", 1)))
if spec.get("slimwright"):
    import slimwright

    model = slimwright.load(spec["directory"], dtype=torch.float32)
else:
    model = AutoModelForCausalLM.from_pretrained(spec["directory"], dtype=torch.float32).eval()
    assert "slimwright" not in sys.modules
tokens, logits = [], []
with torch.no_grad():
    for prompt in spec["prompts"]:
        found = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=spec["new_tokens"], min_new_tokens=spec["new_tokens"], do_sample=False, pad_token_id=0,
        )  # fmt: skip
        tokens.append(found[0, len(prompt) :].tolist())
    for text in spec["texts"]:
        logits.append(model(input_ids=torch.tensor([text])).logits[0].float())
versions = {"transformers": transformers.__version__, "torch": str(torch.__version__)}
for name in ("compressed_tensors", "slimwright"):
    if name in sys.modules:
        versions[name] = getattr(sys.modules[name], "__version__", "?")
torch.save({"tokens": tokens, "logits": logits, "versions": versions}, spec["result"])
