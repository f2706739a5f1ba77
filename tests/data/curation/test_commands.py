"""clipkit data filter, dedup and hard-captions as commands: what they keep, write, say and refuse."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipkit.cli.app import main
from clipkit.data import hard_captions
from clipkit.data.curation import duplicates, selection
from clipkit.data.finished import FOLDER
from clipkit.types import DataError
from tests.commands import fails, misused
from tests.data.curation.test_rules import datacomp_threshold, published_matches
from tests.data.makers import Members, encoded, png, write_tar
from tests.data.servers import serving

CAPTIONS = (
    "a small dog",
    "dog",
    "a big red dog here",
    "a cat on a mat",
    "the Dog",
    "a cat, a dog",
    "nothing of it",
)


def document(number: int) -> dict[str, Any]:
    score = round(float(np.random.default_rng(number).normal(0.3, 0.05)), 3)
    return {"uid": f"{number * 7919 % 65536:04x}" + "0" * 12 + f"{number:016x}", "score": score}


def sample(number: int, caption: str | None = None, image: bytes | None = None) -> Members:
    text = CAPTIONS[number % len(CAPTIONS)] if caption is None else caption
    return [
        (f"{number:06d}.json", json.dumps(document(number)).encode()),
        (f"{number:06d}.npy", bytes([number % 256]) * 9),
        (f"{number:06d}.png", png(number, 16) if image is None else image),
        (f"{number:06d}.txt", text.encode()),
    ]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Five shards of 11 samples."""
    folder = tmp_path / "pool of shards"
    folder.mkdir()
    for shard in range(5):
        write_tar(folder / f"{shard:03d}.tar", [sample(11 * shard + n) for n in range(11)])
    return folder


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for entry in archive:
                assert entry.name not in found
                found[entry.name] = archive.extractfile(entry).read()  # type: ignore[union-attr]
    return found


def keys(folder: Path) -> list[int]:
    return [int(name.split(".")[0]) for name in members(folder) if name.endswith(".txt")]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(*arguments: object) -> int:
    return main(["data", *map(str, arguments)])


def test_kept_samples_are_copied_as_they_are_whatever_the_workers(pool: Path, tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 3), ("c", 2)):
        assert run("filter", pool, "--out", tmp_path / name, "--min-words", 3, "--workers", workers) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")
    wanted = [n for n in range(55) if len(CAPTIONS[n % 7].split()) >= 3]
    assert keys(tmp_path / "a") == wanted
    before = members(pool)
    assert members(tmp_path / "a") == {name: before[name] for name in before if int(name[:6]) in wanted}
    assert sum(json.loads((tmp_path / "a" / "sizes.json").read_text()).values()) == len(wanted)
    dropped = lines(tmp_path / "a" / "dropped.jsonl")
    assert [int(line["key"]) for line in dropped] == [n for n in range(55) if n not in wanted]
    assert all(line["rules"] == ["words"] for line in dropped)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert (summary["samples"], summary["kept"]) == (55, len(wanted))
    assert summary["rules"]["words"] == {"removed": 55 - len(wanted), "only": 55 - len(wanted)}


def test_the_summary_says_what_each_rule_removes_and_what_cannot_be_used(pool: Path, tmp_path: Path) -> None:
    write_tar(pool / "005.tar", [sample(55, image=b"no image"), sample(56), sample(57, "a")])
    rules = ("--min-words", 3, "--min-chars", 8, "--min-side", 1)
    assert run("filter", pool, "--out", tmp_path / "out", *rules) == 0
    texts = {**{n: CAPTIONS[n % 7] for n in range(57)}, 57: "a"}
    broken = {n: (len(text.split()) < 3, len(text) < 8) for n, text in texts.items() if n != 55}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rules"] == {
        "words": {
            "removed": sum(words for words, _ in broken.values()),
            "only": sum(words and not short for words, short in broken.values()),
        },
        "characters": {
            "removed": sum(short for _, short in broken.values()),
            "only": sum(short and not words for words, short in broken.values()),
        },
        "shorter side": {"removed": 0, "only": 0},
        "unusable": {"removed": 1, "only": 1},
    }
    assert summary["reasons"] == {"bad image": 1}
    assert summary["kept"] == sum(not any(each) for each in broken.values()) == len(keys(tmp_path / "out"))
    (unusable,) = [line for line in lines(tmp_path / "out" / "dropped.jsonl") if "reason" in line]
    assert (unusable["key"], unusable["rules"], unusable["reason"]) == ("000055", ["unusable"], "bad image")


def test_shards_without_a_kept_sample_leave_no_hole(pool: Path, tmp_path: Path) -> None:
    write_tar(pool / "002.tar", [sample(22 + n, "short") for n in range(11)])
    assert run("filter", pool, "--out", tmp_path / "out", "--min-words", 3) == 0
    assert [path.name for path in sorted((tmp_path / "out").glob("*.tar"))] == [
        f"0000{n}.tar" for n in range(4)
    ]


def test_a_dry_run_writes_nothing(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(tmp_path)
    assert run("filter", pool, "--out", tmp_path / "out", "--min-words", 3, "--dry-run") == 0
    assert run("dedup", pool, "--keys-out", tmp_path / "k.csv", "--by", "phash", "--dry-run") == 0
    assert run("hard-captions", pool, "--out", tmp_path / "out", "--dry-run") == 0
    assert files(tmp_path) == before
    assert "55 samples stay" in capsys.readouterr().out


def test_parts_of_several_machines_make_the_whole(pool: Path, tmp_path: Path) -> None:
    rules = ("--min-words", 3, "--clip-score", "json.score", "--top", 0.5)
    assert run("filter", pool, "--out", tmp_path / "whole", *rules) == 0
    for start, end in ((3, 5), (0, 2), (2, 3)):
        assert run("filter", pool, "--out", tmp_path / "parts", *rules, "--start", start, "--end", end) == 0
        assert not list((tmp_path / "parts").glob("*.tar"))
    assert run("filter", pool, "--out", tmp_path / "parts", *rules) == 0
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    for name, parts in (("h", [()]), ("i", [("--start", 2), ("--end", 2), ()])):
        for part in parts:
            assert run("hard-captions", pool, "--out", tmp_path / name, *part) == 0
    assert files(tmp_path / "h") == files(tmp_path / "i")


def test_an_interrupted_job_goes_on_where_it_was(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("filter", pool, "--min-words", 3, "--out")
    assert run(*arguments, tmp_path / "whole") == 0
    copied = []

    def copy(path: Path, *rest: Any) -> Any:
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(path.name)
        return whole(path, *rest)

    whole = selection.copy_shard
    monkeypatch.setattr(selection, "copy_shard", copy)
    assert run(*arguments, tmp_path / "out") == 130
    monkeypatch.setattr(selection, "copy_shard", lambda *given: copied.append(given[0].name) or whole(*given))
    assert run(*arguments, tmp_path / "out") == 0
    assert copied == [f"0000{n}.tar" for n in range(5)]
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert run(*arguments, tmp_path / "out", "--overwrite") == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize(("option", "value"), [("--min", 0.31), ("--top", 0.3), ("--top", 1)])
def test_scores_of_a_field_decide_by_the_published_rule(
    pool: Path, tmp_path: Path, option: str, value: float
) -> None:
    scores = [document(n)["score"] for n in range(55)]
    least = value if option == "--min" else -9.0 if value == 1 else datacomp_threshold(scores, value)
    wanted = [n for n in range(55) if scores[n] >= least]
    by_field = ("--clip-score", "json.score", option, value)
    assert run("filter", pool, "--out", tmp_path / "a", *by_field, "--scores-out", tmp_path / "s.csv") == 0
    assert keys(tmp_path / "a") == wanted
    with (tmp_path / "s.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["score"]) for row in rows] == scores
    assert [int(row["key"]) for row in rows] == list(range(55))
    by_table = ("--clip-score", tmp_path / "s.csv", option, value)
    assert run("filter", pool, "--out", tmp_path / "b", *by_table) == 0
    assert keys(tmp_path / "b") == wanted


def test_scores_of_another_job_are_not_replaced(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = tmp_path / "s.csv"
    scores.write_text("of hours of work")
    by_field = ("--clip-score", "json.score", "--min", 0.3, "--scores-out", scores)
    assert run("filter", pool, "--out", tmp_path / "a", *by_field) == 2
    assert f"{scores} exists already" in capsys.readouterr().err
    assert scores.read_text() == "of hours of work"
    assert not (tmp_path / "a").exists()
    assert run("filter", pool, "--out", tmp_path / "a", *by_field, "--overwrite") == 0
    by_table = ("--clip-score", scores, "--min", 0.3, "--scores-out", scores)
    assert run("filter", pool, "--out", tmp_path / "b", *by_table, "--overwrite") == 2
    assert "is read by this job" in capsys.readouterr().err
    keys = ("--keys-out", tmp_path / "k.csv", "--scores-out", tmp_path / "k.csv")
    assert run("filter", pool, "--clip-score", "json.score", "--min", 0.3, *keys) == 2
    assert "both name" in capsys.readouterr().err
    assert not (tmp_path / "k.csv").exists()


def test_tables_are_parquet_where_the_name_says_so(pool: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    scores, kept = tmp_path / "scores.parquet", tmp_path / "kept.parquet"
    by_field = ("--clip-score", "json.score", "--scores-out", scores)
    assert run("filter", pool, "--keys-out", kept, *by_field, "--min-words", 3) == 0
    assert run("filter", pool, "--out", tmp_path / "b", "--clip-score", scores, "--min", 0.3) == 0
    assert keys(tmp_path / "b") == [n for n in range(55) if document(n)["score"] >= 0.3]
    table = parquet.read_table(kept).to_pylist()
    assert [int(row["key"]) for row in table] == [n for n in range(55) if len(CAPTIONS[n % 7].split()) >= 3]
    assert {row["shard"] for row in table} == {f"{n:03d}.tar" for n in range(5)}


def test_uids_are_written_as_datacomp_reads_them(pool: Path, tmp_path: Path) -> None:
    assert run("filter", pool, "--keys-out", tmp_path / "kept.npy", "--min-words", 3) == 0
    found = np.load(tmp_path / "kept.npy")
    assert found.dtype == np.dtype("u8,u8")
    uids = [document(n)["uid"] for n in range(55) if len(CAPTIONS[n % 7].split()) >= 3]
    expected = np.array(sorted((int(uid[:16], 16), int(uid[16:], 16)) for uid in uids), np.dtype("u8,u8"))
    assert (found == expected).all()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "kept.npy", "kept.npy.dropped.jsonl", "kept.npy.summary.json",
    ]  # fmt: skip
    assert (
        run("filter", pool, "--keys-out", tmp_path / "x.npy", "--min-words", 3, "--uid-field", "json.id") == 3
    )


def balanced(pool: Path, out: Path, *more: object) -> list[int]:
    assert run("filter", pool, "--out", out, "--balance", out.parent / "entries.txt", *more) == 0
    return keys(out)


def test_balancing_keeps_rare_entries_and_drops_unmatched(pool: Path, tmp_path: Path) -> None:
    names = ["dog", "cat", "mat"]
    (tmp_path / "entries.txt").write_text("\n".join(names) + "\n")
    matched = [n for n in range(55) if published_matches(CAPTIONS[n % 7], names)]
    published = ("--match", "published")
    assert balanced(pool, tmp_path / "all", *published) == matched
    everything = balanced(pool, tmp_path / "unmatched", *published, "--keep-unmatched")
    assert everything == list(range(55))
    by_words = balanced(pool, tmp_path / "words")
    assert by_words == [n for n in range(55) if CAPTIONS[n % 7] != "nothing of it"]
    # mat is rare: what names it stays; dog and cat are thinned out.
    thin = balanced(pool, tmp_path / "thin", *published, "--t", 8)
    assert {n for n in range(55) if "mat" in CAPTIONS[n % 7]} <= set(thin)
    assert len(thin) < len(matched)
    turned = sorted(pool.glob("*.tar"), reverse=True)
    more = ("--balance", tmp_path / "entries.txt", *published, "--t", 8, "--workers", 2)
    assert run("filter", *turned, "--out", tmp_path / "turned", *more) == 0
    assert sorted(keys(tmp_path / "turned")) == thin
    assert balanced(pool, tmp_path / "seed", *published, "--t", 8, "--seed", 1) != thin


def test_balancing_counts_what_the_other_rules_keep(pool: Path, tmp_path: Path) -> None:
    """One job gives the bytes of two after each other: the entries are counted in what remains."""
    (tmp_path / "entries.txt").write_text("dog\ncat\n")
    balance = ("--balance", tmp_path / "entries.txt", "--t", 9)
    assert run("filter", pool, "--out", tmp_path / "first", "--min-words", 3) == 0
    assert run("filter", tmp_path / "first", "--out", tmp_path / "second", *balance) == 0
    assert run("filter", pool, "--out", tmp_path / "both", "--min-words", 3, *balance) == 0
    assert members(tmp_path / "both") == members(tmp_path / "second")
    assert 0 < len(keys(tmp_path / "both")) < len(keys(tmp_path / "first"))


def test_samples_without_a_score_go_and_count_in_no_fraction(tmp_path: Path) -> None:
    """Odd keys, a shard without samples and one of a single sample; scores by field and by both tables."""
    folder = tmp_path / "set"
    folder.mkdir()
    scores = {"a,b": 0.5, 'q"': 0.25, "ä 犬": 0.125, "line\nbreak": None, "last": 0.75}
    samples = [
        [
            (f"{key}.json", b"{}" if score is None else json.dumps({"score": score}).encode()),
            (f"{key}.png", png(1)),
            (f"{key}.txt", b"x"),
        ]
        for key, score in scores.items()
    ]
    for number, part in enumerate((samples[:4], [], samples[4:])):
        write_tar(folder / f"{number}.tar", part)
    # int(4 * 0.5) = 2: the third highest of four scores is the threshold.
    wanted = {key for key, score in scores.items() if score is not None and score >= 0.25}
    given = "json.score"
    for name in ("field", "s.csv", "s.parquet"):
        if name.endswith(".parquet"):
            pytest.importorskip("pyarrow")
        out = tmp_path / f"by {name}"
        next_table = tmp_path / {"field": "s.csv", "s.csv": "s.parquet", "s.parquet": "last.csv"}[name]
        scored = ("--clip-score", given, "--top", 0.5)
        assert run("filter", folder, "--out", out, *scored, "--scores-out", next_table) == 0
        assert {key.rpartition(".")[0] for key in members(out)} == wanted
        (dropped,) = [line for line in lines(out / "dropped.jsonl") if "score" not in line]
        assert (dropped["key"], dropped["rules"]) == ("line\nbreak", ["score"])
        assert len(list(out.glob("*.tar"))) == 2
        given = str(next_table)


def photo(number: int) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Two shards: 8 is a copy of 0, 9 has the caption of 1, 10 is a copy of pair 2, 11 a JPEG of 3."""
    folder = tmp_path / "planted"
    folder.mkdir()
    images = {n: encoded(photo(n), "PNG") for n in range(12)} | {8: encoded(photo(0), "PNG")}
    images |= {10: images[2], 11: encoded(photo(3).resize((70, 60)), "JPEG", quality=60)}
    texts = {n: f"caption {n}" for n in range(12)} | {9: "caption  1", 10: "caption 2"}
    for shard in range(2):
        numbers = range(6 * shard, 6 * shard + 6)
        write_tar(folder / f"{shard}.tar", [sample(n, texts[n], images[n]) for n in numbers])
    return folder


@pytest.mark.parametrize(
    ("kinds", "duplicates"),
    [
        (["image"], {8: 0, 10: 2}),
        (["caption"], {9: 1, 10: 2}),
        (["pair"], {10: 2}),
        (["pixels"], {8: 0, 10: 2}),
        (["phash"], {8: 0, 10: 2, 11: 3}),
        (["image", "caption", "phash"], {8: 0, 9: 1, 10: 2, 11: 3}),
    ],
)
def test_planted_duplicates_go_and_the_first_stays(
    planted: Path, tmp_path: Path, kinds: list[str], duplicates: dict[int, int]
) -> None:
    by = [part for kind in kinds for part in ("--by", kind)]
    assert run("dedup", planted, "--out", tmp_path / "out", *by, "--workers", 2) == 0
    assert keys(tmp_path / "out") == [n for n in range(12) if n not in duplicates]
    dropped = lines(tmp_path / "out" / "dropped.jsonl")
    assert {int(line["key"]): int(line["same_as"]["key"]) for line in dropped} == duplicates
    assert all(line["same_as"]["shard"] == "0.tar" for line in dropped)


def test_bounds_of_likeness_are_those_that_are_asked_for(planted: Path, tmp_path: Path) -> None:
    for distance, expected in ((0, {8, 10}), (4, {8, 10, 11})):
        given = ("--by", "phash", "--distance", distance, "--overwrite")
        assert run("dedup", planted, "--out", tmp_path / "out", *given) == 0
        assert {*range(12)} - {*keys(tmp_path / "out")} == expected


def test_evaluation_images_are_found_and_removed(planted: Path, tmp_path: Path) -> None:
    (tmp_path / "set" / "cup").mkdir(parents=True)
    (tmp_path / "set" / "hat").mkdir()
    photo(4).resize((50, 80)).save(tmp_path / "set" / "cup" / "x.jpg", quality=70)
    photo(77).save(tmp_path / "set" / "hat" / "y.png")
    captions = tmp_path / "captions.csv"
    captions.write_text(
        "filepath,caption\nset/hat/y.png,one\nset/hat/y.png,two\nplain.png,white\nz.png,three\n"
    )
    Image.new("RGB", (30, 30), "white").save(tmp_path / "plain.png")
    photo(7).save(tmp_path / "z.png")
    against = ("--against", tmp_path / "set", "--against", captions)
    assert run("dedup", planted, "--out", tmp_path / "out", *against) == 0
    assert keys(tmp_path / "out") == [n for n in range(12) if n not in (4, 7)]
    matches = lines(tmp_path / "out" / "evaluation_matches.jsonl")
    assert [(int(line["key"]), Path(line["image"]).name) for line in matches] == [(4, "x.jpg"), (7, "z.png")]
    assert all(line["distance"] <= 4 for line in matches)
    assert run("dedup", planted, "--out", tmp_path / "both", *against, "--by", "caption") == 0
    assert keys(tmp_path / "both") == [n for n in range(12) if n not in (4, 7, 9, 10)]


def test_samples_of_other_shards_are_found_and_removed(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = tmp_path / "trained"
    trained.mkdir()
    resized = encoded(photo(4).resize((50, 80)), "JPEG", quality=70)
    write_tar(trained / "0.tar", [sample(100, "x", resized), sample(101, "y", encoded(photo(77), "PNG"))])
    write_tar(
        trained / "1.tar", [sample(102, "z", b"no picture"), sample(103, "z", encoded(photo(7), "PNG"))]
    )
    (tmp_path / "set" / "cup").mkdir(parents=True)
    photo(5).save(tmp_path / "set" / "cup" / "x.png")
    against = ("--against", trained, "--against", tmp_path / "set")
    assert run("dedup", planted, "--out", tmp_path / "out", *against, "--workers", 2) == 0
    assert "1 samples of --against cannot be decoded" in capsys.readouterr().out
    assert keys(tmp_path / "out") == [n for n in range(12) if n not in (4, 5, 7)]
    matches = lines(tmp_path / "out" / "evaluation_matches.jsonl")
    names = {int(line["key"]): line["image"].rpartition("/set/")[2] for line in matches}
    assert names == {4: "0.tar/000100", 5: "cup/x.png", 7: "1.tar/000103"}
    monkeypatch.setattr(duplicates, "_TOGETHER", 1)  # shard by shard
    assert run("dedup", planted, "--out", tmp_path / "again", *against) == 0
    assert lines(tmp_path / "again" / "evaluation_matches.jsonl") == matches
    some = ("--against", trained / "1.tar")
    assert run("dedup", planted, "--out", tmp_path / "some", *some) == 0
    assert keys(tmp_path / "some") == [n for n in range(12) if n != 7]
    assert run("dedup", planted, "--out", tmp_path / "self", "--against", planted) == 2
    assert "is among the shards and in --against" in capsys.readouterr().err
    assert not (tmp_path / "self").exists()


def test_embeddings_from_a_file_join_what_is_close(planted: Path, tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    vectors = np.eye(12, 16, dtype=np.float32)
    vectors[7] = 5 * vectors[5] + 0.1 * vectors[7]
    vectors[9] = 0
    np.save(tmp_path / "v.npy", vectors)
    given = ("--by", "embedding", "--embeddings", tmp_path / "v.npy")
    assert run("dedup", planted, "--keys-out", tmp_path / "k.csv", *given) == 0
    with (tmp_path / "k.csv").open(newline="") as stream:
        assert [int(row["key"]) for row in csv.DictReader(stream)] == [n for n in range(12) if n != 7]
    # Embeddings of a file are of the set alone: pictures of others are compared by phash.
    (tmp_path / "set" / "cup").mkdir(parents=True)
    photo(3).save(tmp_path / "set" / "cup" / "x.png")
    assert run("dedup", planted, "--out", tmp_path / "out", *given, "--against", tmp_path / "set") == 0
    assert keys(tmp_path / "out") == [n for n in range(12) if n not in (3, 7, 11)]
    # The cosine of 5 and 7 is 0.9998.
    assert run("dedup", planted, "--keys-out", tmp_path / "all.csv", *given, "--cosine", 0.9999) == 0
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 13
    np.save(tmp_path / "v.npy", vectors[:5])
    assert run("dedup", planted, "--keys-out", tmp_path / "k.csv", "--overwrite", *given) == 3


BY_FIELD = ["--clip-score", "json.score"]
BAD: list[tuple[list[str], int, str]] = [
    (["filter", "POOL", "--out", "OUT"], 2, "no rule"),
    (["filter", "POOL", "--min-words", "3"], 2, "no output"),
    (["filter", "nowhere/", "--out", "OUT", "--basic"], 3, "no such file"),
    (["filter", "POOL", "--out", "POOL", "--basic"], 2, "is read and would be replaced"),
    (["filter", "POOL", "--out", "OUT", "--min", "0.3"], 2, "need scores"),
    (["filter", "POOL", "--out", "OUT", *BY_FIELD, "--min", "1", "--top", "0.1"], 2, "exclude"),
    (["filter", "POOL", "--out", "OUT", *BY_FIELD, "--top", "1.5"], 2, "not within"),
    (["filter", "POOL", "--out", "OUT", "--clip-score", "json.no", "--top", "0.5"], 3, "anything at json.no"),
    (["filter", "POOL", "--out", "OUT", "--basic", "--caption", "json.text"], 3, "anything at json.text"),
    (["filter", "POOL", "--out", "OUT", "--clip-score", "json.scor", "--min", "0.1"], 3, "at json.scor"),
    (["filter", "POOL", "--out", "OUT", "--language", "en"], 3, "anything at json.language"),
    (["dedup", "POOL", "--out", "OUT", "--by", "caption", "--caption", "json.c"], 3, "55 missing caption"),
    (["filter", "POOL", "--out", "OUT", "--clip-score", "none.csv", "--top", "0.5"], 2, "none.csv"),
    (["filter", "POOL", "--out", "OUT", "--clip-score", "no/model", "--top", "0.5"], 2, "no/model"),
    (["filter", "POOL", "--out", "OUT", "--balance", "none.txt"], 2, "none.txt"),
    (["filter", "POOL", "--out", "OUT", "--min-words", "30"], 3, "none of 55 samples"),
    (["filter", "POOL", "--keys-out", "k.xlsx", "--basic"], 2, "no known format"),
    (["filter", "POOL", "--out", "OUT", "--basic", "--start", "9"], 2, "--start 9"),
    (["filter", "POOL", "--out", "OUT", *BY_FIELD, "--scores-out", "no/s.csv"], 2, "cannot be written"),
    (["filter", "pipe:cat x.tar", "--out", "OUT", "--basic"], 2, "pipe"),
    (["filter", "none.tar", "--out", "OUT", "--basic"], 3, "no sample in 1 shard"),
    (["filter", "broken.tar", "--out", "OUT", "--basic"], 3, "broken.tar"),
    (["dedup", "POOL", "--out", "OUT", "--by", "phash", "--distance", "40"], 2, "not within 0..16"),
    (["dedup", "POOL", "--out", "OUT", "--by", "embedding"], 2, "needs embeddings"),
    (["dedup", "POOL", "--out", "OUT", "--by", "embedding", "--embeddings", "none.npy"], 2, "none.npy"),
    (["dedup", "POOL", "--out", "OUT", "--against", "nowhere"], 2, "nowhere"),
    (["hard-captions", "POOL", "--out", "OUT", "--field", "a.b"], 2, "no name of an entry"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "cause"), BAD, ids=lambda value: str(value)[:60])
def test_bad_input_is_one_line_of_cause_and_one_of_cure(
    pool: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    cause: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "none.tar", [])
    (tmp_path / "broken.tar").write_bytes((pool / "000.tar").read_bytes()[:5000])
    names = {"POOL": str(pool), "OUT": str(tmp_path / "-o \u00fc\nt")}
    fails(capsys, code, cause, "data", *(names.get(argument, argument) for argument in arguments))
    assert not list(Path(names["OUT"]).glob("*.tar"))


@pytest.mark.parametrize("kept", [2, 4])
def test_a_shard_that_changes_while_it_is_copied_is_an_error(tmp_path: Path, kept: int) -> None:
    write_tar(tmp_path / "0.tar", [[(f"{n}.png", png(n)), (f"{n}.txt", b"x")] for n in range(3)])
    with pytest.raises(DataError, match=f"3 samples instead of {kept}: it changed"):
        selection.copy_shard(tmp_path / "out.tar", str(tmp_path / "0.tar"), np.ones(kept, dtype=np.bool_))
    assert not (tmp_path / "out.tar").exists()


def test_logins_of_shards_elsewhere_are_in_no_file(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_tar(tmp_path / "other" / "0.tar", [sample(500, image=encoded(photo(4), "PNG"))])
    with serving(tmp_path / "other") as server:
        address = server.url.replace("://", "://somebody:hunter22@") + "/0.tar?sig=hunter33"
        assert run("dedup", pool, "--out", tmp_path / "out", "--against", address) == 0
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert FOLDER in {path.parent.name for path in written}
    assert not [path for path in written if b"hunter" in path.read_bytes()]


def test_what_is_refused_leaves_nothing_behind(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.md").write_text("no images")
    write_tar(tmp_path / "broken.tar", [])
    (tmp_path / "broken.tar").write_bytes((pool / "000.tar").read_bytes()[:5000])
    for arguments in (
        ["dedup", pool, "--against", tmp_path / "text"],
        ["dedup", pool, "--against", tmp_path / "broken.tar"],
        ["filter", pool, "--basic", "--caption", "json.nope"],
        ["filter", tmp_path / "broken.tar", "--basic"],
        ["hard-captions", pool, "--caption", "json.nope"],
        ["reshard", pool, "--where", "json.nope > 1"],
        ["reshard", pool, "--split", "0.9/0.1", "--group", "json.nope"],
    ):
        assert run(*arguments, "--out", tmp_path / "out") in (2, 3)
        assert not (tmp_path / "out").exists(), arguments
        if arguments[0] in ("dedup", "filter"):
            assert run(*arguments, "--keys-out", tmp_path / "keys.csv") in (2, 3)
        assert not list(tmp_path.glob("keys*")), arguments


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["filter", "--out", "OUT", "--basic", "--workers", "0"], "--workers"),
        (["filter", "--out", "OUT", "--min-words", "many"], "--min-words"),
        (["dedup", "--out", "OUT", "--by", "looks"], "--by"),
        (["hard-captions"], "--out"),
    ],
)
def test_options_that_cannot_be_parsed_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], option: str
) -> None:
    out = str(tmp_path / "out")
    misused(capsys, option, "data", *(out if each == "OUT" else each for each in arguments), "pool")
    assert not list(tmp_path.iterdir())


def test_the_programs_run_and_load_no_torch(pool: Path, tmp_path: Path) -> None:
    scripts = Path(__file__).parents[3] / "data_scripts"
    code = f"""
import runpy, sys
for name, more in (("filter", ["--min-words", "3"]), ("dedup", []), ("hard_captions", [])):
    sys.argv = [name, {str(pool)!r}, "--out", {str(tmp_path / "out")!r}, "--dry-run", *more]
    try:
        runpy.run_path(f"{scripts}/{{name}}.py", run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0, name
assert not {{"torch", "pyarrow", "usearch"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # a Ray cluster of this machine takes half a minute to start
def test_ray_gives_the_same_bytes(pool: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for name, more in (("a", ()), ("b", ("--engine", "ray", "--workers", 2))):
        assert run("filter", pool, "--out", tmp_path / name, "--min-words", 3, *more) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.skipif(
    os.geteuid() == 0, reason="permissions do not bind the superuser: run pytest as another user"
)
def test_a_folder_that_refuses_is_an_error(pool: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(0o500)
    assert run("filter", pool, "--out", closed / "out", "--basic") == 2


def test_a_file_in_place_of_the_folder_is_an_error(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert run("filter", pool, "--out", tmp_path / "file", "--basic") == 2
    assert (tmp_path / "file").read_text() == "x"


def test_a_list_of_keys_replaces_no_file_unasked_and_no_input(pool: Path, tmp_path: Path) -> None:
    words, kept, scores = ("--min-words", 3), tmp_path / "kept.npy", tmp_path / "scores.csv"
    notes = tmp_path / "kept.npy.job"
    notes.mkdir()
    (notes / "notes").write_text("mine")
    (tmp_path / "bucket-00000").write_text("mine")
    kept.write_text("mine")
    assert run("filter", pool, "--keys-out", kept, *words) == 2
    assert kept.read_text() == "mine"
    assert run("filter", pool, "--keys-out", kept, *words, "--overwrite") == 0
    assert [path.name for path in notes.iterdir()] == ["notes"]
    assert (tmp_path / "bucket-00000").read_text() == "mine"
    assert run("filter", pool, "--scores-out", scores, "--clip-score", "json.score", "--min", 0, *words,
               "--keys-out", tmp_path / "kept.csv") == 0  # fmt: skip
    assert json.loads((tmp_path / "kept.npy.summary.json").read_text())["samples"]
    before = scores.read_bytes()
    assert run("filter", pool, "--clip-score", scores, "--min", 0, "--keys-out", scores, "--overwrite") == 2
    assert scores.read_bytes() == before


def test_linked_shards_are_never_replaced(pool: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for shard in pool.glob("*.tar"):
        (links / shard.name).symlink_to(shard)
    before = files(pool)
    for source, out in ((links, pool), (links, links)):
        assert run("filter", source, "--out", out, "--min-words", 3, "--overwrite") == 2
    assert files(pool) == before


def test_a_cut_output_is_written_again_and_a_full_disk_has_a_cure(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name, words in (("filter", ("--min-words", 3)), ("hard-captions", ())):
        whole, out = tmp_path / f"{name}-whole", tmp_path / name
        assert run(name, pool, "--out", whole, *words) == 0
        module = selection if name == "filter" else hard_captions
        with monkeypatch.context() as patch:
            patch.setattr(module, "finish_train_shards", full)
            assert run(name, pool, "--out", out, *words) == 1
        assert "it continues" in capsys.readouterr().err
        (out / "00000.tar").write_bytes(b"")
        assert run(name, pool, "--out", out, *words) == 0
        assert files(out) == files(whole)
