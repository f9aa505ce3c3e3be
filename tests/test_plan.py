"""Sizes, rules and plans as text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slimwright.errors import InputError, NotBuiltError, SlimwrightError
from slimwright.job.open import open_source
from slimwright.model.discover import discover
from slimwright.model.structure import Structure
from slimwright.plan import KEEP, PLAN_VERSION, Assignment, Plan, parse_bytes, parse_size
from slimwright.rules import Rule, bind
from tests.families import cached


@pytest.fixture(scope="module")
def qwen2() -> Structure:
    """Tied head, q/k/v and gate/up in one group each."""
    return discover(open_source(str(cached("qwen2", torch.bfloat16))))


# -- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4.25bit", 531_250), ("4.25 bits", 531_250), ("16bit", 2_000_000), ("30%", 600_000), ("100 %", 2_000_000),
        ("4.7GB", 4_700_000_000), ("1.5gb", 1_500_000_000), ("1GiB", 1 << 30), ("800MB", 800_000_000),
        ("800m", 800_000_000),
        ("12KiB", 12 << 10), ("123456", 123_456), ("123456B", 123_456), (".5kB", 500), (" 2 TB ", 2_000_000_000_000),
    ],
)  # fmt: skip
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text, parameters=1_000_000) == expected


@pytest.mark.parametrize(
    "text",
    ["", "bit", "%", "0%", "-3%", "nan%", "inf bit", "0", "-1GB", "4,5GB", "4.7XB", "1e3", "ib", "1ib", "five",
     "4.2.1bit"],
)  # fmt: skip
def test_no_sizes(text: str) -> None:
    with pytest.raises(InputError, match=r"--size") as refused:
        parse_size(text, parameters=1_000_000)
    assert len(str(refused.value).splitlines()) == 1


@given(st.integers(1, 10**15))
def test_every_number_of_bytes_is_read_exactly(count: int) -> None:
    assert parse_bytes(str(count), "--x") == count
    assert parse_bytes(f"{count}B", "--x") == count


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    for parse in (lambda: parse_size(text, 1000), lambda: parse_bytes(text, "--x")):
        try:
            assert parse() >= 0
        except InputError as error:
            assert str(error)


# -- rules ---------------------------------------------------------------------------------------------------------


def rules(*texts: str) -> list[Rule]:
    return [Rule.parse(text) for text in texts]


@pytest.mark.parametrize("text", ["", "lm_head", "lm_head:", ": keep", "lm_head: kepp", "lm_head: int9", "a: int4:g3x"])
def test_no_rules(text: str) -> None:
    with pytest.raises(InputError):
        Rule.parse(text)


def test_a_rule_binds_by_name_role_and_wildcard(qwen2: Structure) -> None:
    every = set(qwen2.choice_groups())
    down = {group for group in every if "down_proj" in group}
    assert len(down) == 2
    for pattern in ("down_proj", "*.down_proj", "down", "model.layers.*.mlp.down_proj.weight", "mlp.down_proj"):
        assert bind(rules(f"{pattern}: int8:g64"), qwen2) == dict.fromkeys(down, "int8:g64"), pattern
    assert set(bind(rules("*: int4:g32"), qwen2)) == every
    assert set(bind(rules("layers.1: keep"), qwen2)) == {group for group in every if ".layers.1." in group}


def test_the_most_specific_rule_wins_whatever_the_order(qwen2: Structure) -> None:
    texts = ("*: int4:g32", "*.down_proj: int8:g64", "model.layers.1.mlp.down_proj: keep")
    expected = bind(rules(*texts), qwen2)
    assert bind(rules(*reversed(texts)), qwen2) == expected
    assert expected["model.layers.0.mlp.down_proj"] == "int8:g64"
    assert expected["model.layers.1.mlp.down_proj"] == KEEP
    assert expected["model.embed_tokens"] == "int4:g32"


def test_of_equally_specific_rules_the_last_wins(qwen2: Structure) -> None:
    assert set(bind(rules("*.down_proj: int8:g64", "*.down_proj: int3:g32"), qwen2).values()) == {"int3:g32"}


def test_a_tied_head_is_bound_by_either_name(qwen2: Structure) -> None:
    assert qwen2.ties == {} or "lm_head.weight" in qwen2.ties
    for pattern in ("lm_head", "head", "embed_tokens", "embed"):
        assert bind(rules(f"{pattern}: keep"), qwen2) == {"model.embed_tokens": KEEP}, pattern


def test_weights_that_runtimes_fuse_cannot_be_bound_apart(qwen2: Structure) -> None:
    with pytest.raises(InputError, match=r"int8:g64 and keep.*fuse"):
        bind(rules("*.q_proj: keep", "*.k_proj: int8:g64", "*.v_proj: keep"), qwen2)
    with pytest.raises(InputError, match=r"binds '.*gate_proj.weight' but not '.*up_proj.weight'.*fuse"):
        bind(rules("*.gate_proj: keep"), qwen2)


def test_a_rule_that_names_nothing_is_refused_with_the_nearest_name(qwen2: Structure) -> None:
    with pytest.raises(InputError, match=r"'dwn_proj: keep' names no weight.*did you mean 'down_proj'"):
        bind(rules("dwn_proj: keep"), qwen2)


def test_a_grid_that_cannot_hold_a_weight_is_refused(qwen2: Structure) -> None:
    with pytest.raises(InputError, match=r"'q4_k' cannot hold|cannot hold for 'model.layers.0.mlp.down_proj.weight'"):
        bind(rules("down_proj: q4_k"), qwen2)


# -- plans ---------------------------------------------------------------------------------------------------------


def written(tmp_path: Path, **changes: object) -> Path:
    data = {"version": PLAN_VERSION, "assignments": {"a": {"grid": "int4:g32"}}, **changes}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_a_plan_reads_what_it_wrote(tmp_path: Path) -> None:
    plan = Plan(
        source="x",
        fingerprint="f",
        assignments={"g": Assignment(grid="int4:g32", method="quantize/rtn"), "h": Assignment(grid=KEEP)},
    )
    path = tmp_path / "plan.yaml"
    path.write_text(plan.to_yaml())
    assert Plan.load(path) == plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": PLAN_VERSION + 1}, "version 2"),
        ({"version": "new"}, "version"),
        ({"surprise": 1}, "surprise"),
        ({"assignments": {"a": {"grid": "int4:g32", "bits": 4}}}, "assignments.a.bits"),
        ({"assignments": {"a": {}}}, "assignments.a.grid"),
        ({"assignments": ["a"]}, "assignments"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        Plan.load(written(tmp_path, **changes))
    assert "plan.yaml" in str(refused.value) and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "changes",
    [{"heal": ["x"]}, {"adapters": {"a": "b"}}, {"target": "mlx"}],
)
def test_what_later_versions_plan_is_refused_by_name(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(NotBuiltError, match=next(iter(changes))):
        Plan.load(written(tmp_path, **changes))


@pytest.mark.parametrize(
    "content", [b"", b"- 1", b"a: [", b"\xff\xfe\x00", b"a: " + b"[" * 5000, b"!!python/object:os.system x"]
)
def test_what_is_no_plan_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError):
        Plan.load(path)
    with pytest.raises(InputError, match=r"cannot be read"):
        Plan.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("group", "assignment", "message"),
    [
        ("model.layers.0.mlp.dwn_proj", {"grid": KEEP}, "did you mean 'model.layers.0.mlp.down_proj'"),
        ("model.embed_tokens", {"grid": "int11"}, "'model.embed_tokens' is wrong.*bits must be 2 to 8, not 11"),
        ("model.embed_tokens", {"grid": "int4:g32", "method": "quantize/rtm"}, "quantize/rtn"),
        ("model.embed_tokens", {"grid": "int4:g32", "method": "quantize/rtn,clipp=none"}, "clip"),
        ("model.embed_tokens", {"grid": "q4_k"}, "cannot be"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(
    qwen2: Structure, group: str, assignment: dict[str, str], message: str
) -> None:
    plan = Plan(assignments={name: Assignment(grid=KEEP) for name in qwen2.choice_groups()})
    plan.check(qwen2)
    plan.assignments[group] = Assignment(**assignment)
    with pytest.raises(SlimwrightError, match=message):
        plan.check(qwen2)


def test_a_plan_must_speak_of_every_group(qwen2: Structure) -> None:
    plan = Plan(assignments={name: Assignment(grid=KEEP) for name in qwen2.choice_groups()})
    del plan.assignments["model.embed_tokens"]
    with pytest.raises(InputError, match=r"nothing of the group 'model.embed_tokens'"):
        plan.check(qwen2)
