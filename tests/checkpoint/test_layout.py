"""The layout: sizes known to the byte, 64-byte alignment, costs that add up and never fall short."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimwright.checkpoint import DTYPES, TensorEntry, entry_cost, overhead_bound, plan_layout

entries_strategy = st.lists(
    st.builds(
        TensorEntry,
        name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30),
        dtype=st.sampled_from(list(DTYPES.values())),
        shape=st.lists(st.integers(0, 70), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=40,
    unique_by=lambda entry: entry.name,
).filter(lambda entries: all(entry.name != "__metadata__" for entry in entries))


@settings(max_examples=150, deadline=None, database=None)
@given(entries=entries_strategy, max_shard_bytes=st.sampled_from([300, 1000, 20_000, 10**6, 5 * 10**9]))
def test_costs_add_up_to_a_bound_that_holds(entries: list[TensorEntry], max_shard_bytes: int) -> None:
    layout = plan_layout(entries, max_shard_bytes)
    assert layout.total_bytes == sum(shard.nbytes for shard in layout.shards)
    # What a search would do: the smallest budget that its additive costs say is enough.
    budget = layout.total_bytes
    while sum(entry_cost(entry, budget) for entry in entries) + overhead_bound(budget, max_shard_bytes) > budget:
        budget += 1 + budget // 1000
    assert layout.total_bytes <= budget
    for shard in layout.shards:
        assert shard.nbytes <= max_shard_bytes or len(shard.tensors) == 1
        assert len(shard.head) % 64 == 0
        position = len(shard.head)
        for placed in shard.tensors:
            assert (placed.start, placed.stop) == (position, position + placed.entry.nbytes)
            assert placed.start % placed.entry.dtype.itemsize == 0
            assert placed.entry.nbytes % 64 or placed.start % 64 == 0
            position = placed.stop
        assert position == shard.nbytes
    placed_names = sorted(placed.entry.name for shard in layout.shards for placed in shard.tensors)
    assert placed_names == sorted(entry.name for entry in entries)


def test_a_small_model_loses_less_than_a_thousandth() -> None:
    entries = [TensorEntry("model.embed_tokens.weight", torch.uint8, (512, 64))]
    for block in range(4):
        for site in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp.up_proj", "mlp.down_proj"):
            entries.append(TensorEntry(f"model.layers.{block}.{site}.weight", torch.uint8, (64, 42)))
            entries.append(TensorEntry(f"model.layers.{block}.{site}.scale", torch.float16, (64, 1)))
    layout = plan_layout(entries)
    assert 90_000 < layout.total_bytes < 110_000
    bound = sum(entry_cost(entry, 120_000) for entry in entries) + overhead_bound(120_000)
    assert layout.total_bytes <= bound < 1.001 * layout.total_bytes + 63


def test_many_shards_stay_below_the_bound() -> None:
    chooser = random.Random(0)
    entries = [TensorEntry(f"w.{i}", torch.uint8, (chooser.choice([10, 400, 900]),)) for i in range(300)]
    layout = plan_layout(entries, max_shard_bytes=2000)
    assert len(layout.shards) > 50
    budget = sum(entry_cost(entry, layout.total_bytes) for entry in entries)
    assert layout.total_bytes <= budget + overhead_bound(budget, 2000)
    assert layout.shards[1].file_name == f"model-00002-of-{len(layout.shards):05d}.safetensors"
    assert layout.index is not None
    assert layout.index["metadata"] == {"total_size": sum(entry.nbytes for entry in entries)}
    assert list(layout.index["weight_map"]) == [entry.name for entry in entries]


def test_order_is_that_of_the_caller_within_an_alignment() -> None:
    sizes = {"a": 64, "b": 7, "c": 128, "d": 96, "e": 640, "f": 7}
    layout = plan_layout([TensorEntry(name, torch.uint8, (size,)) for name, size in sizes.items()])
    assert [placed.entry.name for placed in layout.shards[0].tensors] == ["a", "c", "e", "d", "b", "f"]


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [TensorEntry("a", torch.uint8, (1,)), TensorEntry("a", torch.uint8, (1,))],
        [TensorEntry("", torch.uint8, (1,))],
        [TensorEntry("__metadata__", torch.uint8, (1,))],
        [TensorEntry("a", torch.complex128, (1,))],
        [TensorEntry("a", torch.uint8, (-1,))],
    ],
)
def test_what_cannot_be_written(entries: list[TensorEntry]) -> None:
    with pytest.raises(ValueError):
        plan_layout(entries)
