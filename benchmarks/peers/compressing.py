"""What a compressor of another library is given and what it leaves: a spec in JSON, tensors in .pt files.

The spec: ``model``, ``auto`` (the class that loads it), ``calibration`` (a .pt file with a list of int64 ids),
``check`` (one of (rows, length)), ``scheme`` (one of the library's presets), ``out`` (directory), ``logits`` (a .pt
file: ``dense`` and ``compressed`` outputs of the check rows in float32, ``versions``), ``threads``.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer


class Work:
    """The model of the spec that the command line names, its tokenizer and its rows of calibration."""

    def __init__(self) -> None:
        self.spec = spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        torch.set_num_threads(spec["threads"])
        self.rows, self.check = torch.load(spec["calibration"]), torch.load(spec["check"])
        auto = getattr(transformers, spec.get("auto", "AutoModelForCausalLM"))
        self.dense = self.logits(auto.from_pretrained(spec["model"], dtype=torch.float32))
        self.model = auto.from_pretrained(spec["model"], dtype="auto")
        self.tokenizer = AutoTokenizer.from_pretrained(spec["model"])

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """Outputs of the check rows in float32."""
        with torch.no_grad():
            return torch.cat([model(input_ids=row[None])[0].float() for row in self.check])

    def save(self, compressed: torch.Tensor, versions: dict[str, str]) -> None:
        """Leave both models' outputs."""
        versions |= {"transformers": transformers.__version__, "torch": str(torch.__version__)}
        torch.save({"dense": self.dense, "compressed": compressed, "versions": versions}, self.spec["logits"])
