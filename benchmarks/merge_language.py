"""What merging keeps of four fine-tunes of the bundled language model, one for each part of the standard library.

A method's figure is the share of the fine-tunes' gain that the merged model keeps: on a topic's held-out text
``(loss of the bundled model - loss of the merged one) / (loss of the bundled model - loss of that topic's fine-tune)``,
averaged over the topics; 1 is four models' worth, 0 is the bundled model, below 0 is worse than not merging. Scales are
chosen on other text (the calibration part). ``python -m benchmarks.merge_language`` trains the fine-tunes if the cache
lacks them (a minute each).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.common import Row, exit_code, publish
from slimwright import zoo
from slimwright.methods import parse_method
from slimwright.methods.merging import MergeMethod, MergeSite
from slimwright.zoo.objectives import top_level
from slimwright.zoo.recipes import TOPICS
from slimwright.zoo.text import Part, standard_library

WINDOW, WINDOWS = 512, {"calibrate": 6, "heldout": 20}
SCALES = (0.3, 0.6, 1.0, 1.5)
CANDIDATES: dict[str, list[str]] = {
    "linear": ["linear"],
    "task_arithmetic": [f"task_arithmetic,lambda={s}" for s in SCALES],
    "ties": [f"ties,density={d},lambda={s}" for d in (0.2, 0.5) for s in SCALES[1:]],
    "dare": [f"dare,density=0.1,lambda={s}" for s in (0.15, *SCALES[:3])],
    "dare (ties)": [f"dare,density=0.1,consensus=ties,normalize=true,lambda={s}" for s in SCALES[:4]],
    "della": [f"della,density=0.5,lambda={s}" for s in SCALES],
    "breadcrumbs": [f"breadcrumbs,density=0.15,lambda={s}" for s in SCALES],
    "model_stock": ["model_stock"],
    "sce": [f"sce,select_topk={k}" for k in (0.1, 0.5, 1.0)],
    "karcher": ["karcher"],
    "multislerp": ["multislerp"],
    "pcb": [f"pcb,density={d},lambda={s}" for d in (0.1, 0.5) for s in SCALES[1:]],
    "lines (task arithmetic)": [f"lines,inner=task_arithmetic;lambda=1,beta={s}" for s in (0.15, *SCALES[:3])],
    "lines (ties)": [f"lines,inner=ties;density=0.2,beta={s}" for s in SCALES[:4]],
    "consensus": [f"consensus,lambda={s}" for s in SCALES[:4]],
    "compeft": [f"compeft,density=0.2,alpha={s}" for s in SCALES],
}
TALL = (0.2, 0.3, 0.4, 0.5, 0.6)

States = Mapping[str, Tensor]


def windows(part: Part, tokenizer: object) -> dict[str, Tensor]:
    """By topic (windows, WINDOW + 1) tokens, drawn at random from its documents of a part."""
    found = {}
    for topic, packages in TOPICS.items():
        tokens: list[int] = []
        for document in standard_library(part):
            if top_level(document.path) in packages:
                tokens += [0, *tokenizer.encode(document.text, add_special_tokens=False)]  # type: ignore[attr-defined]
        generator = torch.Generator().manual_seed(0)
        starts = torch.randint(len(tokens) - WINDOW, (WINDOWS[part],), generator=generator)
        found[topic] = torch.stack([torch.tensor(tokens[s : s + WINDOW + 1]) for s in starts.tolist()])
    return found


class Losses:
    """Nats per token of a state dict on the topics' text; one model, loaded again and again."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._model = AutoModelForCausalLM.from_pretrained(zoo.bundled_path(), dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(zoo.bundled_path())
        self._tokens = {part: windows(part, tokenizer) for part in ("calibrate", "heldout")}

    @torch.inference_mode()
    def __call__(self, state: States, part: str, topics: tuple[str, ...] = tuple(TOPICS)) -> dict[str, float]:
        self._model.load_state_dict(state, strict=False)
        self._model.tie_weights()
        found = {}
        for topic in topics:
            tokens = self._tokens[part][topic]
            with torch.autocast("cpu", torch.bfloat16):
                logits = [self._model(batch[:, :-1], use_cache=False).logits for batch in tokens.split(8)]
            scores = torch.cat(logits).float().flatten(0, 1)
            found[topic] = float(torch.nn.functional.cross_entropy(scores, tokens[:, 1:].flatten()))
        return found


def state_of(path: object) -> dict[str, Tensor]:
    """The tensors of a checkpoint in float32."""
    from slimwright.checkpoint import Checkpoint

    opened = Checkpoint.open(path)  # type: ignore[arg-type]
    return {name: opened.read(name).float() for name in opened.tensors}


def merged(spec: str, base: States, models: list[dict[str, Tensor]], blocks: int) -> dict[str, Tensor]:
    """The state dict of a merge."""
    merger = parse_method(f"merge/{spec}")
    assert isinstance(merger, MergeMethod)
    with_base = merger.base_model != "unused" and not spec.startswith("multislerp")
    state = merger.prepare(models, base=base if with_base else None)
    out = {}
    for name, start in base.items():
        block = int(name.split(".")[2]) if ".layers." in name else None
        site = MergeSite(name, tuple(start.shape), block, blocks if block is not None else 0)
        out[name] = merger.merge([model[name] for model in models], start if with_base else None, site, state)
    return out


def main() -> int:
    started = time.time()
    losses = Losses()
    base = state_of(zoo.bundled_path())
    tuned = {topic: state_of(path) for topic, path in zoo.fine_tunes().items()}
    models, topics = list(tuned.values()), tuple(tuned)
    blocks = 1 + max(int(name.split(".")[2]) for name in base if ".layers." in name)
    zero = {part: losses(base, part) for part in WINDOWS}
    own = {part: {t: losses(tuned[t], part, (t,))[t] for t in topics} for part in WINDOWS}

    def kept(found: Mapping[str, float], part: str) -> float:
        """The mean share of the gain over some topics."""
        return sum((zero[part][t] - found[t]) / (zero[part][t] - own[part][t]) for t in found) / len(found)

    rows: list[Row] = []
    for name, specs in CANDIDATES.items():
        results = [(kept(losses(merged(spec, base, models, blocks), "calibrate"), "calibrate"), spec) for spec in specs]
        best = max(results)[1]
        share = losses(merged(best, base, models, blocks), "heldout")
        rows.append({"method": name, "chosen": best, "kept": kept(share, "heldout")})
        print(rows[-1], flush=True)
    whole = losses(merged("task_arithmetic,lambda=1", base, models, blocks), "heldout")
    rows.append({"method": "(sum of task vectors)", "kept": kept(whole, "heldout")})
    shares = {}
    for number, topic in enumerate(topics):
        tried = {}
        for value in TALL:
            spec = f"tall,task={number},lambda={value}"
            tried[spec] = losses(merged(spec, base, models, blocks), "calibrate", (topic,))[topic]
        best = min(tried, key=lambda spec: tried[spec])
        shares[topic] = losses(merged(best, base, models, blocks), "heldout", (topic,))[topic]
    rows.append({"method": "tall (one mask a task)", "kept": kept(shares, "heldout")})
    best_model = max(kept(losses(tuned[topic], "heldout"), "heldout") for topic in topics)
    rows.append({"method": "(the best single fine-tune)", "kept": best_model})
    rows[-1]["gains"] = {t: zero["heldout"][t] - own["heldout"][t] for t in topics}
    columns = {"method": "method", "chosen": "chosen", "kept": "share of the gain"}
    return exit_code(publish("merge_language", rows, columns, started))


if __name__ == "__main__":
    sys.exit(main())
