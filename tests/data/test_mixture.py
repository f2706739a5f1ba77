"""Mixtures: batches divided by the weights, every source in epochs of its own, whoever builds the rows."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipkit.data.caption_survey import CaptionSurvey
from clipkit.data.loader import CaptionField, LoaderOptions, Source, TrainStream, open_train
from clipkit.data.mixture import MAX_PARTS, Mixture, parts_of, source_lanes
from clipkit.data.mixture_stream import source_names
from clipkit.data.mixture_survey import MixtureSurvey
from clipkit.data.text import TextView
from clipkit.data.views import ImageView
from clipkit.dist import World
from clipkit.types import Batch, ClipkitError, ConfigError, DataError
from tests.data.makers import ByteTokenizer, Members, NoisyView, global_batches, png, same, take, write_tar
from tests.data.servers import serving

WEIGHTS = [(0.7, 0.3), (3.0, 1.0), (1.0, 1.0), (0.5, 0.3, 0.2), (1 / 3, 2 / 3), (1.0, 99.0), (2, 3, 5, 7)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("batch_size", [1, 8, 12, 60])
def test_every_batch_is_divided_by_the_weights(weights: tuple[float, ...], batch_size: int) -> None:
    """Within one sample of weight x B in each batch, exactly over as many batches as there are parts."""
    parts = parts_of(weights)
    mixture = Mixture(batch_size, parts, seed=3)
    exact = [Fraction(part, sum(parts)) * batch_size for part in parts]
    seen = np.zeros(len(parts), dtype=np.int64)
    for step in range(50):
        assert mixture.totals(step) == tuple(seen)
        rows = np.bincount(mixture.sources(step, 0, batch_size), minlength=len(parts))
        assert all(abs(count - share) < 1 for count, share in zip(rows, exact, strict=True))
        assert all(mixture.share(s)[0] <= count <= mixture.share(s)[1] for s, count in enumerate(rows))
        seen += rows
    whole = sum(parts)
    first, then = mixture.totals(7), mixture.totals(7 + 3 * whole)
    assert [b - a for a, b in zip(first, then, strict=True)] == [3 * batch_size * part for part in parts]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.61, 0.39), (0.5, 0.3, 0.2), (0.123457, 0.876543)])
def test_every_row_gets_its_part_of_every_source_all_the_time(weights: tuple[float, ...]) -> None:
    """A lane can be read in epochs because no row falls behind the others by more than a few samples."""
    mixture = Mixture(24, parts_of(weights), seed=1)
    for steps in (1, 10, 333, 10_000, 123_456):
        for source, part in enumerate(mixture.parts):
            taken = mixture.taken(source, steps, 0, 24)
            assert np.abs(taken - steps * part / sum(mixture.parts)).max() < 4


@pytest.mark.parametrize(("batch_size", "lanes"), [(12, (4, 1)), (12, (12, 6)), (30, (15, 3)), (7, (7, 1))])
def test_draws_are_what_a_slow_count_finds(batch_size: int, lanes: tuple[int, ...]) -> None:
    """Spans take from their lane one after the other: counted row by row over all batches from the first."""
    mixture = Mixture(batch_size, parts_of((0.7, 0.3)), seed=9)
    used: Counter[tuple[int, int]] = Counter()
    for step in range(40):
        before = used.copy()
        expected: list[list[tuple[int, int, int]]] = [[], []]
        for row, source in enumerate(mixture.sources(step, 0, batch_size).tolist()):
            lane = row * lanes[source] // batch_size
            expected[source].append((row, lane, used[source, lane]))
            used[source, lane] += 1
        for first, end in [(0, batch_size), (2, 5), (batch_size - 1, batch_size)]:
            for source in range(2):
                drawn = mixture.draws(source, lanes[source], step, first, end)
                found = list(zip(*(column.tolist() for column in drawn[:3]), strict=True))
                assert found == [place for place in expected[source] if first <= place[0] < end]
                spans = {row * lanes[source] // batch_size for row in range(first, end)}
                assert drawn.least == min(before[source, lane] for lane in spans)


def test_parts_are_the_weights_as_written() -> None:
    assert parts_of([0.7, 0.3]) == (7, 3)
    assert parts_of([12, 4]) == (3, 1)
    assert parts_of([1e-7, 3e-7]) == (1, 3)
    generator = random.Random(0)
    for _ in range(50):
        weights = [generator.random() for _ in range(generator.randrange(2, 9))]
        parts = parts_of(weights)
        assert sum(parts) == MAX_PARTS
        assert all(
            abs(part / MAX_PARTS - weight / sum(weights)) < 1e-6
            for part, weight in zip(parts, weights, strict=True)
        )
    with pytest.raises(ConfigError, match="less than a millionth"):
        parts_of([1.0, 1e-9])


def test_the_pattern_is_the_same_in_every_version() -> None:
    """Runs continue under later versions: what a seed means is fixed."""
    patterns = [Mixture(10, parts_of([0.7, 0.3]), seed=5), Mixture(5, parts_of([1, 2, 3]), seed=8)]
    found = [
        "".join(map(str, each.sources(step, 0, each.batch_size))) for each in patterns for step in (0, 1)
    ]
    assert found == ["1001000100", "0010001001", "12122", "02121"]


def sample(number: int) -> Members:
    return [(f"{number:06d}.png", png(number)), (f"{number:06d}.txt", f"caption {number}".encode())]


def write(folder: Path, counts: Sequence[int], first: int, changed: dict[int, Members] | None = None) -> Path:
    """Tars of samples numbered from `first` on."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate(counts):
        numbers = range(first, first + count)
        write_tar(folder / f"{shard:03d}.tar", [(changed or {}).get(n) or sample(n) for n in numbers])
        first += count
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """72 samples numbered from 0 and 48 from 1000 on."""
    root = tmp_path_factory.mktemp("pair")
    return write(root / "a", [40, 1, 31], 0), write(root / "b", [25, 23], 1000)


def mixed(
    folders: Sequence[Path | str],
    weights: Sequence[float],
    batch_size: int,
    world: World | None = None,
    saved: Any = None,
    **options: Any,
) -> TrainStream:
    sources = tuple(Source(str(at), weight=weight) for at, weight in zip(folders, weights, strict=True))
    return open_train(
        LoaderOptions(sources, batch_size, **{"seed": 5, **options}),
        [NoisyView(size=(8, 8), scale=(0.3, 1.0))],
        [TextView(tokenizer=ByteTokenizer(), context_length=24, trim="argmax")],
        world or World(),
        saved=saved,
    )


def by_ranks(
    folders: Sequence[Path | str], weights: Sequence[float], size: int, stop: int, **options: Any
) -> list[Batch]:
    """Global batches of 12 as `size` ranks build them, one after the other in this process."""
    streams = (mixed(folders, weights, 12, World(rank, size), **options) for rank in range(size))
    return global_batches([take(opened, 0, stop) for opened in streams])


def test_every_sample_comes_once_in_every_epoch_of_its_source(pair: tuple[Path, Path]) -> None:
    """16 batches of 12 at 3 : 1 are two epochs of the first source and one of the second."""
    batches = take(mixed(pair, (0.75, 0.25), 12), 0, 16)
    keys = Counter(int(key) for batch in batches for key in batch.keys)
    assert keys == Counter({**dict.fromkeys(range(72), 2), **dict.fromkeys(range(1000, 1048), 1)})
    for batch in batches:
        assert sum(int(key) >= 1000 for key in batch.keys) == 3
        # Ids run on from source to source.
        assert batch.ids.tolist() == [int(key) % 1000 + 72 * (int(key) >= 1000) for key in batch.keys]
    epoch = (72 + 48) // 12
    slots = torch.cat([batch.slots for batch in batches[:epoch]])
    assert slots.tolist() == list(range(120))


def test_the_tail_of_an_epoch_is_another_one_every_time(tmp_path: Path) -> None:
    """75 samples in 4 lanes leave out 3 of an epoch, and 25 epochs leave out each of them once."""
    folders = [write(tmp_path / "a", [75], 0), write(tmp_path / "b", [48], 1000)]
    opened = mixed(folders, (0.75, 0.25), 12)
    assert [source["lanes"] for source in opened._position["sources"]] == [4, 3]
    keys = Counter(int(key) for batch in take(opened, 0, 200) for key in batch.keys)
    assert {keys[number] for number in range(75)} == {24}


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.61, 0.39)])
def test_every_world_and_worker_count_builds_the_same_batches(
    pair: tuple[Path, Path], weights: tuple[float, float]
) -> None:
    reference = take(mixed(pair, weights, 12), 0, 22)
    for size, workers in [(2, 0), (3, 1), (4, 0), (6, 0), (12, 0), (1, 3), (2, 2)]:
        assert same(by_ranks(pair, weights, size, 22, workers=workers), reference)
    state = mixed(pair, weights, 12).state(0)
    found = by_ranks(pair, weights, 5, 22, uneven=True, saved=state)
    assert [batch.keys for batch in found] == [batch.keys for batch in reference]
    few = by_ranks(pair, weights, 2, 22, lanes=2, workers=3)
    assert same(few, by_ranks(pair, weights, 1, 22, lanes=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_any_step_can_be_the_first(pair: tuple[Path, Path], workers: int) -> None:
    whole = take(mixed(pair, (0.7, 0.3), 12), 0, 40)
    for start in (1, 9, 10, 11, 25, 39):
        assert same(take(mixed(pair, (0.7, 0.3), 12, workers=workers), start, 40), whole[start:])
    state = json.loads(json.dumps(mixed(pair, (0.7, 0.3), 12).state(23)))
    assert (state["epoch"], state["batch_in_epoch"]) == (2, 3)
    later = [mixed(pair, (0.7, 0.3), 12, World(rank, 3), saved=state) for rank in range(3)]
    assert same(global_batches([take(opened, 23, 40) for opened in later]), whole[23:])


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_counted_by_source(pair: tuple[Path, Path], workers: int) -> None:
    opened = mixed(pair, (0.61, 0.39), 12, workers=workers)
    assert opened.counted == ("samples/a", "samples/b")
    seen: Counter[str] = Counter()
    for batch in take(opened, 0, 30):
        found = Counter("samples/b" if int(key) >= 1000 else "samples/a" for key in batch.keys)
        assert batch.counts == found
        seen += found
    lines = opened.describe_sources(30)
    assert lines[0].startswith("source a: 72 samples, 61% of every batch (7 or 8 of 12), seen")
    assert lines[1].endswith(f"seen {seen['samples/b'] / 48:.3g} times")


def test_repeated_captions_are_expected_within_sources_and_between_them(tmp_path: Path) -> None:
    """Against batches drawn at random, from sources that share captions."""
    generator = random.Random(4)
    texts = [[str(generator.randrange(40)) for _ in range(60)], [str(30 + n % 25) for n in range(50)]]
    for name, captions in zip("ab", texts, strict=True):
        (tmp_path / name).mkdir()
        members = [[(f"{n}.png", png(n)), (f"{n}.txt", text.encode())] for n, text in enumerate(captions)]
        write_tar(tmp_path / name / "0.tar", members)
    opened = mixed((tmp_path / "a", tmp_path / "b"), (2.0, 1.0), 12)
    assert opened.survey is not None
    survey = opened.survey()
    shares = []
    for _ in range(4000):
        batch = generator.sample(texts[0], 8) + generator.sample(texts[1], 4)
        counts = Counter(batch)
        shares.append(sum(counts[text] > 1 for text in batch) / 12)
    assert survey.duplicate_share(12) == pytest.approx(np.mean(shares), abs=4 * np.std(shares) / 4000**0.5)
    assert f"{len({*texts[0], *texts[1]})} distinct" in survey.describe(12)
    # A batch of all pairs: whatever is not alone in both together.
    both = Counter(texts[0] + texts[1])
    alike = MixtureSurvey(survey.sources, (6, 5))
    assert alike.duplicate_share(110) == pytest.approx(sum(n for n in both.values() if n > 1) / 110)
    (first, _) = survey.sources
    assert MixtureSurvey((first,), (1,)).duplicate_share(12) == pytest.approx(first.duplicate_share(12))


def test_few_pairs_of_a_source_bound_the_repeats_of_large_batches() -> None:
    """Samples of two sources, smaller than their parts of a batch, against batches of the whole sources."""
    generator = np.random.default_rng(0)
    pairs = [generator.geometric(0.001, 10_000), 500 + generator.geometric(0.001, 8000)]

    def survey(rows: Sequence[np.ndarray], sampled: bool) -> MixtureSurvey:
        found = [np.unique(labels, return_counts=True) for labels in rows]
        return MixtureSurvey(
            tuple(
                CaptionSurvey(len(whole), len(labels), counts, sampled, distinct)
                for whole, labels, (distinct, counts) in zip(pairs, rows, found, strict=True)
            ),
            (2, 1),
        )

    def drawn(*sizes: int) -> list[np.ndarray]:
        return [generator.choice(each, size, replace=False) for each, size in zip(pairs, sizes, strict=True)]

    shares = []
    for _ in range(200):
        batch = np.concatenate(drawn(400, 200))
        _, place, times = np.unique(batch, return_inverse=True, return_counts=True)
        shares.append((times[place] > 1).mean())
    assert survey(pairs, False).duplicate_share(600) == pytest.approx(np.mean(shares), rel=0.03)
    samples = [survey(drawn(100, 300), True) for _ in range(40)]
    bounds = [sample.duplicate_share(600) for sample in samples]
    assert np.mean(shares) < np.mean(bounds) < 1.2 * np.mean(shares)
    assert max(bounds) < 1
    assert "at most" in samples[0].describe(600)
    assert "at most" not in samples[0].describe(100)
    one = samples[0].sources[0]
    assert MixtureSurvey((one,), (1,)).duplicate_share(400) == pytest.approx(one.duplicate_share(400))


def test_one_source_in_a_list_is_a_source(pair: tuple[Path, Path]) -> None:
    plain = open_train(
        LoaderOptions(Source(str(pair[0])), 8, 5),
        [NoisyView(size=(8, 8), scale=(0.3, 1.0))],
        [TextView(tokenizer=ByteTokenizer(), context_length=24, trim="argmax")],
        World(),
    )
    listed = mixed(pair[:1], (0.3,), 8)
    assert same(take(listed, 0, 12), take(plain, 0, 12))
    assert listed.state(3) == plain.state(3)


def test_a_bad_sample_is_replaced_from_its_own_source(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    bad = {1007: [("001007.png", b"no image"), ("001007.txt", b"caption")]}
    folder = write(tmp_path / "b", [25, 23], 1000, bad)
    whole = take(mixed(pair, (0.75, 0.25), 12), 0, 16)
    found = take(mixed((pair[0], folder), (0.75, 0.25), 12), 0, 16)
    (batch,) = [batch for batch in found if batch.rejects]
    (reject,) = batch.rejects
    assert reject.key == "001007"
    assert reject.shard == str(folder / "000.tar")
    assert int(reject.substitute) >= 1000
    row = batch.slots.tolist().index(reject.slot)
    assert batch.keys[row] == reject.substitute
    for mine, other in zip(found, whole, strict=True):
        differing = [a for a, b in zip(mine.keys, other.keys, strict=True) if a != b]
        assert differing == ([reject.substitute] if mine is batch else [])


def test_a_changed_source_is_refused_by_its_number(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    state = mixed(pair, (0.7, 0.3), 12).state(7)
    fewer = write(tmp_path / "b", [25, 22], 1000)
    with pytest.raises(ConfigError, match=r"sources\.1\.num_samples: 48 -> 47") as caught:
        mixed((pair[0], fewer), (0.7, 0.3), 12, saved=state)
    assert "restart_epoch" in caught.value.cure
    with pytest.raises(ConfigError, match=r"sources\.0\.parts: 7 -> 3"):
        mixed(pair, (0.6, 0.4), 12, saved=state)
    with pytest.raises(ConfigError, match=r"sources\.0\.index_sha"):
        mixed(pair[::-1], (0.7, 0.3), 12, saved=state)
    with pytest.raises(ConfigError, match="mixture_version: 1 -> None"):
        mixed(pair[:1], (1.0,), 12, saved=state)
    with pytest.raises(ConfigError, match=r"sources\.1\.parts: None -> 3"):
        mixed(pair, (0.7, 0.3), 12, saved=mixed(pair[:1], (1.0,), 12).state(7))


def test_sources_that_cannot_be_mixed_are_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    packed = tmp_path / "c.tar.gz"
    packed.write_bytes(gzip.compress((pair[1] / "000.tar").read_bytes()))
    cases: list[tuple[type[ClipkitError], str, dict[str, Any]]] = [
        (ConfigError, "lazy does not go with several sources", {"folders": pair, "index": "lazy"}),
        (ConfigError, "cannot be indexed", {"folders": (pair[0], packed)}),
        (
            ConfigError,
            "the source b gives it 54 of the 60 samples of a batch, and it holds 48",
            {"folders": pair, "weights": (0.1, 0.9), "batch": 60},
        ),
        (DataError, "no shard matches", {"folders": (pair[0], tmp_path / "no" / "*.tar")}),
    ]
    for kind, cause, case in cases:
        folders, weights = case.pop("folders"), case.pop("weights", (0.5, 0.5))
        with pytest.raises(kind, match=cause):
            mixed(folders, weights, case.pop("batch", 12), **case)


def test_sources_may_lie_anywhere(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """One source in a folder, the other behind a server; both indices in a third place."""
    here = take(mixed(pair, (0.7, 0.3), 12), 0, 12)
    index = tmp_path / "index"
    with serving(pair[1]) as server:
        there = (pair[0], f"{server.url}/{{000..001}}.tar")
        assert same(take(mixed(there, (0.7, 0.3), 12, index_dir=str(index)), 0, 12), here)
    assert len(list(index.glob(".clipkit-index-*.json"))) == 2


@pytest.mark.parametrize("wanted", [20, 0.15])
def test_pairs_are_held_out_of_all_sources_by_their_keys(tmp_path: Path, wanted: float) -> None:
    """As of one set with the shards of both; a key that both have is held out of both."""
    folders = [write(tmp_path / "a", [40, 32], 0), write(tmp_path / "b", [25, 23], 60)]
    opened = mixed(folders, (0.75, 0.25), 12, holdout=wanted)
    alone = open_train(
        LoaderOptions(Source(tuple(map(str, folders))), 12, 5, holdout=wanted),
        [NoisyView(size=(8, 8))],
        [],
        World(),
    )
    (together,) = alone.held
    numbers = sorted(sample if sample < 72 else sample - 12 for sample in together.kept.held.tolist())
    found = [
        number + first for first, part in zip((0, 60), opened.held, strict=True) for number in part.kept.held
    ]
    assert sorted(found) == numbers
    assert set(range(60, 72)) & set(numbers), "some of the keys that both sources have"
    seen = {int(key) for batch in take(opened, 0, 40) for key in batch.keys}
    assert seen == set(range(108)) - set(numbers)
    assert opened.num_samples == 120 - len(numbers)
    pairs = opened.held_pairs()
    assert sum(len(part.ids) for part in pairs) == len(numbers)
    with pytest.raises(ConfigError, match=r"sources\.0\.held_out"):
        mixed(folders, (0.75, 0.25), 12, saved=opened.state(3))


def test_every_source_has_caption_fields_of_its_own(tmp_path: Path) -> None:
    """Captions are those of the source's fields, drawn per slot, and counted by source and field."""

    def told(number: int) -> Members:
        fields = {"long": f"l{number}", "short": f"s{number}"}
        return [(f"{number}.png", png(number)), (f"{number}.json", json.dumps(fields).encode())]

    (tmp_path / "b").mkdir()
    write_tar(tmp_path / "b" / "0.tar", map(told, range(1000, 1048)))
    fields = (CaptionField("json.long", 3.0), CaptionField("json.short"))
    sources = (
        Source(str(write(tmp_path / "a", [72], 0)), weight=2.0),
        Source(str(tmp_path / "b"), fields),
    )
    view = TextView(tokenizer=ByteTokenizer(), context_length=24, trim="argmax")
    opened = open_train(LoaderOptions(sources, 12, 5, workers=2), [ImageView(size=(8, 8))], [view], World())
    assert opened.counted[2:] == tuple(
        f"{kind}/b/json.{field}" for kind in ("captions", "captions_fallback") for field in ("long", "short")
    )
    drawn: Counter[str] = Counter()
    for batch in take(opened, 0, 60):
        here: Counter[str] = Counter()
        for key, tokens in zip(batch.keys, batch.texts["text"].tolist(), strict=True):
            text = bytes(tokens[: tokens.index(300)]).decode()
            if len(key) == 6:
                assert text == f"caption {int(key)}"
            else:
                assert text in (f"l{key}", f"s{key}")
                here[f"captions/b/json.{'long' if text[0] == 'l' else 'short'}"] += 1
        assert {name: n for name, n in batch.counts.items() if not name.startswith("samples/")} == here
        drawn += here
    assert sum(drawn.values()) == 240
    assert 0.68 < drawn["captions/b/json.long"] / 240 < 0.82


def test_a_small_source_has_fewer_lanes() -> None:
    assert [source_lanes(count, 12) for count in (1, 31, 32, 48, 64, 96, 191, 192, 10**9)] == [
        *(1, 1, 2, 3, 4, 6, 6, 12, 12)
    ]


def test_names_come_from_folders() -> None:
    specs = [
        "s3://b/laion/{00000..49999}.tar", "catalogue/", "/data/x y/catalogue/*.tar", "lone.tar",
        "https://user:secret@host/00.tar?token=abc", ".",
    ]  # fmt: skip
    named = source_names([*map(Source, specs), Source(("deep/p/0.tar", "q/1.tar")), Source("x", name="lone")])
    assert named == ("laion", "catalogue", "catalogue 2", "lone", "00", "source", "p", "lone 2")
