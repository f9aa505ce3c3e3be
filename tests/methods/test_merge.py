"""Merge methods against closed forms and brute force, each written from the card and not from the code."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from slimwright import method
from slimwright.errors import InputError
from slimwright.methods import selection
from slimwright.methods.chance import random_integers
from slimwright.methods.merging import BLOCK, MergeSite


def tensors(count: int, shape: tuple[int, ...] = (37, 53), scale: float = 0.05, seed: int = 0) -> list[Tensor]:
    """A base and ``count`` models near it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [base, *(base + scale * torch.randn(shape, generator=generator) for _ in range(count))]


def brute_top(values: Tensor, keep: int) -> Tensor:
    """A mask of the ``keep`` largest magnitudes, the first of equals, by a plain loop over a sorted list."""
    flat = values.abs().flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:keep]
    mask = torch.zeros(len(flat))
    mask[order] = 1
    return mask.reshape(values.shape)


def test_linear_is_a_weighted_mean() -> None:
    a, b, c = tensors(2)
    assert torch.allclose(method("merge/linear").merge([a, b, c]), torch.stack([a, b, c]).mean(0), atol=1e-6)
    merged = method("merge/linear", weight=(1.0, 3.0)).merge([a, b])
    assert torch.allclose(merged, 0.25 * a + 0.75 * b, atol=1e-6)
    assert torch.equal(method("merge/linear", weight=(1.0, 0.0)).merge([a, b]), a)
    assert torch.equal(method("merge/linear").merge([a]), a)
    with pytest.raises(InputError, match="add up to 0"):
        method("merge/linear", weight=(1.0, -1.0)).merge([a, b])


def test_task_arithmetic_adds_and_forgets() -> None:
    base, a, b = tensors(2)
    merged = method("merge/task_arithmetic", **{"lambda": 0.5}, weight=(1.0, -2.0)).merge([a, b], base)
    assert torch.allclose(merged, base + 0.5 * ((a - base) - 2 * (b - base)), atol=1e-6)
    assert torch.equal(method("merge/task_arithmetic", **{"lambda": 0.0}).merge([a, b], base), base)
    # lambda = 1 / T is the mean.
    mean = method("merge/task_arithmetic", **{"lambda": 0.5}).merge([a, b], base)
    assert torch.allclose(mean, (a + b) / 2, atol=1e-6)
    opposite = base - (a - base)
    assert torch.allclose(method("merge/task_arithmetic").merge([a, opposite], base), base, atol=1e-6)


def test_slerp_follows_the_great_circle() -> None:
    a, b = torch.randn(2, 40, 50, generator=torch.Generator().manual_seed(3))
    b = b * (a.norm() / b.norm())
    phi = math.acos(float((a * b).sum() / a.norm() / b.norm()))
    merged = method("merge/slerp", t=0.3).merge([b], a)
    expected = math.sin(0.7 * phi) / math.sin(phi) * a + math.sin(0.3 * phi) / math.sin(phi) * b
    assert torch.allclose(merged, expected, atol=1e-5)
    half = method("merge/slerp").merge([a, b])
    assert math.isclose(float(half.norm()), float(a.norm()), rel_tol=1e-5)
    assert math.isclose(float(((a + b) / 2).norm()), float(a.norm()) * math.cos(phi / 2), rel_tol=1e-4)
    # Parallel and antiparallel: linear; of a zero tensor a quarter turn.
    assert torch.allclose(method("merge/slerp", t=0.25).merge([3 * a], a), 1.5 * a, atol=1e-5)
    assert torch.isfinite(method("merge/slerp").merge([-a], a)).all()
    zero = torch.zeros_like(a)
    assert torch.allclose(method("merge/slerp").merge([zero], a), math.sin(math.pi / 4) * a, atol=1e-6)


def test_ties_by_hand() -> None:
    # Card (a): agreement, conflict, zero and tie, entry by entry.
    base = torch.zeros(6)
    rows = [torch.tensor(row) for row in ([2.0, 3.0, 0.0, 1.0, -2.0, 1.0], [4.0, -5.0, 0.0, -1.0, -4.0, 0.0],
                                          [6.0, 1.0, 7.0, 0.0, 3.0, 0.0])]  # fmt: skip
    expected = []
    for entries in zip(*(row.tolist() for row in rows)):
        total = sum(entries)
        sign = 1 if total > 0 else -1 if total < 0 else 0
        expected.append((sign, [value for value in entries if value * sign > 0]))
    majority = 1 if sum(sign for sign, _ in expected) > 0 else -1
    values = []
    for entries, (sign, agreeing) in zip(zip(*(row.tolist() for row in rows)), expected):
        if sign == 0:
            agreeing = [value for value in entries if value * majority > 0]
        values.append(sum(agreeing) / max(1, len(agreeing)))
    merged = method("merge/ties", density=1.0).merge(rows, base)
    assert torch.allclose(merged, torch.tensor(values))
    largest = method("merge/ties", density=1.0, agg="max").merge(rows, base)
    assert largest.tolist() == [6.0, -5.0, 7.0, 1.0, -4.0, 1.0]


@pytest.mark.parametrize("majority", ["elected", "plus"])
@pytest.mark.parametrize("sign_method", ["mass", "count"])
def test_the_sign_where_votes_cancel(majority: str, sign_method: str) -> None:
    base = torch.zeros(5)
    first = torch.tensor([1.0, -1.0, -1.0, -1.0, -2.0])
    second = torch.tensor([-1.0, -1.0, -1.0, -1.0, 2.0])
    knobs = {"density": 1.0, "majority": majority, "sign_method": sign_method}
    merged = method("merge/ties", **knobs).merge([first, second], base)
    sign = -1.0 if majority == "elected" else 1.0  # three of the five elect minus, two cancel
    assert merged.tolist() == [sign, -1.0, -1.0, -1.0, 2.0 * sign]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("density", [0.2, 0.013, 0.99])
@pytest.mark.parametrize("few", [True, False])
def test_ties_trims_exactly(dtype: torch.dtype, density: float, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact counts with stable ties, by both ways of finding the threshold; bf16 has many equal magnitudes."""
    if not few:
        monkeypatch.setattr(selection, "GATHERED", 0)
    base, a = (tensor.to(dtype) for tensor in tensors(1))
    delta = a.float() - base.float()
    mask = brute_top(delta, max(1, int(density * base.numel())))
    merged = method("merge/ties", density=density, granularity="tensor").merge([a], base)
    assert torch.equal(merged, (base.float() + delta * mask).to(dtype))


@pytest.mark.parametrize("name", ["ties", "breadcrumbs"])
@pytest.mark.parametrize("whole", [True, False])
def test_trimmed_vectors_are_rescaled_to_their_own_size(name: str, whole: bool) -> None:
    """``rescale=l1``: each tensor's sum of magnitudes comes back, or the whole model's, by the weights' side."""
    base = {"a": tensors(1)[0], "b": 3 * tensors(2)[0]}
    model = {"a": base["a"] + tensors(3)[0], "b": base["b"] + 9 * tensors(4)[0]}
    knobs = {
        "rescale": "l1",
        "density": 0.3,
        "weight": 0.5,
        "lambda_": 1.0,
        "granularity": "model" if whole else "tensor",
    }
    if name == "ties":
        knobs["agg"] = "sum"
    merger = method(f"merge/{name}", **knobs)
    state = merger.prepare([model], base=base)
    plain = method(f"merge/{name}", **{**knobs, "rescale": "none"})
    changes, unscaled = {}, {}
    kept = plain.prepare([model], base=base)
    for key, start in base.items():
        changes[key] = merger.merge([model[key]], start, site=key, state=state).double() - start.double()
        unscaled[key] = plain.merge([model[key]], start, site=key, state=kept).double() - start.double()
    sizes = {key: float((model[key].double() - base[key].double()).abs().sum()) for key in base}
    for key in base:
        wanted = sum(sizes.values()) if whole else sizes[key]
        had = sum(float(v.abs().sum()) for v in unscaled.values()) if whole else float(unscaled[key].abs().sum())
        assert torch.allclose(changes[key], unscaled[key] * (0.5 * wanted / had), atol=1e-5), key
        assert int((changes[key] == 0).sum()) == int((unscaled[key] == 0).sum()) > 0


@pytest.mark.parametrize("few", [True, False])
def test_ties_over_the_whole_model(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not few:
        monkeypatch.setattr(selection, "GATHERED", 0)
    names = ["a.weight", "b.weight", "c.bias"]
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(11, 13, generator=generator).bfloat16() for name in names}
    model = {name: (base[name].float() + 0.01 * (1 + i) * torch.randn(11, 13, generator=generator)).bfloat16()
             for i, name in enumerate(names)}  # fmt: skip
    deltas = torch.cat([(model[name].float() - base[name].float()).flatten() for name in names])
    mask = brute_top(deltas, int(0.2 * deltas.numel())).reshape(3, 11, 13)
    ties = method("merge/ties")
    state = ties.prepare([model], base=base)
    for name, kept in zip(names, mask):
        merged = ties.merge([model[name]], base[name], site=name, state=state)
        expected = (base[name].float() + (model[name].float() - base[name].float()) * kept).bfloat16()
        assert torch.equal(merged, expected)


def test_a_threshold_among_many_equal_magnitudes_spanning_blocks() -> None:
    """All magnitudes equal: the first are taken, across blocks."""
    numel = 2 * BLOCK + 1000
    base, model = torch.zeros(numel), torch.full((numel,), 0.5)
    model[::2] *= -1
    keep = BLOCK + 12_345
    merged = method("merge/ties", density=keep / numel, granularity="tensor", majority="plus").merge([model], base)
    kept = int(keep / numel * numel)
    assert torch.equal(merged[:kept], model[:kept])
    assert not merged[kept:].any()


def test_dare_keeps_the_expectation() -> None:
    base, a = tensors(1, (64, 64))
    total = torch.zeros_like(a, dtype=torch.float64)
    for seed in range(200):
        merged = method("merge/dare", density=0.1).merge([a], base, seed=seed)
        total += merged - base
        kept = (merged != base).float().mean()
        assert abs(float(kept) - 0.1) < 0.03
    # The mean of 200 has a relative error of sqrt((1 - p) / p / 200) of the entries' size.
    error = (total / 200 - (a - base)).norm() / (a - base).norm()
    assert abs(float(error) - math.sqrt(9 / 200)) < 0.03
    assert torch.allclose(method("merge/dare", density=1.0).merge([a], base), a, atol=1e-6)
    unscaled = method("merge/dare", density=0.1, rescale="none").merge([a], base)
    kept = unscaled != base
    assert torch.allclose(unscaled[kept], a[kept], atol=1e-6)
    l1 = method("merge/dare", density=0.1, rescale="l1").merge([a], base)
    assert math.isclose(float((l1 - base).abs().sum()), float((a - base).abs().sum()), rel_tol=1e-4)


def test_masks_depend_on_seed_name_and_model() -> None:
    base, a = tensors(1, (64, 64))
    dare = method("merge/dare", density=0.5, rescale="none")
    same = dare.merge([a], base, site="x", seed=1)
    assert torch.equal(same, dare.merge([a], base, site="x", seed=1))
    for other in (dare.merge([a], base, site="y", seed=1), dare.merge([a], base, site="x", seed=2)):
        assert 0.4 < float(((same == base) == (other == base)).float().mean()) < 0.6
    two = method("merge/dare", density=0.5, rescale="none", weight=(1.0, 1000.0)).merge([a, a], base, seed=1)
    kinds = (two - base).abs().div((a - base).abs())
    shares = [float(((kinds - level).abs() < 0.2 + 0.01 * level).float().mean()) for level in (0, 1, 1000, 1001)]
    assert shares[0] > 0.2 and shares[1] > 0.2 and abs(sum(shares[:2]) - 0.5) < 0.06


def test_random_numbers_are_uniform_and_independent() -> None:
    """Moments, bits, neighbours, blocks and models: each statistic is standard normal if the numbers are."""
    count = 4 * BLOCK
    numbers = random_integers(7, "layer.weight", 0, 0, count)
    assert int(numbers.min()) >= 0
    uniform = numbers.double() / 2**31
    scores = [float(uniform.mean() - 0.5) * math.sqrt(12 * count)]
    scores += [(float((numbers >> bit & 1).double().mean()) - 0.5) * 2 * math.sqrt(count) for bit in range(31)]
    centred = (uniform - 0.5) * math.sqrt(12)
    for lag in (1, 2, 64, 896, BLOCK):
        scores.append(float((centred[lag:] * centred[:-lag]).mean()) * math.sqrt(count - lag))
    for other in (random_integers(7, "layer.weight", 1, 0, count), random_integers(8, "layer.weight", 0, 0, count)):
        scores.append(float((centred * (other.double() / 2**31 - 0.5)).mean()) * math.sqrt(12 * count))
    for bins in (numbers >> 21, (numbers[::2] >> 26) * 32 + (numbers[1::2] >> 26)):
        counts = torch.bincount(bins, minlength=1024).double()
        expected = len(bins) / 1024
        scores.append((float(((counts - expected) ** 2 / expected).sum()) - 1023) / math.sqrt(2 * 1023))
    assert max(map(abs, scores)) < 4.5, scores


def test_any_piece_of_the_random_numbers_is_the_whole_cut() -> None:
    whole = random_integers(0, "x", 0, 0, 3 * BLOCK)
    for start, count in ((0, 5), (BLOCK - 3, 10), (BLOCK, BLOCK), (2 * BLOCK + 17, 1000)):
        assert torch.equal(random_integers(0, "x", 0, start, count), whole[start : start + count])


def test_della_keeps_more_of_the_large() -> None:
    base, a = tensors(1, (512, 512))
    merged = method("merge/della", density=0.5, epsilon=0.15, rescale="none", normalize=False).merge([a], base)
    kept = (merged != base).float()
    order = (a - base).abs().argsort(dim=1)
    ranked = kept.gather(1, order)
    share = ranked.mean(0)
    assert abs(float(kept.mean()) - 0.5) < 0.01
    assert abs(float(share[-51:].mean() - share[:51].mean()) - 2 * 0.15 * 0.9) < 0.02
    exact = method("merge/della", density=0.5, epsilon=0.15).merge([a], base)
    chosen = exact != base
    ratio = ((exact - base) / (a - base))[chosen]
    assert float(ratio.quantile(0.01)) > 1 / 0.65 - 0.01 and float(ratio.quantile(0.99)) < 1 / 0.35 + 0.01
    with pytest.raises(InputError, match="smaller epsilon"):
        method("merge/della", density=0.9, epsilon=0.15).merge([a], base)
    column = method("merge/della", density=0.5).merge([a[:, :1]], base[:, :1])
    assert torch.isfinite(column).all()


def test_breadcrumbs_keep_the_middle() -> None:
    base = torch.zeros(100)
    values = torch.arange(1.0, 101.0)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    knobs = {"lambda": 1.0, "density": 0.3, "gamma": 0.05}
    merged = method("merge/breadcrumbs", **knobs).merge([values], base)
    assert sorted(merged[merged != 0].tolist()) == list(range(66, 96))
    none = method("merge/breadcrumbs", **{**knobs, "gamma": 0.0}).merge([values], base)
    assert sorted(none[none != 0].tolist()) == list(range(71, 101))
    all_of_it = method("merge/breadcrumbs", **{**knobs, "density": 1.0}).merge([values], base)
    assert torch.equal(all_of_it, values)
    crowded = method("merge/breadcrumbs", **{**knobs, "density": 0.98}).merge([values], base)
    assert sorted(crowded[crowded != 0].tolist()) == list(range(1, 99))


def test_model_stock_finds_the_centre() -> None:
    generator = torch.Generator().manual_seed(0)
    wins = 0
    for _ in range(100):
        base, centre = torch.zeros(200), torch.randn(200, generator=generator)
        models = [centre + 1.5 * torch.randn(200, generator=generator) for _ in range(2)]
        merged = method("merge/model_stock").merge(models, base)
        wins += bool((merged - centre).norm() < (sum(models) / 2 - centre).norm())
    assert wins >= 90
    base, a = tensors(1)
    assert torch.allclose(method("merge/model_stock").merge([a, a], base), a, atol=1e-6)
    first, second = torch.zeros(2, 10).unbind()
    first[0], second[1] = 1.0, 1.0
    assert torch.equal(method("merge/model_stock").merge([first, second], torch.zeros(10)), torch.zeros(10))
    opposed = method("merge/model_stock").merge([first, -first], torch.zeros(10))
    assert torch.isfinite(opposed).all()


def test_model_stock_by_row_is_each_row_alone() -> None:
    base, a, b, c = tensors(3, (6, 40))
    rows = method("merge/model_stock", filter_wise=True).merge([a, b, c], base)
    for row in range(6):
        alone = method("merge/model_stock").merge([a[row], b[row], c[row]], base[row])
        assert torch.allclose(rows[row], alone, atol=1e-6)


def test_sce_by_hand() -> None:
    base = torch.zeros(2, 4)
    a = torch.tensor([[1.0, 2.0, 0.0, -4.0], [0.5, 0.0, 1.0, 2.0]])
    b = torch.tensor([[3.0, -2.0, 0.0, -1.0], [0.5, 0.0, 3.0, -6.0]])
    energies = [float(a.square().mean()), float(b.square().mean())]
    weights = [energy / sum(energies) for energy in energies]
    for row, column in itertools.product(range(2), range(4)):
        entries = [float(a[row, column]), float(b[row, column])]
        sign = 1 if sum(entries) >= 0 else -1
        agreeing = [(w, e) for w, e in zip(weights, entries) if e * sign > 0]
        expected = sum(w * e for w, e in agreeing) / max(sum(w for w, _ in agreeing), 1e-6) if agreeing else 0.0
        merged = method("merge/sce").merge([a, b], base)
        assert math.isclose(float(merged[row, column]), expected, abs_tol=1e-6)
    # The two of the five varying entries that vary most: -6 against 2, and 2 against -2.
    some = method("merge/sce", select_topk=0.4).merge([a, b], base)
    assert (some != 0).nonzero().tolist() == [[0, 1], [1, 3]]
    assert torch.equal(method("merge/sce", select_topk=0.5).merge([a, a], base), base)
    assert torch.allclose(method("merge/sce").merge([a], base), a)


def test_karcher_is_the_spherical_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(30, 30, generator=generator) + 1 for _ in range(3))
    a, b = a / a.norm(), b / b.norm()
    two = method("merge/karcher").merge([a, b])
    assert torch.allclose(two, method("merge/slerp").merge([a, b]), atol=1e-5)
    three = method("merge/karcher", max_iter=100).merge([a, b, c])
    assert torch.allclose(three, method("merge/karcher", max_iter=100).merge([c, a, b]), atol=1e-5)
    # The converged point: the logarithms of the directions add up to nothing.
    u = (three / three.norm()).double().flatten()
    total = torch.zeros_like(u)
    for tensor in (a, b, c):
        v = (tensor / tensor.norm()).double().flatten()
        phi = torch.acos((u @ v).clamp(-1, 1))
        total += phi / phi.sin() * (v - phi.cos() * u)
    assert float(total.norm()) < 1e-4
    assert math.isclose(float(three.norm()), float((a.norm() + b.norm() + c.norm()) / 3), rel_tol=1e-5)
    assert not method("merge/karcher").merge([torch.zeros(3), torch.zeros(3)]).any()
    assert torch.isfinite(method("merge/karcher").merge([a, -a])).all()


def test_nuslerp_and_multislerp() -> None:
    base, a, b = tensors(2, scale=1.0)
    assert torch.allclose(
        method("merge/nuslerp", weight=(0.6, 0.4)).merge([a, b]), method("merge/slerp", t=0.4).merge([a, b]), atol=1e-5
    )
    assert torch.allclose(method("merge/nuslerp", weight=(1.0, 0.0)).merge([a, b]), a, atol=1e-6)
    deltas = method("merge/nuslerp", weight=(0.6, 0.4)).merge([a, b], base)
    assert torch.allclose(deltas - base, method("merge/slerp", t=0.4).merge([a - base, b - base]), atol=1e-5)
    # By rows (the last dimension) the norm of each vector is kept where both have it.
    b = b * (a.norm(dim=1, keepdim=True) / b.norm(dim=1, keepdim=True))
    rows = method("merge/nuslerp", flatten=False).merge([a, b])
    assert torch.allclose(rows.norm(dim=1), a.norm(dim=1), rtol=1e-5)
    columns = method("merge/nuslerp", flatten=False, row_wise=True).merge([a, b])
    assert torch.allclose(columns, method("merge/nuslerp", flatten=False).merge([a.T, b.T]).T, atol=1e-6)
    mean = method("merge/multislerp").merge([a, b])
    direction = a / a.norm() + b / b.norm()
    expected = direction / direction.norm() * (a.norm() + b.norm()) / 2
    assert torch.allclose(mean, expected, atol=1e-5)
    with pytest.raises(InputError, match="cancel"):
        method("merge/multislerp", weight=(1.0, 1.0, 2.0)).merge([a, a, -a])


def test_arcee_fusion_takes_exact_entries() -> None:
    base, a = tensors(1, (40, 60))
    merged = method("merge/arcee_fusion").merge([a], base)
    taken = merged != base
    assert torch.equal(merged[taken], a[taken])
    assert 0 < float(taken.float().mean()) < 0.25
    p, q = a.double().softmax(1) + 1e-8, base.double().softmax(1) + 1e-8
    importance = ((a - base).abs() * (p * (p / q).log()).sum(1, keepdim=True)).float().flatten()
    ordered = importance.sort().values
    first, median, third = (float(ordered[int(share * (len(ordered) - 1))]) for share in (0.25, 0.5, 0.75))
    assert torch.equal(taken.flatten(), (importance >= median + 1.5 * (third - first)) & (a != base).flatten())
    assert torch.equal(method("merge/arcee_fusion").merge([a], a), a)


def test_nearswap_moves_by_the_share() -> None:
    base, a = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.00005, 1.0002, 2.0])
    merged = method("merge/nearswap", t=1e-4).merge([a], base)
    assert torch.allclose(merged, torch.tensor([1.00005, 1.0001, 1.0001]), atol=2e-7)


@pytest.mark.parametrize("r", [0.0, 0.5])
def test_ram_by_hand(r: float) -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    changes = torch.tensor([[0.5, 0.0, 0.25, 1.0, 1e-3], [0.0, -2.0, 0.75, 0.0, 0.0], [0.0, 0.0, -0.25, 0.5, 0.0]])
    # Alone: model 0 the first entry, model 1 the second, model 2 none. Shared: the third by all, the fourth by two.
    factors = [1 + r * min(2 / 1, 1.5), 1 + r * min(1 / 1, 1.5), 1.0]
    expected = base + torch.tensor([0.5 * factors[0], -2 * factors[1], 0.75 / 3, 1.5 / 2, 0.0])
    merged = method("merge/ram", r=r, alpha=1.5, epsilon=0.01).merge([base + change for change in changes], base)
    assert torch.allclose(merged, expected, atol=1e-6)
    assert merged[4] == base[4]


def test_passthrough_scales() -> None:
    (a,) = tensors(0)
    assert torch.equal(method("merge/passthrough").merge([a]), a)
    assert torch.equal(method("merge/passthrough", scale=0.0).merge([a]), torch.zeros_like(a))


def test_lines_grows_with_depth() -> None:
    base, a, b = tensors(2)
    deltas = (a - base) + (b - base)
    lines = method("merge/lines", alpha=0.2, beta=0.6)
    for block, scale in ((0, 0.2), (1, 0.4), (3, 0.8)):
        merged = lines.merge([a, b], base, site=MergeSite("x", tuple(base.shape), block, 4))
        assert torch.allclose(merged, base + scale * deltas, atol=1e-6)
    outside = lines.merge([a, b], base, site=MergeSite("x", tuple(base.shape)))
    assert torch.allclose(outside, base + 0.2 * deltas, atol=1e-6)
    single = lines.merge([a, b], base, site=MergeSite("x", tuple(base.shape), 0, 1))
    assert torch.allclose(single, base + 0.2 * deltas, atol=1e-6)


@pytest.mark.parametrize(
    "inner", ["task_arithmetic;lambda=1", "ties;density=0.3", "ties;density=0.3;granularity=tensor"]
)
def test_lines_alpha_from_the_sizes(inner: str) -> None:
    """alpha = |sum of task vectors| / |merged vector| / T, over the whole model."""
    names = ["a", "b"]
    base = {name: tensors(2, seed=i)[0] for i, name in enumerate(names)}
    models = [{name: tensors(2, seed=i)[1 + m] for i, name in enumerate(names)} for m in range(2)]
    lines = method("merge/lines", inner=inner, beta=0.0)
    knobs = dict(word.split("=") for word in inner.split(";")[1:])
    plain = method("merge/" + inner.partition(";")[0], **knobs)
    merged_state = plain.prepare(models, base=base)
    vectors = {n: plain.merge([m[n] for m in models], base[n], site=n, state=merged_state) - base[n] for n in names}
    total = sum(float(sum(m[n] - base[n] for m in models).abs().sum()) for n in names)
    alpha = total / sum(float(vector.abs().sum()) for vector in vectors.values()) / 2
    state = lines.prepare(models, base=base)
    for name in names:
        found = lines.merge([m[name] for m in models], base[name], site=name, state=state)
        assert torch.allclose(found, base[name] + alpha * vectors[name], atol=1e-5)


def test_tall_masks_and_consensus_by_hand() -> None:
    base = torch.zeros(5)
    a, b, c = torch.tensor([3.0, 0, 1, 1, 0.1]), torch.tensor([0.0, 2, 1, -1, 5]), torch.tensor([0.0, 0, 1, 0, -5])
    total = a + b + c
    for task, own in enumerate((a, b, c)):
        mask = own.abs() > 0.4 * (total - own).abs()
        found = method("merge/tall", task=task).merge([a, b, c], base)
        assert torch.allclose(found, total * mask)
    # Supports that do not overlap are recovered whole.
    x, y = torch.tensor([1.0, 2, 0, 0]), torch.tensor([0.0, 0, 3, 4])
    assert torch.equal(method("merge/tall", task=1).merge([x, y], torch.zeros(4)), y)
    votes = sum((own.abs() > 0.4 * (total - own).abs()).int() for own in (a, b, c))
    kept = method("merge/consensus", **{"lambda": 1.0}).merge([a, b, c], base)
    assert torch.allclose(kept, total * (votes >= 2))
    assert torch.equal(method("merge/consensus", prun_thre_k=0, **{"lambda": 1.0}).merge([a, b, c], base), total)
    assert not method("merge/consensus", prun_thre_k=4).merge([a, b, c], base).any()


def test_robust_weight_signatures() -> None:
    base, clean, robust = tensors(2)
    inside = MergeSite("x", tuple(base.shape), 0, 12)
    merged = method("merge/rws").merge([clean, robust], base, site=inside)
    signature = (merged - clean).double()
    own = (clean - base).double()
    assert abs(float((signature * own).sum() / own.norm() / signature.norm())) < 1e-4
    expected = (robust - base) - float(((robust - base) * (clean - base)).sum() / (clean - base).square().sum()) * (
        clean - base
    )
    assert torch.allclose(merged - clean, expected, atol=1e-5)
    back = method("merge/rws", alpha=-1.0).merge([clean, robust], base, site=inside)
    assert torch.allclose((merged + back) / 2, clean, atol=1e-6)
    assert torch.equal(method("merge/rws").merge([clean, robust], base, site=MergeSite("x", (37, 53), 9, 12)), clean)
    assert torch.equal(method("merge/rws").merge([clean, robust], base), clean)
    assert torch.allclose(method("merge/rws", keep_num=0).merge([clean, clean], base), clean, atol=1e-6)
    # A clean model that did not move: the signature is the whole change.
    assert torch.allclose(method("merge/rws", keep_num=0).merge([base, robust], base), robust, atol=1e-6)


def test_checkfree_averages_by_gradient_norms() -> None:
    before, behind = tensors(1)
    assert torch.allclose(method("merge/checkfree").merge([before, behind]), (before + behind) / 2, atol=1e-6)
    merged = method("merge/checkfree", gradient_norm=(3.0, 1.0)).merge([before, behind])
    assert torch.allclose(merged, (3.0001 * before + 1.0001 * behind) / 4.0002, atol=1e-6)
    assert torch.allclose(
        method("merge/checkfree", gradient_norm=(1.0, 0.0)).merge([before, behind]), before, atol=1e-3
    )


@pytest.mark.parametrize("variant", ["A", "B"])
def test_pcb_against_a_plain_computation(variant: str) -> None:
    base, *models = tensors(3, (20, 25))
    taus = torch.stack([model - base for model in models]).flatten(1).double()
    count, size, clamp, density = 3, 500, 0.02, 0.2
    ordered = taus.abs().sort(1).values
    low, high = ordered[:, int(size * clamp)], ordered[:, int(size * (1 - clamp)) - 1]
    clipped = taus.sign() * taus.abs().clamp(low[:, None], high[:, None])
    norm = (clipped.abs() - low[:, None]) / (high - low)[:, None]
    intra = (count * norm.square()).exp()
    if variant == "A":
        inter = (clipped * clipped.sum(0)).tanh()
    else:
        signed = clipped.sign() * norm
        inter = sum((signed * signed[j]).tanh() for j in range(count))
    b = intra * inter
    cut = b.sort(1).values[:, int(size * (1 - density))]
    scale = (torch.maximum(b, cut[:, None]) - cut[:, None]) / (b.max(1).values - cut)[:, None]
    merged = (scale * clipped).sum(0) / scale.sum(0).clamp(min=1e-12)
    found = method("merge/pcb", density=density, clamp=clamp, variant=variant).merge(models, base)
    assert torch.allclose(found.flatten(), base.flatten() + merged.float(), atol=2e-4)


def test_pcb_alone_keeps_the_largest() -> None:
    base, a = tensors(1, (20, 25))
    found = method("merge/pcb", density=0.2, clamp=0.0).merge([a], base) - base
    kept = found.abs() > 1e-7
    assert abs(int(kept.sum()) - 100) <= 1
    assert torch.allclose(found[kept], (a - base)[kept], atol=1e-6)
    assert float((a - base).abs()[kept].min()) >= float((a - base).abs()[~kept].max()) - 1e-6
    assert torch.isfinite(method("merge/pcb").merge([torch.ones(50)], torch.zeros(50))).all()


def test_compeft_is_signs_times_a_deviation() -> None:
    base, a = tensors(1)
    found = method("merge/compeft", density=0.1, alpha=2.0).merge([a], base) - base
    delta = a - base
    mask = brute_top(delta, int(0.1 * delta.numel()))
    assert torch.allclose(found, 2.0 * delta.std() * delta.sign() * mask, atol=1e-5)
    assert torch.equal(method("merge/compeft", alpha=0.0).merge([a], base), base)
    whole = method("merge/compeft", density=1.0).merge([delta])  # an adapter's own tensor, without a base
    assert torch.allclose(whole, delta.std() * delta.sign(), atol=1e-5)
