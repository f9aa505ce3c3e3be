"""What merging keeps: a small vision transformer fine-tuned on four tasks, merged by every method.

The fixture: 8 x 8 digits in 16 patches of 2 x 2; four layers of width 64, pretrained on noisy digits; four tasks, the
same digits turned by 90 degrees, with inverted colours, with their columns in another order, and mirrored; each
fine-tuned from the pretrained model with the head frozen. A method's figure is its *normalised accuracy*: the merged
model's accuracy on a task over the fine-tuned model's, averaged over tasks and three seeds. Scales are chosen on the
validation part, the figures are on the test part.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Row, exit_code, publish
from slimwright.methods.merging import MergeMethod, MergeSite

WIDTH, LAYERS, STEPS, TUNE_STEPS, BATCH = 64, 4, 1500, 150, 128
TUNE_RATE = 3e-4
"""With 300 steps of pretraining and a rate of 1e-3 the task vectors have so little in common that no method is 5 points
above the average (0.31)."""
SCALES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0)
TALL = (0.2, 0.3, 0.4, 0.5, 0.6)
CANDIDATES: dict[str, list[str]] = {
    "linear": ["linear"],
    "task_arithmetic": [f"task_arithmetic,lambda={s}" for s in SCALES],
    "ties": [f"ties,lambda={s}" for s in SCALES],
    "dare": [f"dare,density=0.1,lambda={s}" for s in SCALES],
    "dare (ties)": [f"dare,density=0.1,consensus=ties,normalize=true,lambda={s}" for s in SCALES],
    "della": [f"della,density=0.5,lambda={s}" for s in SCALES],
    "breadcrumbs": [f"breadcrumbs,density=0.15,lambda={s}" for s in SCALES],
    "model_stock": ["model_stock"],
    "sce": [f"sce,select_topk={k}" for k in (0.1, 0.2, 0.5, 1.0)],
    "karcher": ["karcher"],
    "multislerp": ["multislerp"],
    "pcb (a tenth)": [f"pcb,lambda={s}" for s in SCALES],
    "pcb": [f"pcb,density={d},lambda={s}" for d in (0.1, 0.2, 0.5) for s in SCALES[3:]],
    "lines (task arithmetic)": [f"lines,inner=task_arithmetic;lambda=1,beta={s}" for s in SCALES],
    "lines (ties)": [f"lines,inner=ties;density=0.2,beta={s}" for s in SCALES],
    "consensus": [f"consensus,lambda={s}" for s in SCALES],
    "compeft": [f"compeft,density=0.2,alpha={s}" for s in SCALES],
}


class Encoder(nn.Module):
    """A pre-norm transformer over 16 patches, and a head on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(4, WIDTH)
        self.position = nn.Parameter(0.1 * torch.randn(16, WIDTH))
        layers = [
            nn.TransformerEncoderLayer(WIDTH, 4, 128, 0.0, norm_first=True, batch_first=True) for _ in range(LAYERS)
        ]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        x = self.patch(patches) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": lambda x: x.rot90(1, (1, 2)),
    "inverted": lambda x: 1 - x,
    "reordered": lambda x: x[:, :, [4, 5, 6, 7, 0, 1, 2, 3]],
    "mirrored": lambda x: x.flip(2),
}


def digits(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Train, validation and test parts: images (n, 8, 8) of 0 .. 1, and labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = torch.tensor(found.images).float() / 16, torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = {"train": order[:1100], "validation": order[1100:1450], "test": order[1450:]}
    return {name: (images[part], labels[part]) for name, part in parts.items()}


def train(model: Encoder, images: Tensor, labels: Tensor, steps: int, rate: float, noise: float, seed: int) -> None:
    """Adam with a falling rate; parameters that need no gradient stay."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        pick = torch.randint(len(labels), (BATCH,), generator=generator)
        batch = images[pick] + noise * torch.randn(BATCH, 8, 8, generator=generator)
        loss = nn.functional.cross_entropy(model(batch), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: Encoder, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


def merged(spec: str, base: Mapping[str, Tensor], models: list[dict[str, Tensor]], seed: int = 0) -> dict[str, Tensor]:
    """The state dict of a merge, the head left alone."""
    from slimwright.methods import parse_method

    merger: MergeMethod = parse_method(f"merge/{spec}")
    names = [name for name in base if not name.startswith("head.")]
    sites = {}
    for name in names:
        inside = name.startswith("layers.")
        layer = int(name.split(".")[1]) if inside else None
        sites[name] = MergeSite(name, tuple(base[name].shape), layer, LAYERS if inside else 0)
    with_base = merger.base_model != "unused" and not spec.startswith("multislerp")
    state = merger.prepare(
        [{name: model[name] for name in names} for model in models], base=base if with_base else None, seed=seed
    )
    out = dict(base)
    for name in names:
        tensors = [model[name] for model in models]
        out[name] = merger.merge(tensors, base[name] if with_base else None, sites[name], state, seed)
    return out


def summed(base: Mapping[str, Tensor], models: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """One model: the base plus the sum of all task vectors, the head left alone."""
    return [merged("task_arithmetic,lambda=1", base, models)]


def run(seed: int) -> dict[str, float]:
    """Normalised accuracies of one seed, by method."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = digits(seed)
    model = Encoder()
    train(model, *data["train"], STEPS, 2e-3, 0.3, seed)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.head.parameters():
        parameter.requires_grad_(False)
    tuned, own = [], {}
    for task, change in TASKS.items():
        model.load_state_dict(base)
        images, labels = data["train"]
        train(model, change(images), labels, TUNE_STEPS, TUNE_RATE, 0.0, seed)
        tuned.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        for part in ("validation", "test"):
            own[task, part] = accuracy(model, change(data[part][0]), data[part][1])

    def normalised(state: Mapping[str, Tensor], part: str, only: str | None = None) -> float:
        model.load_state_dict(state)
        images, labels = data[part]
        tasks = [only] if only else list(TASKS)
        return sum(accuracy(model, TASKS[task](images), labels) / own[task, part] for task in tasks) / len(tasks)

    found = {"(pretrained)": normalised(base, "test")}
    for name, specs in CANDIDATES.items():
        results = [merged(spec, base, tuned) for spec in specs]
        best = max(results, key=lambda state: normalised(state, "validation"))
        found[name] = normalised(best, "test")
    # The cards' comparisons that are not in the table.
    vectors = [torch.cat([(m[n] - base[n]).flatten() for n in base if not n.startswith("head.")]) for m in tuned]
    found["kurtosis of the task vectors"] = sum(float(v.pow(4).mean() / v.square().mean() ** 2) for v in vectors) / 4
    for count in (4, 2):
        restored, chance = [], []
        for number, task in enumerate(list(TASKS)[:count]):
            tried = [merged(f"tall,task={number},lambda={s}", base, tuned[:count]) for s in TALL]
            best = max(tried, key=lambda state, task=task: normalised(state, "validation", task))  # type: ignore[misc]
            restored.append(normalised(best, "test", task))
            mask = sum(int((best[n] != base[n]).sum()) for n in base) / len(vectors[0])
            random = merged(f"dare,rescale=none,density={mask}", base, summed(base, tuned[:count]), number)
            chance.append(normalised(random, "test", task))
        found[f"tall, {count} tasks (one mask a task)"] = sum(restored) / count
        found[f"tall, {count} tasks, random masks"] = sum(chance) / count
    found["tall, 4 tasks, no mask"] = normalised(summed(base, tuned)[0], "test")
    one = tuned[:1]
    dropped = {
        r: normalised(merged(f"dare,density=0.1,rescale={r}", base, one), "test", "turned") for r in ("exact", "none")
    }
    found["dare alone, rescaled"], found["dare alone, not rescaled"] = dropped["exact"], dropped["none"]
    forgot = merged("task_arithmetic,lambda=-0.5", base, one)
    found["forgetting: the task"] = normalised(forgot, "test", "turned") / normalised(base, "test", "turned")
    return found


def main() -> int:
    started = time.time()
    with ProcessPoolExecutor(3, get_context("spawn")) as pool:
        seeds = list(pool.map(run, range(3)))
    mean = {name: sum(seed[name] for seed in seeds) / len(seeds) for name in seeds[0]}
    spread = {name: max(seed[name] for seed in seeds) - min(seed[name] for seed in seeds) for name in seeds[0]}
    rows: list[Row] = [{"method": name, "normalised": mean[name], "spread": spread[name]} for name in mean]
    checks: dict[str, Any] = {
        "task arithmetic: 5 points above the average": mean["task_arithmetic"] - mean["linear"] >= 0.05,
        "task arithmetic: 5 points above the pretrained model": mean["task_arithmetic"] - mean["(pretrained)"] >= 0.05,
        "TIES: 5 points above the average": mean["ties"] - mean["linear"] >= 0.05,
        "PCB: at least task arithmetic, its share chosen": mean["pcb"] >= mean["task_arithmetic"],
        "PCB: at least task arithmetic, with a tenth": mean["pcb (a tenth)"] >= mean["task_arithmetic"],
        "TALL: 97 % of every task": mean["tall, 4 tasks (one mask a task)"] >= 0.97,
        "TALL: 10 points above random masks": mean["tall, 4 tasks (one mask a task)"]
        - mean["tall, 4 tasks, random masks"]
        >= 0.10,
        "TALL: the sum alone is below 85 %": mean["tall, 4 tasks, no mask"] <= 0.85,
        "DARE: rescaling gains 10 points": mean["dare alone, rescaled"] - mean["dare alone, not rescaled"] >= 0.10,
        "a negative weight forgets": mean["forgetting: the task"] < 1,
    }
    rows += [{"method": f"check: {name}", "held": held} for name, held in checks.items()]
    columns = {"method": "method", "normalised": "normalised accuracy", "spread": "spread of 3 seeds", "held": "held"}
    return exit_code(publish("merge_quality", rows, columns, started))


if __name__ == "__main__":
    sys.exit(main())
