"""A run writes standard JSON lines, says what people watch, and never a secret."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

from clipkit.log import RunLog, encode_record

RECORD = {
    "step": 20,
    "samples": 5120,
    "loss": 1.5,
    "loss/clip": 1.0,
    "loss/siglip": 0.5,
    "lr": 1e-3,
    "logit_scale": 14.29,
    "grad_norm": 0.8,
    "accuracy": 0.125,
    "samples_per_second": 412.3,
    "data_wait": 0.031,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(folder: Path) -> list[dict[str, object]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not standard JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_every_record_is_one_line_that_is_there_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=100, stream=io.StringIO()) as log:
        log.step(RECORD, show=False)
        assert lines(tmp_path) == [RECORD]
        log.append({"event": "note", "text": "zwölf\nlines"})
        assert lines(tmp_path)[1] == {"event": "note", "text": "zwölf\nlines"}
    with RunLog(tmp_path, total_steps=100, stream=io.StringIO()) as log:
        log.append({"step": 21})
    assert len(lines(tmp_path)) == 3, "a continued run appends"


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    line = encode_record({"path": "caf\udce9"})
    line.encode("utf-8")
    assert json.loads(line) == {"path": "caf\udce9"}


def test_numbers_that_json_cannot_hold_become_null_and_keep_their_name(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=1, stream=io.StringIO()) as log:
        log.append({"step": 1, "loss": math.nan, "terms": {"clip": -math.inf, "list": [1.0, math.inf]}})
    (found,) = lines(tmp_path)
    assert found == {
        "step": 1,
        "loss": None,
        "terms": {"clip": None, "list": [1.0, None]},
        "non_finite": {"loss": "nan", "terms.clip": "-inf", "terms.list.1": "inf"},
    }


def test_a_file_gets_one_plain_line_per_interval(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path, total_steps=100, stream=stream) as log:
        log.step({**RECORD, "step": 10}, show=False)
        log.step(RECORD)
        log.note("checkpoint written")
        log.evaluation(20, {"val": {"acc1": 0.5, "samples": 113, "absent": None}})
    shown = stream.getvalue().splitlines()
    assert len(shown) == 3
    for part in (
        "step 20/100",
        "5,120 samples",
        "loss 1.5",
        "clip 1",
        "siglip 0.5",
        "lr 1.00e-03",
        "scale 14.29",
    ):
        assert part in shown[0]
    for part in ("grad 0.8", "acc 12.5%", "412 samples/s", "wait 3%"):
        assert part in shown[0]
    assert re.search(r"eta \d+:\d\d$", shown[0])
    assert "\x1b" not in stream.getvalue()
    assert shown[1] == "checkpoint written"
    assert shown[2] == "step 20  val: acc1 0.5000  samples 113"
    assert lines(tmp_path)[2] == {
        "event": "evaluation",
        "step": 20,
        "results": {"val": {"acc1": 0.5, "samples": 113, "absent": None}},
    }


def test_a_terminal_gets_a_bar_and_notes_above_it(tmp_path: Path) -> None:
    stream = Terminal()
    with RunLog(tmp_path, total_steps=100, start_step=10, stream=stream) as log:
        log.step(RECORD)
        log.note("kept: [bold]as written[/bold]")
    assert "20/100" in stream.getvalue()
    assert "loss 1.5" in stream.getvalue()
    assert "kept: [bold]as written[/bold]\n" in stream.getvalue()
    assert len(lines(tmp_path)) == 1


def test_other_ranks_write_and_say_nothing(tmp_path: Path) -> None:
    stream = Terminal()
    with RunLog(tmp_path, total_steps=100, is_main=False, stream=stream) as log:
        log.step(RECORD)
        log.note("a")
        log.evaluation(1, {"val": {"acc1": 0.5}})
    assert stream.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_logging_loads_neither_torch_nor_rich() -> None:
    code = "import sys, clipkit.log; print(sorted({'torch', 'rich'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
