"""Logits of a GGUF file in llama.cpp: logits_llama_cpp.py SPEC.json.

SPEC: ``file``, ``texts`` (lists of tokens), ``strings`` (texts to tokenize; ``special``: with special tokens),
``result`` (a .npz file: ``logits0``, ...
``tokens0``, ..., ``version``), ``threads``.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
longest = max(map(len, spec["texts"]))
model = llama_cpp.Llama(
    model_path=spec["file"], n_ctx=longest + 8, n_batch=longest, logits_all=True, verbose=False,
    n_threads=spec["threads"], n_threads_batch=spec["threads"],
)  # fmt: skip
found = {"version": np.array(llama_cpp.__version__)}
for index, text in enumerate(spec["texts"]):
    model.reset()
    model.eval(text)
    found[f"logits{index}"] = np.array(model.scores[: len(text)], dtype=np.float32)
for index, text in enumerate(spec["strings"]):
    found[f"tokens{index}"] = np.array(model.tokenize(text.encode(), add_bos=False, special=spec.get("special", False)))
np.savez(spec["result"], **found)
