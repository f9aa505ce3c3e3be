"""The command line: exit codes, one sentence on stderr, one JSON object on stdout, help."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimwright import __version__
from slimwright.cli import main
from slimwright.job import doctor as doctoring
from tests.families import FAMILIES, cached
from tests.job.conftest import PLAIN, files, fitted, in_this_process, tiny

__all__ = ["in_this_process"]

VERBS = ("fit", "inspect", "export", "measure", "merge", "methods", "doctor", "cache")


class Ran:
    """What a command did."""

    def __init__(self, code: object, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run a command line in this process."""

    def command(*arguments: str) -> Ran:
        capfd.readouterr()
        terminate = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as exited:
                main(list(arguments))
        finally:
            signal.signal(signal.SIGTERM, terminate)
        captured = capfd.readouterr()
        return Ran(exited.value.code, captured.out, captured.err)

    return command


def said(ran: Ran) -> str:
    """The one sentence of a refusal."""
    assert ran.out == "" and "Traceback" not in ran.err
    lines = [line for line in ran.err.splitlines() if line.startswith("slimwright: ")]
    assert len(lines) == 1 and ran.err.splitlines()[-1] == lines[0], ran.err
    return lines[0]


def test_fit_prints_one_object_and_logs_elsewhere(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run("fit", tiny(), "--grid", "int4:g32", "--method", PLAIN, "--out", str(tmp_path / "out"), "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["verified"]["ok"] and len(ran.out.splitlines()) == 1
    ran = run("fit", tiny(), "--grid", "int4:g32", "--method", PLAIN, "--out", str(tmp_path / "out"))
    assert ran.code == 0 and "finished result of this same job" in re.sub(r"\s+", " ", ran.out)
    assert "from_pretrained" in ran.out and "report.html" in ran.out


def test_a_dry_run(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run("fit", tiny(), "--grid", "int4:g32", "--dry-run")
    assert ran.code == 0 and "exactly" in ran.out and "MB" in ran.out
    ran = run("fit", tiny(), "--size", "40%", "--dry-run", "--json")
    assert ran.code == 0 and json.loads(ran.out)["dry_run"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--latency", "30ms"),
        ("--allow", "prune"), ("--effort", "best"), ("--adapter", "a=b"), ("--ray", "auto"),
    ],
)  # fmt: skip
def test_options_that_are_not_built(run, option: str, value: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run("fit", tiny(), "--size", "40%", option, value, "--out", str(tmp_path / "out"))
    assert ran.code == 2 and option in said(ran) and "not built" in said(ran)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["tune"])
def test_verbs_that_are_not_built(run, verb: str) -> None:  # type: ignore[no-untyped-def]
    for arguments in ((), ("x", "--method", "paca", "--out", "y")):
        ran = run(verb, *arguments)
        assert ran.code == 2 and verb in said(ran) and "not built" in said(ran)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("fit", "{tiny}", "--size", "40%", "--data", "chat.jsonl", "--out", "{out}"),
            "--data chat.jsonl cannot be used",
        ),
        (("fit", "{tiny}", "--size", "40%", "--device", "cuda", "--out", "{out}"), "--device cuda"),
        (("fit", "{tiny}", "--size", "40%"), "--out"),
        (("fit", "{tiny}", "--out", "{out}"), "--size"),
        (("fit", "{tiny}", "--sise", "40%", "--out", "{out}"), "--sise"),
        (("fit", "{tiny}", "--size", "40%", "--job-time", "soon", "--out", "{out}"), "--job-time 'soon'"),
        (("fit", "{tiny}", "--size", "40%", "--job-time", "", "--out", "{out}"), "--job-time"),
        (("fit", "{tiny}", "--size", "40%", "--job-time", "nan", "--out", "{out}"), "--job-time"),
        (("fit", "{tiny}", "--size", "40%", "--seed", "x", "--out", "{out}"), "seed"),
        (("fit", "{tiny}", "--size", "40%", "--shard-size", "0", "--out", "{out}"), "--shard-size"),
        (("fit", "/absent", "--size", "40%", "--out", "{out}"), "/absent"),
        (("fit",), "argument 'model'"),
        (("fitt", "x"), "fitt"),
        (("inspect", "/absent"), "/absent"),
        (("export", "{tiny}"), "--out"),
        (("export", "{tiny}", "--out", "{out}"), "plain weights already"),
        (("export", "{tiny}", "--to", "compressed-tensors", "--out", "{out}"), "no packed weights"),
        (("measure",), "argument 'models"),
        (("measure", "/absent"), "/absent"),
        (("measure", "{tiny}", "--data", "own=/absent/text"), "/absent/text"),
        (("measure", "{tiny}", "--repeats", "-1"), "--repeats -1"),
        (("measure", "{tiny}", "--out", "{tiny}"), "not empty"),
        (("methods", "quantize/rtm"), "quantize/rtn"),
        (("cache", "rm", "nothing-of-this-name"), "nothing-of-this-name"),
        (("cache", "mv"), "mv"),
    ],
)
def test_bad_command_lines(run, arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run(*(word.format(tiny=tiny(), out=tmp_path / "out") for word in arguments))
    assert ran.code == 2 and message in said(ran)
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_fails_exits_with_1(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("slimwright.job.state.check_complete", lambda *given: 1 / 0)
    ran = run("fit", tiny(), "--grid", "int4:g32", "--method", PLAIN, "--out", str(tmp_path / "out"))
    assert ran.code == 1 and "ZeroDivisionError" in said(ran)
    log = re.search(r"details in (\S+\.log)", said(ran))
    assert log and "Traceback" in Path(log[1]).read_text()
    Path(log[1]).unlink()


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_at_most_ten_options(run, verb: str) -> None:  # type: ignore[no-untyped-def]
    ran = run(verb, "--help")
    own = set(re.findall(r"--[a-z][a-z-]+", ran.out)) - {"--help", "--help-all"}
    assert ran.code == 0 and len(own) <= 10
    if verb == "fit":
        every = run(verb, "--help-all")
        assert every.code == 0 and {"--seed", "--method", "--search", "--job-time"} <= set(
            re.findall(r"--[a-z][a-z-]+", every.out)
        )
        again = run(verb, "--help")
        assert again.out == ran.out, "asking for all of it once does not change the help for good"


def test_version_methods_doctor_cache(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    assert run("--version").out.strip() == __version__
    assert "quantize/rtn" in run("methods").out
    assert {found["name"] for found in json.loads(run("methods", "--json").out)} >= {"quantize/rtn", "quantize/hqq"}
    assert "clip" in run("methods", "quantize/rtn").out
    assert "clip" in json.dumps(json.loads(run("methods", "quantize/rtn", "--json").out))
    found = json.loads(run("doctor", "--json").out)
    assert found["versions"]["torch"]["version"] and found["disk"]["free"] > 0 and "torch" in run("doctor").out
    monkeypatch.setitem(doctoring.TESTED, "torch", ("99.0", "99.1"))
    assert "outside the tested range" in re.sub(r"\s+", " ", run("doctor").out)
    monkeypatch.setenv("SLIMWRIGHT_CACHE", str(tmp_path / "cache"))
    assert json.loads(run("cache", "ls", "--json").out)["entries"] == []
    (tmp_path / "cache" / "zoo").mkdir(parents=True)
    (tmp_path / "cache" / "zoo" / "x").write_bytes(bytes(1000))
    (tmp_path / "cache" / "other").write_bytes(bytes(10))
    assert json.loads(run("cache", "ls", "--json").out)["entries"] == [
        {"name": "other", "bytes": 10}, {"name": "zoo", "bytes": 1000},
    ]  # fmt: skip
    assert "zoo" in run("cache", "ls").out
    assert run("cache", "rm", "../cache").code == 2
    assert run("cache", "rm", "zoo").code == 0 and not (tmp_path / "cache" / "zoo").exists()
    assert run("cache", "rm").code == 0 and list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_inspect_every_family(run, name: str) -> None:  # type: ignore[no-untyped-def]
    ran = run("inspect", tiny(name), "--json")
    assert ran.code == 0 and len(ran.out.splitlines()) == 1
    assert json.loads(ran.out)["family"]
    ran = run("inspect", tiny(name))
    assert ran.code == 0 and len(ran.out.splitlines()) > 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_command_names_the_command_that_continues(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forked child gets the signal in the middle of its build; the command that it names ends with the same bytes."""
    import slimwright.job.work  # noqa: F401
    from slimwright.job import build as building
    from slimwright.job import parallel

    working = sys.modules["slimwright.job.work"]

    monkeypatch.setattr(parallel, "_pool", None)  # threads do not survive a fork
    model, out = tiny("llama"), tmp_path / "small model"
    arguments = ["fit", model, "--size", "40%", "--method", PLAIN, "--out", str(out)]
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(tmp_path / name, os.O_WRONLY | os.O_CREAT), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        honest = building.build

        def build(source, structure, units, writer, journal, step, *data):  # type: ignore[no-untyped-def]
            return honest(
                source, structure, units, writer, journal,
                lambda done, total: os.kill(os.getpid(), number) if 2 * done > total else step(done, total),
                *data,
            )  # fmt: skip

        code = 99
        try:
            working.build = build  # type: ignore[attr-defined]
            main(arguments)
        except SystemExit as exited:
            code = int(exited.code or 0)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert (tmp_path / "stdout").read_text() == "" and not out.exists()
    *_, sentence, command = (tmp_path / "stderr").read_text().strip().splitlines()
    assert sentence.startswith("slimwright: Interrupted")
    assert shlex.split(command) == ["slimwright", *arguments]
    with pytest.raises(SystemExit) as exited:
        main(shlex.split(command)[1:])
    assert not exited.value.code
    fitted(model, tmp_path / "whole", size="40%")
    assert files(out) == files(tmp_path / "whole")


def test_python_m_slimwright() -> None:
    ran = subprocess.run([sys.executable, "-m", "slimwright", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == __version__ and ran.stderr == ""


def test_a_full_job_from_the_command_line_equals_one_from_python(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run(
        "fit", tiny(), "--size", "40%", "--method", PLAIN, "--rule", "lm_head: int8:g64", "--json", "--out",
        str(tmp_path / "a"),
    )  # fmt: skip
    assert ran.code == 0
    fitted(tiny(), tmp_path / "b", size="40%", rules=("lm_head: int8:g64",))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert json.loads(ran.out)["reproduce"].startswith("slimwright fit ")


def test_merge_from_the_command_line(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, other, out = tiny("llama"), str(cached("llama", torch.bfloat16, 1)), tmp_path / "out"
    file = tmp_path / "merge.yaml"
    file.write_text(f"merge_method: slerp\nbase_model: {model}\nmodels: [{{model: {other}}}]\n")
    refused = run("merge", str(file), "--out", str(out))
    assert refused.code == 2 and "'t' has no value" in said(refused)
    file.write_text(f"method: dare\nbase: {model}\nmodels: [{other}]\n")
    plan = run("merge", str(file), "--dry-run")
    assert plan.code == 0 and "the paper's definitions" in plan.out
    assert all(word in plan.out for word in ("memory", "time", "size")) and not out.exists()
    made = run("merge", str(file), "--out", str(out), "--json", "--seed", "3", "--shard-size", "100KB")
    report = json.loads(made.out)
    assert made.code == 0 and report["seed"] == 3 and report["verified"]["ok"] and report["size"]["shards"] > 1
    again = run("merge", str(file), "--out", str(out), "--seed", "3", "--shard-size", "100KB")
    assert again.code == 0 and "finished result" in again.out
    changed = run("merge", str(file), "--out", str(out), "--seed", "4")
    assert changed.code == 2 and "not empty" in said(changed)
    unproven = run("merge", str(file), "--out", str(tmp_path / "quick"), "--seed", "3", "--no-verify")
    assert unproven.code == 0 and "proof" not in unproven.out
    whole = load_file(tmp_path / "quick" / "model.safetensors")
    parts = {name: tensor for shard in out.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_merging_imports_no_transformers() -> None:
    """What a merge of plain checkpoints imports, in a fresh process."""
    program = "import sys, slimwright; slimwright.merge; slimwright.methods(); print('transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
