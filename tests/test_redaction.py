"""No secret leaves by a message, a log line, a traceback or a written file."""

from __future__ import annotations

import pickle

import pytest

from clipkit.log import encode_record
from clipkit.redaction import redact, redact_all
from clipkit.types import DataError


@pytest.mark.parametrize(
    "text",
    [
        "https://me:TOKEN@host/x.tar",
        "s3://TOKEN@bucket/x",
        "https://host/x.tar?sig=TOKEN&part=1",
        "https://host/x?X-Amz-Signature=TOKEN",
        "https://host/x?X-Amz-Security-Token=TOKEN&X-Amz-Credential=TOKEN",
        "HF_TOKEN=TOKEN",
        "https://me:TO@KEN:TOKEN@host/x.tar",
        "pipe:curl -u x https://h/?access_key=TOKEN",
        "two https://a:TOKEN@h and https://b:TOKEN@h",
    ],
)
def test_secrets_are_replaced(text: str) -> None:
    found = redact(text)
    assert "TOKEN@" not in found
    assert "=TOKEN" not in found
    assert "***" in found
    assert "TOKEN@" not in encode_record({"text": text})


@pytest.mark.parametrize(
    "text",
    ["a/b@c.tar", "s3://bucket/key=value/x.tar", "me@host", "num_tokens=77", "monkey=3", "https://h/a@b"],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://h/a.tar?part=7&key", "https://h/a.tar?part=***&***"),
        ("https://h/{000..009}.tar?v=1: HTTP 404", "https://h/{000..009}.tar?v=*** HTTP 404"),
        ("'https://h/a?x=a,b;c' and more", "'https://h/a?x=***' and more"),
        ("really? yes=no", "really? yes=no"),
    ],
)
def test_no_query_value_is_shown(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


def test_values_of_secret_variables_are_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef123")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hf_abcdef123456")
    monkeypatch.setenv("MY_KEY_FILE", str(tmp_path))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    text = f"hf_abcdef123456 and hf_abcdef123 in {tmp_path}: false"
    assert redact(text) == f"*** and *** in {tmp_path}: false"
    assert redact_all({"a": [text, 1]}) == {"a": [f"*** and *** in {tmp_path}: false", 1]}
    error = DataError("the server said hf_abcdef123", "use another than hf_abcdef123")
    copy = pickle.loads(pickle.dumps(error))
    assert str(error) == str(copy) == "the server said ***\nuse another than ***"
