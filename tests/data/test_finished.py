"""One rule for every job that writes an output: the same command again, another one, damage."""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path

import pytest

from clipkit.cli.app import main
from clipkit.data.finished import FOLDER, Finished, differences, storing
from clipkit.types import ClipkitError, ConfigError
from tests.data.curation.test_commands import sample
from tests.data.makers import write_tar
from tests.data.making.makers import table

# A command, what is added for another one, and how a refusal calls the difference.
JOBS = {
    "make-shards": (["make-shards", "IN/pairs.csv", "--out", "OUT", "--samples-per-shard", "7"],
                    ["--resize", "2"], "--resize unset -> 2"),
    "evaluation": (["make-shards", "IN/pairs.csv", "--out", "OUT", "--to", "evaluation"],
                   ["--samples-per-shard", "8"], "--samples-per-shard 10000 -> 8"),
    "reshard": (["reshard", "IN", "--out", "OUT", "--samples-per-shard", "7"],
                ["--shuffle-seed", "3"], "--shuffle-seed 0 -> 3"),
    "split": (["reshard", "IN", "--out", "OUT", "--split", "0.5/0.5"],
              ["--rekey"], "--rekey false -> true"),
    "filter": (["filter", "IN", "--out", "OUT", "--min-words", "3"],
               ["--min-words", "2"], "--min-words 3 -> 2"),
    "filter-keys": (["filter", "IN", "--keys-out", "OUT.csv", "--min-words", "3"],
                    ["--max-aspect", "2"], "--max-aspect unset -> 2.0"),
    "dedup": (["dedup", "IN", "--out", "OUT", "--by", "caption"],
              ["--by", "image"], '--by ["caption"] -> ["caption", "image"]'),
    "against": (["dedup", "IN", "--out", "OUT", "--by", "caption", "--against", "IN/../other/0.tar"],
                ["--by", "phash"], '--by ["caption"] -> ["caption", "phash"]'),
    "hard-captions": (["hard-captions", "IN", "--out", "OUT"],
                      ["--num", "1"], "--num 2 -> 1"),
    "repair": (["check-shards", "IN", "--repair", "OUT"],
               ["--max-pixels", "99999"], "--max-pixels 64000000 -> 99999"),
}  # fmt: skip


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file, hidden ones too."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def keys_in(paths: list[Path]) -> int:
    found = 0
    for path in paths:
        with tarfile.open(path) as archive:
            found += len({member.name.partition(".")[0] for member in archive})
    return found


@pytest.mark.parametrize("name", JOBS)
def test_an_ended_job_is_left_alone_or_refused_with_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arguments, more, difference = JOBS[name]
    inputs, out = tmp_path / "in", tmp_path / "out" / "o"
    inputs.mkdir()
    out.parent.mkdir()
    if "pairs.csv" in arguments[1]:
        changed = table(inputs, 20)
    else:
        changed = inputs / "000.tar"
        for shard in range(3):
            write_tar(inputs / f"{shard:03d}.tar", [sample(11 * shard + n) for n in range(11)])
    (tmp_path / "other").mkdir()
    write_tar(tmp_path / "other" / "0.tar", [sample(500)])
    command = ["data", *(each.replace("IN", str(inputs)).replace("OUT", str(out)) for each in arguments)]
    command += ["--workers", "1"]
    assert main(command) == 0
    before = state(tmp_path)
    shards = sorted(out.rglob("*.tar"))

    capsys.readouterr()
    assert main(command) == 0
    said = re.findall(r"nothing to do: .*\((?:(\d+) shards, )?(\d+) samples\)", capsys.readouterr().out)
    if shards:
        assert said == [(str(len(shards)), str(keys_in(shards)))]
    else:
        listed = len((tmp_path / "out" / "o.csv").read_text().splitlines()) - 1
        assert said == [("", str(listed))]
    assert state(tmp_path) == before

    assert main([*command, *more]) == 2
    said_of_other = capsys.readouterr().err
    assert difference in said_of_other
    assert len(said_of_other.splitlines()) == 2
    assert state(tmp_path) == before

    (shards[-1] if shards else tmp_path / "out" / "o.csv.summary.json").unlink()
    assert main(command) == 0
    # The index of a set tells its age.
    now, then = (
        {path: content for path, (content, _) in found.items() if ".clipkit-index" not in path}
        for found in (state(tmp_path), before)
    )
    assert now == then
    texts = [
        path for path in out.parent.rglob("[!.]*.*") if path.suffix != ".tar" and FOLDER not in path.parts
    ]
    lost = shards[-1] if name in ("make-shards", "reshard", "split", "hard-captions") else min(texts)
    lost.unlink()
    lost.write_bytes(b"of someone else")
    before = state(tmp_path)
    capsys.readouterr()
    assert main(command) == 2
    assert f"{lost} is not what this command wrote" in capsys.readouterr().err
    assert state(tmp_path) == before

    if changed.suffix == ".csv":
        changed.write_text(changed.read_text(encoding="utf-8").rstrip() + " and more\n", encoding="utf-8")
    else:
        os.utime(changed, ns=(1, 1))
    before = state(tmp_path)
    capsys.readouterr()
    assert main(command) == 2
    assert f"{changed.name} changed" in capsys.readouterr().err
    assert state(tmp_path) == before


def test_inputs_that_changed_after_a_kill_are_named(tmp_path: Path) -> None:
    job = {"job": "j", "options": {"seed": 1}, "inputs": [["a.tar", 5, 1], ["b.tar", 5, 1]]}
    killed = Finished(tmp_path, job)
    assert killed.begin([]) is None
    (tmp_path / "0.tar").write_bytes(b"finished")
    assert Finished(tmp_path, job).begin([tmp_path / "0.tar"]) is None
    other = {**job, "inputs": [["a.tar", 5, 1], ["b.tar", 6, 2]]}
    with pytest.raises(ConfigError, match=r"already holds shards, made otherwise: b\.tar changed\n") as found:
        Finished(tmp_path, other).begin([tmp_path / "0.tar"])
    assert "--overwrite" in found.value.cure
    assert killed.begun
    assert Finished(tmp_path, other).begin([tmp_path / "0.tar"], overwrite=True) is None
    assert not killed.begun


def test_a_kill_between_the_last_two_steps_is_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipkit.data import finished

    job = Finished(tmp_path, {"job": "j"})
    job.begin([])
    (tmp_path / "0.tar").write_bytes(b"finished")
    with monkeypatch.context() as patch:
        patch.setattr(finished.shutil, "rmtree", lambda *_, **__: None)
        job.end([tmp_path / "0.tar"], 3)
    assert job.begun
    ended = job.begin([tmp_path / "0.tar"])
    assert ended is not None
    assert (ended.shards, ended.samples) == (1, 3)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["done.json"]
    # What is made once more is not taken for what has ended.
    assert job.begin([tmp_path / "0.tar"], overwrite=True) is None
    assert job.begin([tmp_path / "0.tar"]) is None


@pytest.mark.parametrize("lost", [True, False])
def test_a_machine_that_comes_late_leaves_the_records_of_the_one_that_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    from clipkit.data import finished

    first, second = (Finished(tmp_path, {"job": "j"}) for _ in range(2))
    first.begin([])
    (tmp_path / "0.tar").write_bytes(b"finished")
    first.end([tmp_path / "0.tar"], 3)
    if lost:
        (tmp_path / "0.tar").unlink()

    def meanwhile(*_: object) -> bool:
        monkeypatch.undo()
        assert first.begin([], overwrite=not lost) is None
        first.put("0", {"samples": 3})
        return not lost

    monkeypatch.setattr(finished, "is_whole", meanwhile)
    assert (second.begin([]) is None) == lost
    assert first.get("0") == {"samples": 3}


def test_a_path_that_is_written_otherwise_is_the_same_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys, job = tmp_path / "keys.csv", Finished(Path("out"), {"job": "j"})
    job.begin([])
    for path in (keys, Path("out/0.tar")):
        path.write_bytes(b"finished")
    job.end([keys, Path("out/0.tar")], 3)
    Path("out/0.tar").unlink()
    assert job.begin([keys]) is None


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"job": "other"}, "by j, and not by other"),
        ({"options": {"seed": 1, "by": ["a"]}}, '--seed unset -> 1; --by unset -> ["a"]'),
        ({"inputs": [["b", 1], ["a", 1]]}, "the inputs in another order"),
        ({"inputs": [["a", 2], ["c", 1]]}, "a changed; c was not read then; b was read then"),
        ({"options": {str(n): n for n in range(7)}}, "--0 unset -> 0; --1 unset -> 1; --2 unset -> 2; "
         "--3 unset -> 3; --4 unset -> 4; and 2 more"),
    ],
)  # fmt: skip
def test_differences_are_said_in_the_words_of_the_command(now: dict[str, object], said: str) -> None:
    before = {"job": "j", "options": {}, "inputs": [["a", 1], ["b", 1]]}
    assert differences(before, {**before, **now}) == said


def test_a_file_that_another_command_removed_is_no_fault_of_the_storage(tmp_path: Path) -> None:
    lost = tmp_path / "record"
    with pytest.raises(ClipkitError) as found, storing(tmp_path):
        lost.read_bytes()
    assert f"{lost} vanished" in str(found.value)
    assert "make room" not in found.value.cure
