"""The retrieval tasks: of held-out modules only, no question in its answer; scoring by hand and in degenerate cases."""

import ast
import inspect
import sysconfig
from pathlib import Path

import pytest
import torch

from slimwright.calibrate.data import Document
from slimwright.errors import InputError
from slimwright.evaluate import retrieval
from slimwright.evaluate.embed import embed
from slimwright.evaluate.retrieval import (
    RetrievalTask,
    is_task,
    read_task,
    score_task,
    standard_library_task,
    task_of_pairs,
)
from slimwright.zoo import minilm_path
from slimwright.zoo.text import part_of
from tests.evaluate.samples import beir, bert, sentences, word_tokenizer

SOURCE = '''
import os

def plain(a, b):
    """Add two numbers of any kind.

    More words.
    """
    # a comment
    return a + b

class Outer:
    """Not a function."""

    async def method(self):
        "Wait for the   other\\n        side."
        def inner():
            """Inner words."""
            return 1
        return inner

    def silent(self):
        return 2

    def only_words(self):
        """Nothing but words."""

    def bareHTTPSend(
        self, message, to
    ):
        return message, to

def twice(): return 1
def twice(): return 2
'''


def test_passages_by_hand():
    found = {p.name: (p.query, p.code) for p in retrieval._passages(SOURCE)}
    assert set(found) == {"plain", "Outer.method", "Outer.silent", "twice", "Outer.bareHTTPSend"}
    assert found["plain"] == ("Add two numbers of any kind.", "def plain(a, b):\n    return a + b")
    query, code = found["Outer.method"]
    assert query == "Wait for the other side."
    assert code == "async def method(self):\n    def inner():\n        return 1\n    return inner"
    assert found["Outer.silent"] == ("", "return 2"), "a name of two words asks for nothing"
    assert found["twice"] == ("", "def twice(): return 2")
    assert found["Outer.bareHTTPSend"] == ("outer bare http send message to", "return message, to")


LONG = '''
def long(first):
    """Too short."""
    one = first  # trailing words do not ask
    # These two lines ask
    # for the second passage.
    two = one + "# no comment"
    # x = two + 1 + 2 + 3
    # Neither does a later one here.
    three = two
    # seldom
    return three
'''


def test_long_functions_are_cut_at_line_ends(monkeypatch):
    monkeypatch.setattr(retrieval, "DOCUMENT_CHARACTERS", 50)
    assert [tuple(p) for p in retrieval._passages(LONG)] == [
        ("long", "", "def long(first):\n    one = first"),
        ("long [2]", "These two lines ask for the second passage.", '    two = one + "# no comment"\n    three = two'),
        ("long [3]", "", "    return three"),
    ]
    assert retrieval._is_code("x = two + 1 + 2 + 3") and not retrieval._is_code("Neither does a later one here.")


def test_the_standard_librarys_task():
    task = standard_library_task()
    assert 700 <= len(task.queries) <= 1000 and 1000 <= len(task.documents) <= 1400
    assert task.queries.keys() == task.judgements.keys()
    assert len(set(task.queries.values())) == len(task.queries), "no query twice"
    assert len(set(task.documents.values())) == len(task.documents), "no document twice"
    answers = [answer for grades in task.judgements.values() for answer in grades]
    assert len(set(answers)) == len(answers), "no passage has two queries"
    for query, grades in task.judgements.items():
        (answer,) = grades
        assert query == f"words of {answer}" and grades[answer] == 1
        assert part_of(answer.partition(":")[0]) == "heldout"
        assert len(task.queries[query].split()) >= 3
        assert task.queries[query] not in " ".join(task.documents[answer].split()), "the answer holds no question"
    assert all(part_of(name.partition(":")[0]) == "heldout" for name in task.documents)
    assert max(map(len, task.documents.values())) <= 400


def test_the_answers_are_the_functions_of_the_docstrings():
    """By Python's own docstrings, for modules that can be parsed from where Python keeps them."""
    task, checked, parsed = standard_library_task(), 0, {}
    for query, grades in task.judgements.items():
        (answer,) = grades
        path, _, name = answer.partition(":")
        if "[" in name:
            continue
        node = parsed[path] = parsed.get(path) or ast.parse((Path(sysconfig.get_path("stdlib")) / path).read_bytes())
        for part in name.split("."):
            node = [child for child in node.body if getattr(child, "name", None) == part][-1]
        doc = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0].split()
        if len(doc) >= 3:
            assert " ".join(doc) == task.queries[query]
            assert task.documents[answer].split("(")[0].split()[-1] == node.name
            checked += 1
    assert checked > 300


def test_beir(tmp_path):
    task = read_task(str(beir(tmp_path / "task")))
    assert is_task(str(tmp_path / "task")) and not is_task(str(tmp_path))
    assert len(task.documents) == 30 and task.judgements["q3"] == {"d3": 1}
    assert task.documents["d3"].endswith(task.queries["q3"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("queries.jsonl", None, "queries.jsonl, which is not there"),
        ("queries.jsonl", "{", "line 1 is not JSON"),
        ("queries.jsonl", '{"_id": 3, "text": "x"}', "no `_id` and `text` that are strings"),
        ("queries.jsonl", '{"_id": "other", "text": "x"}', "names the query 'q0', which is not in queries.jsonl"),
        ("qrels/test.tsv", "q\td\tg\nq0 d0 1", "line 2 is not a query"),
        ("qrels/test.tsv", "q\td\tg\nq0\td0\tmuch", "line 2 is not a query"),
        ("qrels/test.tsv", "q\td\tg\n", "judges no query"),
    ],
)
def test_bad_beir(file, content, message, tmp_path):
    folder = beir(tmp_path / "task")
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(InputError, match=message):
        read_task(str(folder))


def test_pairs():
    pairs = [Document("a", "q1", "d1"), Document("b", "q1", "d2"), Document("c", "q2", "d2"), Document("n", "alone")]
    for found in (pairs, pairs[::-1]):
        task = task_of_pairs(found)
        texts = {
            task.queries[query]: {task.documents[name] for name in grades} for query, grades in task.judgements.items()
        }
        assert texts == {"q1": {"d1", "d2"}, "q2": {"d2"}} and sorted(task.documents.values()) == ["d1", "d2"]
    many = task_of_pairs([Document(str(i), f"q{i}", f"d{i}") for i in range(1500)])
    assert len(many.queries) == len(many.judgements) == 1000 and len(many.documents) == 1400
    assert all(many.queries[q][1:] == many.documents[d][1:] for q, grades in many.judgements.items() for d in grades)


def task_of(queries, documents, judgements):
    return RetrievalTask(dict.fromkeys(queries, ""), dict.fromkeys(documents, ""), judgements)


def test_scores_by_hand():
    task = task_of(["q", "b"], ["a", "b", "c"], {"q": {"c": 1}, "b": {"a": 1, "b": 1}})
    documents = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Cosines of q: 1, 0, 0.6, so c is second. Of b: 0, 1, 0.8; the document named like the query is left out.
    found = score_task(task, queries, documents)
    assert found.names == ("b", "q") and found.columns["reciprocal_rank"].tolist() == [0.5, 0.5]
    assert score_task(task, queries, documents, "dot").columns["reciprocal_rank"].tolist() == [0.5, 1.0]


def test_perfect_vectors_find_everything_and_zero_ones_go_by_name():
    names = [f"d{i:02}" for i in range(30)]
    task = task_of([f"q{i}" for i in range(30)], names, {f"q{i}": {names[i]: 1} for i in range(30)})
    found = score_task(task, torch.eye(30), torch.eye(30))
    assert all((found.columns[column] == 1).all() for column in found.columns)
    ranks = 1 / score_task(task, torch.zeros(30, 5), torch.zeros(30, 5)).columns["reciprocal_rank"]
    order = {query: 30 - int(query[1:]) for query in task.queries}  # names descending
    assert ranks.round().astype(int).tolist() == [order[query] for query in sorted(task.queries)]


def test_the_cut_keeps_all_that_tie_with_the_last(monkeypatch):
    names = [f"d{i:02}" for i in range(20)]
    task = task_of(["q"], names, {"q": {"d03": 1}})
    documents = torch.zeros(20, 1)
    documents[19] = 1.0
    whole = score_task(task, torch.ones(1, 1), documents, "dot")
    monkeypatch.setattr(retrieval, "DEPTH", 5)
    cut = score_task(task, torch.ones(1, 1), documents, "dot")
    assert cut.columns["reciprocal_rank"] == whole.columns["reciprocal_rank"] == 1 / 17


def test_bad_vectors():
    task = task_of(["q"], ["a", "b"], {"q": {"a": 1}})
    with pytest.raises(InputError, match="not of one space"):
        score_task(task, torch.ones(1, 3), torch.ones(2, 4))
    with pytest.raises(InputError, match="one vector for each"):
        score_task(task, torch.ones(1, 3), torch.ones(3, 3))
    with pytest.raises(InputError, match="NaN"):
        score_task(task, torch.ones(1, 3), torch.full((2, 3), torch.nan))


def test_mean_pooling_ignores_padding_and_keeps_the_order():
    model, tokenizer = bert(), word_tokenizer()
    texts = [" ".join(text.split()[: 1 + i % 9]) for i, text in enumerate(sentences(70))]
    found = embed(model, tokenizer, texts)
    with torch.no_grad():
        for text, vector in list(zip(texts, found))[::7]:
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            torch.testing.assert_close(vector, hidden.mean(0), rtol=1e-4, atol=1e-5)
    cut = embed(model, tokenizer, texts[:5], longest=4)
    assert cut.shape == (5, 32) and not torch.allclose(cut[4], found[4])


def test_mean_pooling_is_what_sentence_transformers_does():
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    directory, texts = minilm_path(), ["def read(self): ...", "Read a file and return its bytes.", "x"]
    whole = embed(SentenceTransformer(str(directory), device="cpu"), None, texts)
    plain = embed(AutoModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory), texts)
    torch.testing.assert_close(plain / plain.norm(dim=1, keepdim=True), whole, rtol=1e-4, atol=1e-5)
