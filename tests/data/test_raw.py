"""Raw data in the place of shards: made once, made again when it changes, by one of many."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from clipkit.cli import main
from clipkit.config import make_config
from clipkit.data.options import CaptionField, Source
from clipkit.data.raw import Made, Raw, Rules, cache, made_shards, raw_path
from clipkit.data.raw.cache import CACHE
from clipkit.data.raw.sharing import refuse_unknown_columns, shards_of
from clipkit.dist import World
from clipkit.train.first_look import open_sources
from clipkit.types import IMAGE, TEXT, ConfigError, DataError, Needs
from tests.data.makers import png, write_shards
from tests.data.making.makers import samples as samples_below

Rows = list[dict[str, str]]


def write_table(folder: Path, rows: int = 10, name: str = "pairs.csv", **columns: Sequence[str]) -> Path:
    """A CSV with as many images beside it; further columns as given."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    table = folder / name
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["filepath", "caption", *columns])
        for number in range(rows):
            (folder / "images" / f"{number}.png").write_bytes(png(number))
            more = [values[number] for values in columns.values()]
            writer.writerow([f"images/{number}.png", f"picture number {number}", *more])
    return table


def make(path: Path, *captions: str, notes: list[str] | None = None, **rules: Any) -> Made:
    raw = Raw(path, captions=captions or ("txt",))
    return made_shards(raw, Rules(**rules), (notes if notes is not None else []).append, lambda *_: None)


def samples(made: Made) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> bytes, by tarfile."""
    return samples_below(made.folder)


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}


def test_shards_hold_the_pairs_of_the_table_and_are_made_once(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    notes: list[str] = []
    first = make(table, notes=notes)
    assert first.folder.parent == tmp_path / CACHE
    found = list(samples(first).values())
    assert [sample["png"] for sample in found] == [png(number) for number in range(10)]
    assert [sample["txt"].decode() for sample in found] == [f"picture number {n}" for n in range(10)]
    before = stamps(first.folder)
    assert len(notes) == 1
    assert make(table, notes=notes) == first
    assert (len(notes), stamps(first.folder)) == (1, before)


def test_columns_named_as_captions_are_kept_apart_and_the_others_as_fields(tmp_path: Path) -> None:
    titles, colours = [f"title {n}" for n in range(10)], ["red", "blue"] * 5
    table = write_table(tmp_path, title=titles, colour=colours)
    assert make(table, "title").fields == ("txt",)
    assert [s["txt"].decode() for s in samples(make(table, "title")).values()] == titles
    both = make(table, "txt", "title")
    assert both.fields == ("json.caption", "json.title")
    for number, sample in enumerate(samples(both).values()):
        fields = json.loads(sample["json"])
        assert (fields["caption"], fields["title"]) == (f"picture number {number}", titles[number])
        assert fields["colour"] == colours[number]
    source = Source(str(table), (CaptionField("txt"), CaptionField("title", weight=3.0)))
    resolved = shards_of(source, Rules(), World(), print, lambda *_: None)
    assert [(c.field, c.weight) for c in resolved.captions] == [("json.caption", 1.0), ("json.title", 3.0)]
    assert (resolved.shards, resolved.content) == (str(both.folder), both.content)


def test_a_folder_of_pairs_lists_all_captions_of_an_image(tmp_path: Path) -> None:
    (tmp_path / "deep er").mkdir()
    for number, name in enumerate(["a", "deep er/b"]):
        (tmp_path / f"{name}.png").write_bytes(png(number))
        (tmp_path / f"{name}.txt").write_text(f"first of {name}\n\nsecond of {name}\n")
    made = make(tmp_path)
    assert made.fields == ("json.captions",)
    listed = [json.loads(sample["json"])["captions"] for sample in samples(made).values()]
    assert listed == [[f"first of {name}", f"second of {name}"] for name in ("a", "deep er/b")]
    # Its own cache lies in the folder and is no data.
    assert make(tmp_path) == made


@pytest.mark.parametrize("captions", [(), ("title",), ("title", "caption"), ("pairs",)])
def test_make_shards_gives_the_same_members(tmp_path: Path, captions: tuple[str, ...]) -> None:
    """Of a table with its only caption column, another one, two; and of a folder of pairs."""
    if captions == ("pairs",):
        captions, data = (), tmp_path / "pairs"
        (data / "deep").mkdir(parents=True)
        for number, name in enumerate(["a", "deep/b", "c"]):
            (data / f"{name}.png").write_bytes(png(number))
            (data / f"{name}.txt").write_text("one\n" * (number + 1))
    else:
        titles, colours = [f"title {n}" for n in range(10)], ["red", "blue"] * 5
        data = write_table(tmp_path / "data", title=titles, colour=colours)
    cached = make(data, *captions)
    options = [word for name in captions for word in ("--caption-key", name)]
    out = tmp_path / "out"
    assert main(["data", "make-shards", str(data), "--out", str(out), *options]) == 0
    assert [path.read_bytes() for path in sorted(out.glob("*.tar"))] == [
        path.read_bytes() for path in sorted(cached.folder.glob("*.tar"))
    ]
    if data.suffix == ".csv":
        only = {*(captions or ("caption",))} if len(captions) < 2 else set()
        fields = json.loads(samples(cached)["000000000"]["json"]).keys()
        assert fields == {"caption", "title", "colour", "captions"} - only


@pytest.mark.parametrize("change", ["table", "image", "new image", "columns"])
def test_changed_data_gets_new_shards(tmp_path: Path, change: str) -> None:
    table = write_table(tmp_path)
    first = make(table)
    if change == "table":
        table.write_text(table.read_text().replace("picture number 3", "picture numbex 3"))
    elif change == "image":
        (tmp_path / "images" / "3.png").write_bytes(png(77))
    elif change == "new image":
        write_table(tmp_path, rows=11)
    notes: list[str] = []
    second = make(table, *(["filepath"] if change == "columns" else []), notes=notes)
    assert str(first.folder) in notes[1]
    assert second.folder != first.folder
    assert second.content != first.content
    if change == "image":
        assert list(samples(second).values())[3]["png"] == png(77)


def test_content_is_that_of_the_bytes_wherever_and_whenever_they_are_made(tmp_path: Path) -> None:
    first = make(write_table(tmp_path / "one"))
    table = write_table(tmp_path / "two")
    for image in (tmp_path / "two" / "images").iterdir():
        os.utime(image, (1, 1))
    second = make(table, cache=tmp_path / "elsewhere", workers=2)
    assert second.folder.parent == tmp_path / "elsewhere"
    assert second.folder.name != first.folder.name
    assert second.content == first.content


def test_a_lost_or_cut_shard_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_SAMPLES_PER_SHARD", 4)
    table = write_table(tmp_path)
    first = make(table)
    shards = sorted(first.folder.glob("*.tar"))
    whole = [shard.read_bytes() for shard in shards]
    assert len(shards) == 3
    shards[0].unlink()
    shards[1].write_bytes(whole[1][:-1])
    assert make(table) == first
    assert [shard.read_bytes() for shard in shards] == whole


def test_rejects_are_listed_and_limited_anew_in_every_run(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    (tmp_path / "images" / "2.png").write_bytes(b"no image at all")
    with pytest.raises(DataError, match="1 of the first 10 rows are unusable") as refused:
        make(table)
    assert "data.max_reject_fraction" in refused.value.cure
    assert "--" not in refused.value.cure
    for _ in range(2):
        notes: list[str] = []
        made = make(table, notes=notes, max_reject_fraction=0.1)
        assert notes[-1].endswith(f"1 of 10 entries left out (see {made.folder / 'rejects.jsonl'})")
    assert (made.samples, made.rejected) == (9, 1)
    (line,) = (made.folder / "rejects.jsonl").read_text().splitlines()
    # The third row below the names of the columns.
    assert (json.loads(line)["row"], json.loads(line)["image"]) == (3, "images/2.png")
    with pytest.raises(DataError, match=r"1 of 10 entries are unusable \(see .*rejects.jsonl\)"):
        make(table)


def test_a_killed_making_continues_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_SAMPLES_PER_SHARD", 2)
    whole = make(write_table(tmp_path / "whole", rows=30))
    table = write_table(tmp_path / "killed", rows=30)
    pid = os.fork()
    if pid == 0:
        try:
            # Killed by its own progress, after the fifth shard.
            made_shards(
                Raw(table), Rules(), lambda _: None, lambda _, done, __: done < 10 or os.kill(os.getpid(), 9)
            )
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    (folder,) = (table.parent / CACHE).iterdir()
    before = stamps(folder)
    assert len(before) >= 4
    made = make(table)
    assert made.content == whole.content
    assert samples(made) == samples(whole)
    kept = {name: stamp for name, stamp in stamps(folder).items() if name in before}
    assert sum(kept[name] == before[name] for name in kept) >= 4


def test_of_many_that_start_at_once_one_makes_and_all_get_the_same(tmp_path: Path) -> None:
    table = write_table(tmp_path, rows=40)
    begin = time.time() + 0.3
    children = []
    for number in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                notes: list[str] = []
                time.sleep(max(0.0, begin - time.time()))
                made = make(table, notes=notes)
                (tmp_path / f"out-{number}").write_text(json.dumps([str(made.folder), made.content, notes]))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    outcomes = [json.loads((tmp_path / f"out-{number}").read_text()) for number in range(4)]
    assert len({(folder, content) for folder, content, _ in outcomes}) == 1
    assert sum(note.startswith("making shards") for _, _, notes in outcomes for note in notes) == 1


def test_data_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path)

    def change(*_: Any) -> None:
        with table.open("a") as stream:
            stream.write("images/0.png,one more\n")

    with pytest.raises(DataError, match="it changed while its shards were made"):
        made_shards(Raw(table), Rules(), lambda _: None, change)
    assert make(table).samples == 11


def test_a_waiting_process_gives_up_when_nothing_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where locks do not reach, and another machine is believed to live."""
    from clipkit import lock

    monkeypatch.setattr(lock, "_record_lock", lambda _: None)
    monkeypatch.setattr(cache, "_STALLED_S", 0.2)
    monkeypatch.setattr(cache, "_POLL_S", 0.05)
    table = write_table(tmp_path)
    made = make(table)
    (made.folder / cache.RECORD).unlink()
    (made.folder / cache.LOCK).write_text('{"host": "elsewhere", "pid": 1, "start": "0"}')
    with pytest.raises(ConfigError, match="process 1 on elsewhere is making"):
        make(table)


def test_a_folder_that_cannot_be_written_to_sends_the_shards_to_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    table = write_table(tmp_path / "data")
    (tmp_path / "data" / CACHE).write_text("a file in the way, as a folder without permission is")
    made = make(table)
    assert made.folder.parent == tmp_path / "home" / "clipkit" / "shards"
    with pytest.raises(ConfigError, match="cannot be written to") as refused:
        make(table, cache=tmp_path / "data" / "pairs.csv" / "below")
    assert "data.cache" in refused.value.cure


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_table(tmp_path)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match="the shards need about") as refused:
        make(table)
    assert "data.cache" in refused.value.cure
    assert not list(tmp_path.rglob("*.tar"))


def test_what_counts_as_raw(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    made = make(table)
    assert raw_path(str(table)) == table
    assert raw_path([str(table)]) == table
    assert raw_path(str(tmp_path / "absent.parquet")) == tmp_path / "absent.parquet"
    assert raw_path(str(tmp_path)) == tmp_path
    for shards in (
        str(made.folder),
        str(made.folder / "00000.tar"),
        "s3://bucket/{0..9}.tar",
        "no/such/folder",
    ):
        assert raw_path(shards) is None, shards
    with pytest.raises(ConfigError, match="on another machine"):
        raw_path("s3://bucket/pairs.csv")
    with pytest.raises(ConfigError, match="in a list of shards"):
        raw_path(["0.tar", "pairs.csv"])
    with pytest.raises(ConfigError, match="image_root or image_key beside shards"):
        shards_of(Source(str(made.folder), image_root="x"), Rules(), World(), print, lambda *_: None)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("", r"empty \(0 bytes\)"),
        ("filepath,caption\n", "no rows"),
        ("file_of_image,words\na,b\n", "no column of images"),
        ("filepath,caption\nimages/0.png\n", "line 2 does not have the columns"),
        ("filepath,caption\nimages/0.png,\n", "1 empty caption"),
        ("filepath,caption\n../../secret.png,x\n", "outside the image folder"),
        ("filepath,caption\n-rf \x07.png,x\n", "missing image"),
    ],
)
def test_tables_that_cannot_be_used_are_refused_in_words(tmp_path: Path, content: str, cause: str) -> None:
    table = write_table(tmp_path, rows=1, name="my -pairs.csv")
    table.write_text(content)
    with pytest.raises((ConfigError, DataError), match=cause) as refused:
        make(table)
    assert "--" not in refused.value.cure, refused.value.cure
    assert not list((tmp_path / CACHE).glob("*")), "nothing is left of a set that was refused"


def test_fields_of_shards_are_known_before_raw_data_is_made_into_shards(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [4])
    config = make_config(
        {
            "model": {"name": "ViT-B-32"},
            "objectives": [{"name": "clip"}],
            "data": {
                "train": [
                    {"shards": str(write_table(tmp_path / "raw"))},
                    {"shards": str(shards), "captions": ["json.more"]},
                ],
                "batch_size": 4,
            },
            "run": {"epochs": 1},
        }
    )
    needs = Needs(views=(IMAGE, TEXT))
    with pytest.raises(ConfigError, match=r"data\.train\.1\.captions reads json\.more"):
        open_sources(config, needs, World())
    assert not (tmp_path / "raw" / ".clipkit-cache").exists()


def test_columns_of_every_source_are_known_before_any_shards_are_made(tmp_path: Path) -> None:
    good, bad = write_table(tmp_path / "good"), write_table(tmp_path / "bad")
    config = make_config(
        {
            "model": {"name": "ViT-B-32"},
            "objectives": [{"name": "clip"}],
            "data": {
                "train": [{"shards": str(good)}, {"shards": str(bad), "captions": ["titel"]}],
                "batch_size": 4,
            },
            "run": {"epochs": 1},
        }
    )
    with pytest.raises(DataError, match=r"bad/pairs\.csv: no column 'titel'"):
        open_sources(config, Needs(), World())
    assert not list(tmp_path.rglob("*.tar"))


def test_lines_of_raw_data_are_refused(tmp_path: Path) -> None:
    """Their captions have single blanks: every line would be the whole."""
    source = Source(str(write_table(tmp_path)), (CaptionField("caption", lines=True),))
    for use in (
        lambda: shards_of(source, Rules(), World(), print, lambda *_: None),
        lambda: refuse_unknown_columns([source], World()),
    ):
        with pytest.raises(ConfigError, match="lines: true") as refused:
            use()
        assert "leave `lines` out" in refused.value.cure
    assert not list(tmp_path.rglob("*.tar"))


def test_captions_that_are_no_columns_are_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    with pytest.raises(DataError, match="no column 'titel'"):
        make(table, "titel")
    with pytest.raises(ConfigError, match="two caption fields mean one column"):
        make(table, "txt", "caption")
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "a.png").write_bytes(png(0))
    (tmp_path / "pairs" / "a.txt").write_text("a caption")
    with pytest.raises(ConfigError, match="a folder of pairs has no columns"):
        make(tmp_path / "pairs", "title")
    with pytest.raises(ConfigError, match="no such table or folder"):
        make(tmp_path / "absent.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no table, and no \.tar file either"):
        make(tmp_path / "empty")


def ranks_make(rank: int, world: int, table: str) -> tuple[str, str]:
    try:
        source = shards_of(Source(table), Rules(), World.current(), print, lambda *_: None)
    except ConfigError as error:
        return "refused", error.cause
    assert isinstance(source.shards, str)
    return source.shards, source.content


def test_ranks_get_one_set_and_the_error_of_the_main_rank(tmp_path: Path, run_ranks: Any) -> None:
    table = write_table(tmp_path)
    found = run_ranks(3, ranks_make, str(table))
    assert len(set(found)) == 1
    assert len(list((tmp_path / CACHE).iterdir())) == 1
    assert found[0][0] == str(make(table).folder)
    ((kind, cause),) = set(run_ranks(2, ranks_make, str(tmp_path / "absent.csv")))
    assert kind == "refused"
    assert "absent.csv: no such table or folder" in cause
