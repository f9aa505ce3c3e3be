"""The page: self-contained, escaped, with what the report tells."""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from slimwright.serving import page
from slimwright.serving.served import Served, load_served
from slimwright.zoo import bundled_path, minilm_path
from tests.report.sample import sample_report
from tests.serving.serving import get


@pytest.fixture(scope="module")
def plain() -> Iterator[Served]:
    made = load_served(str(bundled_path()), dtype="float32")
    yield made
    made.stop(0)


def check(text: str, policy: str) -> None:
    """No address but of this server; the one script is the one that the policy allows."""
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", text) and "@import" not in text
    assert {address for address in re.findall(r'(?:src|href)="([^"]*)"', text)} <= {
        "/report",
        "/metrics",
        "/openapi.json",
    }
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy and "http" not in policy and 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text and not re.search(r"\son\w+=", text)


def test_a_model_without_a_report(plain: Served) -> None:
    """The picture is of the checkpoint: every matrix once, in bytes that add up."""
    answer = get(plain, "/")
    check(answer.text, answer.headers["content-security-policy"])
    assert answer.text.count("<rect") == 5 * 7 + 1 + 4  # blocks by roles, the embedding, four parts of the bar
    assert "3,738,368" in answer.text and "1,024 tokens" in answer.text and "/report" not in answer.text
    assert "16.00" in answer.text and "7.48 MB" in answer.text
    assert get(plain, "/report").status_code == 404


def test_a_result_shows_its_report(plain: Served, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(bundled_path(), tmp_path / "out"))
    report = sample_report()
    (directory / "report.json").write_text(json.dumps(report))
    (directory / "report.html").write_text("<!doctype html>the report")
    served = load_served(str(directory), dtype="float32")
    answer = get(served, "/")
    check(answer.text, answer.headers["content-security-policy"])
    assert '<iframe src="/report"' in answer.text and "What it is made of" in answer.text
    found = get(served, "/report")
    assert "the report" in found.text and "frame-ancestors 'self'" in found.headers["content-security-policy"]
    served.stop(0)


def test_names_are_escaped(plain: Served, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(bundled_path(), tmp_path / '<script>alert(1)<"'))
    served = load_served(str(directory), dtype="float32")
    text, policy = page.front(served)
    check(text, policy)
    assert "alert(1)<" not in text and "&lt;script&gt;alert(1)" in text
    served.stop(0)


def test_an_encoder_compares_texts() -> None:
    served = load_served(str(minilm_path()), dtype="float32")
    text, policy = page.front(served)
    check(text, policy)
    assert 'data-kind="encoder"' in text and "/v1/embeddings" in text and "What it is made of" in text
    served.stop()
