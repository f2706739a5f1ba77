"""Hold-out: which pairs, never one of them in a batch, every other one exactly once, for all ranks."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clipkit.data.holdout as holdout
from clipkit.data.holdout import kept_samples
from clipkit.data.indexing import build_index
from clipkit.data.kept import Kept
from clipkit.data.loader import CaptionField, LoaderOptions, Source, open_train
from clipkit.data.source import expand_shards
from clipkit.data.tar_index import Index
from clipkit.dist import World
from clipkit.types import ConfigError, DataError
from tests.data.makers import global_run, good, png, same, stream, take, write_shards, write_tar

COUNTS = [37, 1, 50, 9, 23]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 samples in five uneven shards."""
    return write_shards(tmp_path_factory.mktemp("uneven"), COUNTS)


def options(folder: Path, wanted: int | float | None, **more: Any) -> LoaderOptions:
    return LoaderOptions(Source(str(folder)), 8, 0, holdout=wanted, **more)


def kept_of(folder: Path, wanted: int | float | None, **more: Any) -> Kept:
    return kept_samples(build_index(expand_shards(str(folder))), options(folder, wanted, **more))


def keys_of(folder: Path) -> list[str]:
    """Keys in the order of the shards, read by tarfile."""
    keys: dict[tuple[str, str], None] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                keys[path.name, name.partition(".")[0]] = None
    return [key for _, key in keys]


def hashes_of(folder: Path) -> list[int]:
    """The published rule: the first 64 bits of a personalised blake2b of the key, little-endian."""
    return [
        int.from_bytes(
            hashlib.blake2b(key.encode(), digest_size=8, person=b"clipkit holdout").digest(), "little"
        )
        for key in keys_of(folder)
    ]


@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda found: sum(found) > 1),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_ranks_and_ids_are_inverse(counts: list[int], data: st.DataObject) -> None:
    total = sum(counts)
    held = sorted(data.draw(st.sets(st.integers(0, total - 1), max_size=total - 1)))
    empty = np.zeros(len(counts), dtype=np.int64)
    index = Index(("x",) * len(counts), np.array(counts), empty, empty, ("",) * len(counts), 0, 1, empty)
    kept = Kept(index, np.array(held, dtype=np.int64))
    left = [sample for sample in range(total) if sample not in held]
    assert kept.num_samples == len(left)
    assert kept.ids(np.arange(len(left))).tolist() == left
    assert [kept.rank(sample) for sample in left] == list(range(len(left)))
    shard_of = np.repeat(np.arange(len(counts)), counts)
    assert kept.counts.tolist() == [sum(shard_of[left] == shard) for shard in range(len(counts))]
    assert kept.first_rank.tolist() == [0, *np.cumsum(kept.counts).tolist()]


@pytest.mark.parametrize("wanted", [1, 7, 60, 119])
def test_a_number_takes_the_smallest_hashes(uneven: Path, wanted: int) -> None:
    hashes = hashes_of(uneven)
    smallest = sorted(range(120), key=hashes.__getitem__)[:wanted]
    assert kept_of(uneven, wanted).held.tolist() == sorted(smallest)


def test_a_share_depends_on_the_key_alone(uneven: Path, tmp_path: Path) -> None:
    """The same pairs of a set that grew or was cut into other shards, and about as many as asked for."""
    other = write_shards(tmp_path / "other", [200, 200])
    held = {share: kept_of(other, share).held.tolist() for share in (0.05, 0.2, 0.5)}
    hashes = hashes_of(other)
    for share, ids in held.items():
        assert ids == [sample for sample in range(400) if hashes[sample] < share * 2**64]
        assert abs(len(ids) - 400 * share) < 5 * (400 * share * (1 - share)) ** 0.5
        assert kept_of(uneven, share).held.tolist() == [sample for sample in ids if sample < 120]


def test_a_larger_set_holds_out_nothing_that_was_trained_on(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", [60, 60])
    before = set(kept_of(folder, 20).held.tolist())
    write_shards(folder, [60, 60, 60])
    after = set(kept_of(folder, 20).held.tolist())
    assert {sample for sample in after if sample < 120} <= before


def test_a_number_is_found_however_wrong_the_first_guess_is(
    uneven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    plain = holdout.shard_hashes

    def stingy(shard: str, count: int, digest: str, limit: int, storage: Any) -> Any:
        limits.append(limit)
        return plain(shard, count, digest, limit if limit >= 2**64 else limit // 100, storage)

    right = kept_of(uneven, 10).held.tolist()
    for record in uneven.glob(".clipkit-holdout-*"):
        record.unlink()
    monkeypatch.setattr(holdout, "shard_hashes", stingy)
    assert kept_of(uneven, 10).held.tolist() == right
    assert len(set(limits)) > 1


@pytest.mark.parametrize("batch_size", [1, 7, 12, 90])
@pytest.mark.parametrize("wanted", [1, 30])
def test_no_held_out_pair_is_trained_on_and_every_other_one_once(
    uneven: Path, batch_size: int, wanted: int
) -> None:
    held = set(kept_of(uneven, wanted).held.tolist())
    assert len(held) == wanted
    opened = stream(uneven, batch_size, holdout=wanted)
    steps = (120 - wanted) // batch_size
    assert (opened.num_samples, opened.steps_per_epoch) == (120 - wanted, steps)
    left_out: list[set[int]] = []
    for epoch in range(3):
        batches = take(opened, epoch * steps, (epoch + 1) * steps)
        ids = torch.cat([batch.ids for batch in batches]).tolist()
        assert len(ids) == len(set(ids)) == steps * batch_size
        assert not held & set(ids)
        assert [int(key) for batch in batches for key in batch.keys] == ids
        left_out.append(set(range(120)) - held - set(ids))
    assert not left_out[0] or left_out[0] != left_out[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_worlds_and_workers_change_nothing(uneven: Path, workers: int) -> None:
    reference = take(stream(uneven, 12, holdout=17), 0, 20)
    for size in (2, 3, 4) if not workers else (3,):
        assert same(global_run(uneven, 12, size, 0, 20, holdout=17, workers=workers), reference)
    later = stream(uneven, 12, holdout=17, saved=stream(uneven, 12, holdout=17).state(9), workers=workers)
    assert same(take(later, 9, 20), reference[9:])


def test_without_a_hold_out_nothing_is_different(uneven: Path) -> None:
    opened = stream(uneven, 12)
    assert opened.held == ()
    assert "held_out" not in opened.state(0)


def test_substitutes_are_never_held_out(tmp_path: Path) -> None:
    """Windows of bad samples only: what stands in comes from elsewhere, and is a kept pair too."""
    bad = {
        number: [(f"{number:06d}.png", b"no picture"), (f"{number:06d}.txt", b"x")]
        for number in range(30, 90)
    }
    folder = write_shards(tmp_path / "set", [60, 60], bad)
    held = set(kept_of(folder, 40).held.tolist())
    opened = stream(folder, 4, holdout=40, max_consecutive=100, window_bytes=20_000)
    for batch in take(opened, 0, 2 * 20):
        for key, ids in zip(batch.keys, batch.ids.tolist(), strict=True):
            assert int(key) == ids
            assert ids not in held
            assert not 30 <= ids < 90


def test_pairs_of_one_key_are_held_out_together(tmp_path: Path) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", [good(number) for number in range(20)])
    for wanted in (1, 4, 30):
        held = kept_of(tmp_path, wanted).held
        assert wanted <= len(held) < wanted + 3
        assert len(held) == 3 * len({sample % 20 for sample in held.tolist()})


def test_the_walk_is_done_once(uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path / "set", COUNTS)
    held = kept_of(folder, 11).held.tolist()
    (record,) = folder.glob(".clipkit-holdout-*")
    with monkeypatch.context() as patched:
        patched.setattr(holdout, "shard_hashes", None)
        assert kept_of(folder, 11).held.tolist() == held
    # A damaged record is made again, and so is one of a set that changed.
    content = bytearray(record.read_bytes())
    content[len(content) // 3] ^= 1
    record.write_bytes(content)
    assert kept_of(folder, 11).held.tolist() == held
    record.write_bytes(b"")
    assert kept_of(folder, 11).held.tolist() == held
    write_shards(folder, [*COUNTS, 50])
    hashes = hashes_of(folder)
    smallest = sorted(range(170), key=hashes.__getitem__)[:11]
    assert kept_of(folder, 11).held.tolist() == sorted(smallest) != held
    assert len(list(folder.glob(".clipkit-holdout-*"))) == 2


def _held(rank: int, world: int, folder: Path) -> tuple[list[int], list[str]]:
    walked: list[str] = []
    plain = holdout.shard_hashes

    def counted(shard: str, *more: Any) -> Any:
        walked.append(Path(shard).name)
        return plain(shard, *more)

    holdout.shard_hashes = counted  # type: ignore[assignment]
    opened = stream(folder, 12, World(rank, world), holdout=25)
    pairs = opened.held_pairs()
    assert [source.ids for source in pairs] == [tuple(opened.held[0].kept.held.tolist())]
    numbers = [int(text.split()[1]) for texts in pairs[0].captions for text in texts]
    return [*pairs[0].ids, *numbers], walked


def test_ranks_share_the_walk_and_the_reading(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    folder = write_shards(tmp_path / "set", COUNTS)
    found = run_ranks(3, _held, folder)
    assert [held for held, _ in found] == 3 * [2 * kept_of(folder, 25).held.tolist()]
    # Each shard is walked by one of them, and none of them has all the work.
    walked = [name for _, names in found for name in names]
    assert sorted(walked) == [f"{number:05d}.tar" for number in range(len(COUNTS))]
    assert max(len(names) for _, names in found) == 2


def test_bad_pairs_and_missing_captions_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    held = kept_of(write_shards(folder, [40]), 10).held.tolist()
    changed = {
        held[2]: [(f"{held[2]:06d}.png", png(1)[:50]), (f"{held[2]:06d}.txt", b"cut off")],
        held[5]: [(f"{held[5]:06d}.png", png(1)), (f"{held[5]:06d}.txt", b"  ")],
    }
    (source,) = stream(write_shards(folder, [40], changed), 8, holdout=10).held_pairs()
    assert list(source.ids) == [sample for at, sample in enumerate(held) if at not in (2, 5)]
    assert {refused.key: refused.reason for refused in source.refused} == {
        f"{held[2]:06d}": "bad image",
        f"{held[5]:06d}": "empty caption",
    }


def test_every_caption_that_may_be_drawn_is_evaluated(tmp_path: Path) -> None:
    """Entries of a list, lines where they are captions, several fields; equal ones once, empty ones never."""
    fields = json.dumps({"all": ["one", " ", None, "two"], "one": "one"}).encode()
    samples = [[*good(number), (f"{number:06d}.json", fields)] for number in range(12)]
    for members in samples:
        members[1] = (members[1][0], b"first line\n\n second\n")
    write_tar(tmp_path / "0.tar", samples)

    def captions(*entries: CaptionField) -> set[tuple[str, ...]]:
        source = Source(str(tmp_path), entries)
        opened = open_train(LoaderOptions(source, 4, 0, holdout=5), [], [], World())
        (held,) = opened.held_pairs()
        assert len(held.ids) + len(held.refused) == 5
        return {*held.captions}

    assert captions(CaptionField("json.all")) == {("one", "two")}
    assert captions(CaptionField("txt")) == {("first line\n\n second",)}
    assert captions(CaptionField("txt", lines=True)) == {("first line", "second")}
    mixed = (CaptionField("json.none"), CaptionField("json.one"), CaptionField("json.all", 3.0))
    assert captions(*mixed) == {("one", "two")}
    assert captions(CaptionField("json.none")) == set()


def test_what_cannot_be_held_out_is_refused_with_a_cure(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", [20])
    for wanted, word in ((20, "leaves none"), (21, "leaves none"), (1e-9, "holds out none"), (15, "larger")):
        with pytest.raises(ConfigError, match=word):
            stream(folder, 8, holdout=wanted)
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", [good(1)])
    with pytest.raises(ConfigError, match="same key"):
        kept_of(tmp_path, 1)
    write_tar(tmp_path / "set.tar.gz", [good(number) for number in range(20)], "w:gz")
    with pytest.raises(ConfigError, match="needs an index"):
        stream(tmp_path / "set.tar.gz", 8, holdout=3)


def test_another_hold_out_is_another_run(uneven: Path) -> None:
    state = stream(uneven, 12, holdout=17).state(3)
    for wanted in (None, 16, 0.2):
        with pytest.raises(ConfigError, match="held_out"):
            stream(uneven, 12, holdout=wanted, saved=state)


def test_a_shard_that_changed_under_the_walk_is_found(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", [20])
    index = build_index(expand_shards(str(folder)))
    write_shards(folder, [21])
    with pytest.raises(DataError, match="changed"):
        kept_samples(index, options(folder, 3))
