"""Tasks of lm-evaluation-harness: what it logs becomes tables; without the package, one sentence."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimwright.errors import InputError
from slimwright.evaluate import harness
from slimwright.evaluate.harness import require_harness, tables_of
from slimwright.zoo import bundled_path


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


ROWS = [
    {"prompt": "def read(self, size", "choices": ["=-1):", " apple pie"], "answer": 0},
    {"prompt": "import", "choices": [" banana", " os"], "answer": 1},
    {"prompt": "for i in range(", "choices": ["10):", "the cat"], "answer": 1},
    {"prompt": "return self.", "choices": ["  ??", "name"], "answer": 1},
]
TASK = """task: own_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_a_task_of_ones_own_by_brute_force(tmp_path, monkeypatch):
    """The likelier choice, by the model's own log-probabilities; also that an unknown task is one sentence."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm-eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "own.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    model = AutoModelForCausalLM.from_pretrained(bundled_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    found = harness.run_tasks(model, tokenizer, [str(tmp_path / "own.yaml")], None, 0)

    def likelihood(prompt: str, choice: str) -> float:
        before, whole = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (prompt, prompt + choice))
        with torch.no_grad():
            logs = model(whole[:, :-1]).logits.log_softmax(-1)
        each = logs.gather(-1, whole[:, 1:, None])[0, :, 0]
        return float(each[before.shape[1] - 1 :].sum())

    right = []
    for row in ROWS:
        likely = max(range(2), key=lambda index: likelihood(row["prompt"], row["choices"][index]))
        right.append(float(likely == row["answer"]))
    assert 0 < sum(right) < 4, "the task tells"
    assert found["own_words"].columns["acc"].tolist() == right
    with pytest.raises(InputError, match="The tasks no_such_task cannot be run here") as error:
        harness.run_tasks(model, tokenizer, ["no_such_task"], None, 0)
    assert len(str(error.value).splitlines()) == 1
