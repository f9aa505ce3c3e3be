"""Tasks of lm-evaluation-harness: what it logs becomes tables; without the package, one sentence."""

import pytest

from slimwright.errors import InputError
from slimwright.evaluate import harness
from slimwright.evaluate.harness import require_harness, tables_of


def test_logged_samples_become_tables():
    three = ["acc", "acc_norm", "perplexity"]
    samples = {
        "arc": [
            {"doc_id": 3, "metrics": three, "filter": "none", "acc": 1.0, "acc_norm": 0, "perplexity": (-3.0, 4)},
            {"doc_id": 5, "metrics": three, "filter": "none", "acc": False, "acc_norm": 1, "perplexity": (-3.0, 4)},
        ],
        "gsm": [
            {"doc_id": 0, "metrics": ["exact_match"], "filter": "strict", "exact_match": 1.0},
            {"doc_id": 1, "metrics": ["exact_match"], "filter": "strict", "exact_match": 0.0},
            {"doc_id": 0, "metrics": ["exact_match"], "filter": "flexible", "exact_match": 1.0},
            {"doc_id": 1, "metrics": ["exact_match"], "filter": "flexible", "exact_match": 1.0},
        ],
    }  # fmt: skip
    found = tables_of(samples)
    assert found["arc"].names == ("3", "5") and set(found["arc"].columns) == {"acc", "acc_norm"}
    assert found["arc"].columns["acc"].tolist() == [1, 0]
    assert found["gsm"].columns["exact_match,flexible"].tolist() == [1, 1]
    assert found["gsm"].columns["exact_match,strict"].tolist() == [1, 0]
    with pytest.raises(InputError, match="'t' has no metric that is a number"):
        tables_of({"t": [{"doc_id": 0, "metrics": ["x"], "filter": "none", "x": (1, 2)}]})


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install lm-eval"):
        require_harness()


def test_the_name_of_a_task_file(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("# a task\ntask: 'own_words'  # its name\nprocess_docs: !function utils.f\n")
    assert harness._name(str(file)) == "own_words" and harness._name("arc_easy") == "arc_easy"
    file.write_text("group: x\n")
    with pytest.raises(InputError, match="no line `task: NAME`"):
        harness._name(str(file))
    with pytest.raises(InputError, match="not there"):
        harness._name(str(tmp_path / "absent.yml"))
