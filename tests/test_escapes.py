"""Names and captions from strangers never reach a terminal as commands, nor a log as a second line."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.cli import main
from clipkit.config.reading import dump_yaml
from clipkit.export import save_open_clip
from clipkit.log import RunLog
from clipkit.models import build
from clipkit.redaction import visible
from tests.conftest import TINY_MODEL
from tests.evaluation.layouts import image_bytes, write_tar
from tests.train.runs import values

HOSTILE = "a\x1b[2J\x1b]0;b\x07[red]c[/red]\u202ed\x9b31m\u2028\x85\r\nerror: forged\n  cure: rm -rf"
TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def obeyed(text: str) -> list[str]:
    """Characters that move a cursor, end a line or turn text round, by Unicode's own tables; not \\n."""
    return [
        character
        for character in text.replace("\n", "")
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(character) in TURNING
    ]


@given(st.text(st.characters(codec=None, categories=["Cc", "Cf", "Cs", "Zl", "Zp", "L", "S", "P"])))
def test_nothing_of_a_text_is_obeyed_and_the_rest_stays(text: str) -> None:
    assert obeyed(visible(text)) == []
    assert "\n" not in visible(text)
    assert obeyed(visible(text, lines=True).replace("\t", "")) == []
    if not obeyed(text) and not any(character in "\n\t\u061c\u200e\u200f" for character in text):
        assert visible(text) == text


@settings(max_examples=50)
@given(st.dictionaries(st.text(), st.text() | st.lists(st.text(), max_size=3), max_size=3))
def test_a_json_line_is_one_line_of_the_same_value(value: object) -> None:
    line = visible(json.dumps(value, ensure_ascii=False))
    assert len(line.splitlines()) == 1
    assert json.loads(line) == value


def test_markup_in_a_note_is_text(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path, total_steps=1, tty=True, stream=stream) as log:
        log.note(f"[bold]x[/bold] {HOSTILE}")
    assert f"[bold]x[/bold] {visible(HOSTILE)}" in stream.getvalue().replace("\r", "")


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    found = capsys.readouterr()
    assert obeyed(found.out + found.err) == []
    assert not any(line.startswith("error: forged") for line in (found.out + found.err).splitlines())
    return found.out, found.err


def test_class_folder_and_file_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_open_clip(build(TINY_MODEL), tmp_path / "model")
    data = tmp_path / HOSTILE.replace("/", "")
    for number in range(4):
        folder = data / f"{number % 2} {HOSTILE.replace('/', '')}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(image_bytes(number))
    templates = tmp_path / "templates.txt"
    templates.write_text("a photo of a {}\n")
    command = ["zeroshot", str(model), str(data), "--templates", str(templates)]
    assert main(command) == 0
    assert "zeroshot" in printed(capsys)[0]
    assert main([*command, "--out", "-"]) == 0
    assert json.loads(printed(capsys)[0])["dataset"]
    (data / f"0 {HOSTILE.replace('/', '')}" / "\x1b[31m.png").write_bytes(b"no picture")
    assert main(command) == 3
    assert [line[:7] for line in printed(capsys)[1].splitlines()] == ["error: ", "  cure:"]


def test_keys_and_captions_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = []
    for number in range(24):
        key = f"{number:03d}{HOSTILE.replace('.', '').replace('/', '')[:70]}"
        members.append((f"{key}.png", b"no picture" if number == 5 else image_bytes(number)))
        members.append((f"{key}.txt", HOSTILE.encode()))
    shard = write_tar(tmp_path / "shards" / "0.tar", members)
    config = values(shard.parent, tmp_path / "run", run__steps=4, data__max_reject_fraction=1.0)
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    assert main(["pretrain", str(tmp_path / "run.yaml")]) == 0
    printed(capsys)
    text = (tmp_path / "run" / "rejects.jsonl").read_text(encoding="utf-8")
    assert obeyed(text) == []
    rejects = [json.loads(line) for line in text.splitlines()]
    assert {reject["key"][:3] for reject in rejects} == {"005"}
    assert rejects[0]["key"][3:] == HOSTILE.replace(".", "").replace("/", "")[:70]
    again = [
        "pretrain",
        str(tmp_path / "run.yaml"),
        f"run.dir={tmp_path / 'other'}",
        "data.max_consecutive=1",
    ]
    assert main(again) == 3
    assert "005a\\u001b[2J" in printed(capsys)[1]


def test_member_and_shard_names_of_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / HOSTILE.replace("/", "")
    twice = [(f"{HOSTILE[:20]}.txt", b"x"), ("b.txt", b"x"), (f"{HOSTILE[:20]}.txt", b"x")]
    path = write_tar(folder / "0.tar", twice)
    assert main(["index", str(path)]) == 3
    lines = printed(capsys)[1].splitlines()
    assert [line[:7] for line in lines] == ["1 shard", "error: ", "  cure:"]
    write_tar(path, [(f"{HOSTILE[:20]}.txt", b"x")])
    assert main(["index", str(path)]) == 0
    assert "forged" in printed(capsys)[0]
    assert main(["index", HOSTILE, "--workers", HOSTILE]) == 2
    printed(capsys)
