"""What exports give in the programs that load them, beside ``slimwright.load`` of the result that they were made of.

``python -m benchmarks.exports``. The bundled language model and the zoo's Qwen2, put on each grid by rounding. In
compressed-tensors with weights only: the same 64 greedy tokens of three prompts, in float32, in plain transformers
without slimwright. Elsewhere teacher-forced on 1,200 tokens of held-out text: mean KL below 1e-3, and every token on
which the two disagree lies at a gap between the first two logits below the noise, which is the largest difference that
bfloat16 makes to a logit of the reference; the tensors of a GGUF file weigh what the plan's blocks do, to the byte.
Where inputs are rounded, in compressed-tensors to scales that differ from ours by 127 / 127.5, only the KL is shown.
``PEERS`` names the directory of the peers' environments: ``ct`` has
transformers and compressed-tensors, ``d`` llama-cpp-python; what is missing is left out by name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer

import slimwright
from benchmarks.common import Row, exit_code, publish, scratch
from slimwright.checkpoint import Checkpoint
from slimwright.zoo import bundled_path, model
from slimwright.zoo.text import standard_library

PEERS = Path(os.environ.get("PEERS", "/tmp/peers"))
SCRIPTS = Path(__file__).with_name("peers")
PROMPTS = ("def read(self, name):\n    ", "import os\n\n", "The ")
STRINGS = ("Hello, wörld!  it's 12345\n\n\tx = [1, 2]\n",)
NEW_TOKENS, PIECES, LENGTH = 64, 6, 200
MOST_KL = 1e-3
COMPRESSED = (
    ("int4:g128:sym", None), ("int8:row:sym", None), ("fp8", None),
    ("int8:row:sym", "int8:token"), ("fp8", "fp8:token"),
)  # fmt: skip
GGUF = {"q4_0": 18 / 32, "q8_0": 34 / 32, "q4_k": 144 / 256, "q6_k": 210 / 256}
"""Bytes per weight of ggml's blocks."""


def run(python: Path, script: str, spec: dict[str, Any], folder: Path) -> None:
    """A script of the peers' in its own environment."""
    (folder / "spec.json").write_text(json.dumps(spec))
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), str(SCRIPTS / script), str(folder / "spec.json")],
        cwd=folder, env=clean, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{script} failed in {python}:\n{done.stderr[-2000:]}")


def ours(
    directory: Path, prompts: list[list[int]], texts: list[list[int]]
) -> tuple[list[list[int]], list[Tensor], float]:
    """Greedy tokens, logits, and the largest difference that bfloat16 makes to them."""
    loaded = slimwright.load(directory, dtype=torch.float32)
    tokens, logits = [], []
    with torch.no_grad():
        for prompt in prompts:
            found = loaded.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
            )  # fmt: skip
            tokens.append(found[0, len(prompt) :].tolist())
        logits = [loaded(input_ids=torch.tensor([text])).logits[0].float() for text in texts]
        narrow = slimwright.load(directory, dtype=torch.bfloat16)
        noise = max(
            float((narrow(input_ids=torch.tensor([text])).logits[0].float() - there).abs().max())
            for text, there in zip(texts, logits, strict=True)
        )
    return tokens, logits, noise


def teacher_forced(reference: list[Tensor], other: list[Tensor], noise: float) -> Row:
    """Mean KL in nats per token, tokens on which they disagree, the largest gap there, and the verdict."""
    kl, disagreements, gap, count = 0.0, 0, 0.0, 0
    for here, there in zip(reference, other, strict=True):
        p, q = here.log_softmax(-1), there.float().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        count += len(p)
        apart = p.argmax(-1) != q.argmax(-1)
        top = p.topk(2).values
        disagreements += int(apart.sum())
        gap = max([gap, *(top[:, 0] - top[:, 1])[apart].tolist()])
    ok = kl / count < MOST_KL and gap < noise
    return {"kl": kl / count, "disagree": f"{disagreements}/{count}", "gap": gap, "noise": noise, "ok": ok}


def planned_bytes(fitted: Row, source: str) -> int:
    """What the tensors of a GGUF file weigh by the plan: blocks, vectors in float32, the rest as it was."""
    tensors = Checkpoint.open(source).tensors
    total = 0.0
    for line in fitted["ledger"]:
        info = tensors[line["site"]]
        plain = info.dtype.itemsize if len(info.shape) > 1 else 4
        total += info.numel * GGUF.get(line["grid"], plain)
    return int(total)


def measured(name: str, source: str, folder: Path) -> list[Row]:
    """Every export of one model."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    plain = Tokenizer.from_file(str(Path(source) / "tokenizer.json"))  # transformers splits text by the family's rule
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    ids = tokenizer("\n".join(document.text for document in standard_library("heldout"))[:40_000])["input_ids"]
    texts = [ids[start : start + LENGTH] for start in range(0, PIECES * LENGTH, LENGTH)]
    rows: list[Row] = []
    compressed, llama = PEERS / "ct" / "bin" / "python", PEERS / "d" / "bin" / "python"
    jobs = [("compressed-tensors", grid, rounding) for grid, rounding in COMPRESSED if compressed.exists()]
    jobs += [("gguf", grid, None) for grid in GGUF if llama.exists()]
    for target, grid, rounding in jobs:
        tag = f"{name}-{target}-{grid}-{rounding}".replace(":", "_")
        fitted, out = folder / f"{tag}.fit", folder / tag
        made = slimwright.fit(
            source, str(fitted), grid=grid, method="quantize/rtn", data="none", activations=rounding, quiet=True,
            rules=("embed: bf16",) if target == "compressed-tensors" else (),
        )  # fmt: skip
        report = slimwright.export(str(fitted), to=target, out=str(out))
        tokens, logits, noise = ours(fitted, prompts, texts)
        spec: dict[str, Any] = {"texts": texts, "threads": torch.get_num_threads()}
        row: Row = {
            "model": name,
            "target": target,
            "grid": grid,
            "inputs": rounding or "",
            "MB": report["size"]["after"] / 1e6,
        }
        if target == "gguf":
            spec |= {"file": str(out / "model.gguf"), "strings": STRINGS, "result": str(folder / "found.npz")}
            run(llama, "logits_llama_cpp.py", spec, folder)
            found = np.load(folder / "found.npz")
            row |= teacher_forced(logits, [torch.from_numpy(found[f"logits{i}"]) for i in range(PIECES)], noise)
            row["tokenizer"] = all(
                found[f"tokens{i}"].tolist() == plain.encode(text).ids for i, text in enumerate(STRINGS)
            )
            written = sum(int(tensor.n_bytes) for tensor in GGUFReader(out / "model.gguf").tensors)
            row["exact"] = written == planned_bytes(made.data, source) == report["size"]["tensors"]
            row["ok"] &= row["tokenizer"] and row["exact"]
        else:
            spec |= {
                "directory": str(out), "prompts": prompts, "new_tokens": NEW_TOKENS, "result": str(folder / "found.pt")
            }  # fmt: skip
            run(compressed, "greedy_transformers.py", spec, folder)
            found = torch.load(folder / "found.pt")
            row |= teacher_forced(logits, found["logits"], noise)
            row["greedy"] = f"{sum(a == b for a, b in zip(tokens, found['tokens'], strict=True))}/{len(tokens)}"
            row["ok"] = rounding is not None or found["tokens"] == tokens
        rows.append(row)
    for peer, python in (("compressed-tensors", compressed), ("llama-cpp-python", llama)):
        if not python.exists():
            rows.append({"model": name, "target": peer, "grid": f"left out: there is no {python}"})
    return rows


def main() -> int:
    started = time.time()
    with scratch("exports") as folder:
        rows = measured("bundled", str(bundled_path()), folder) + measured("qwen2", str(model("qwen2")), folder)
    columns = {
        "model": "model", "target": "target", "grid": "grid", "inputs": "inputs", "MB": "MB",
        "greedy": "64 greedy tokens", "kl": "KL, nats/token", "disagree": "disagree", "gap": "largest gap there",
        "noise": "bf16 noise", "tokenizer": "tokenizer", "exact": "bytes as planned", "ok": "ok",
    }  # fmt: skip
    return exit_code(publish("exports", rows, columns, started))


if __name__ == "__main__":
    sys.exit(main())
