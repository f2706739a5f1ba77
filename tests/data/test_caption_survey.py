"""Repeated captions: counts against the texts themselves, expectations against batches drawn at random."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipkit.data import caption_survey
from clipkit.data.caption_survey import CaptionSurvey, survey_captions
from clipkit.data.captions import CaptionRules
from clipkit.data.indexing import build_index
from clipkit.data.kept import Kept
from clipkit.data.options import CaptionField
from clipkit.data.remote import ShardBytes
from clipkit.data.source import expand_shards
from tests.data.makers import stream, take, write_shards, write_tar


def simulated(repeats: list[int], batch: int, draws: int = 4000) -> float:
    """The mean share of rows with a twin in batches drawn without replacement."""
    pairs = [caption for caption, times in enumerate(repeats) for _ in range(times)]
    generator, shared = random.Random(0), 0
    for _ in range(draws):
        counts = Counter(generator.sample(pairs, batch))
        shared += sum(times for times in counts.values() if times > 1)
    return shared / (draws * batch)


@pytest.mark.parametrize(
    ("repeats", "batch"),
    [([1] * 40, 16), ([2] * 20, 8), ([1] * 30 + [10], 12), ([40], 2), ([3, 1, 7, 1, 2], 14), ([5, 5], 2)],
)
def test_the_expected_share_is_that_of_random_batches(repeats: list[int], batch: int) -> None:
    survey = CaptionSurvey(sum(repeats), sum(repeats), np.array(repeats))
    assert survey.duplicate_share(batch) == pytest.approx(simulated(repeats, batch), abs=0.01)
    assert survey.duplicate_share(1) == 0.0


def test_a_sample_estimates_the_set_and_bounds_larger_batches() -> None:
    repeats = np.random.default_rng(0).geometric(0.3, 3000)
    whole = CaptionSurvey(int(repeats.sum()), int(repeats.sum()), repeats)
    pairs = np.repeat(np.arange(len(repeats)), repeats)
    found, bounds = [], []
    for seed in range(40):
        part = np.random.default_rng(seed).choice(pairs, 2000, replace=False)
        counts = np.unique(part, return_counts=True)[1]
        sample = CaptionSurvey(len(pairs), 2000, counts, True)
        found.append(sample.duplicate_share(512))
        bounds.append(sample.duplicate_share(4000))
        assert whole.duplicate_share(4000) < bounds[-1] < 1
    # A caption agrees with each of 3,999 others as often as two pairs of the set do.
    agree = sum(m * (m - 1) for m in repeats.tolist()) / (len(pairs) * (len(pairs) - 1))
    assert np.mean(bounds) == pytest.approx(1 - (1 - agree) ** 3999, rel=0.05)
    assert np.mean(found) == pytest.approx(whole.duplicate_share(512), rel=0.03)
    assert "at most" in sample.describe(4000)
    assert "a sample of 2,000 pairs" in sample.describe(512)
    assert whole.describe(512).startswith("3,000 distinct (")


def test_every_caption_of_a_small_set_is_counted(tmp_path: Path) -> None:
    texts = [f"caption {n % 7}" if n % 3 else f" Caption  {n % 5}" for n in range(150)]
    changed = {n: [(f"{n:06d}.png", b"x"), (f"{n:06d}.txt", text.encode())] for n, text in enumerate(texts)}
    changed[20] = [("000020.png", b"x")]
    shards = write_shards(tmp_path / "set", [70, 1, 79], changed)
    index = build_index(expand_shards(str(shards)))
    survey = survey_captions(Kept(index), ShardBytes(index), CaptionRules(), 0)
    folded = Counter(" ".join(text.lower().split()) for n, text in enumerate(texts) if n != 20)
    assert (survey.total, survey.read, survey.sampled) == (150, 149, False)
    assert sorted(survey.repeats.tolist()) == sorted(folded.values())
    # As the stream draws them: rows of the first epoch, in any order.
    opened = stream(shards, 10)
    assert opened.survey is not None
    again = opened.survey()
    assert again.repeats.tolist() == survey.repeats.tolist()


def test_what_is_held_out_is_not_counted(tmp_path: Path) -> None:
    """Every caption of a pair is its own key: those that are counted are those that one epoch trains on."""
    shards = write_shards(tmp_path / "set", [70, 50])
    opened = stream(shards, 10, holdout=30)
    assert opened.survey is not None
    survey = opened.survey()
    assert (survey.total, survey.read, survey.distinct) == (90, 90, 90)
    index = build_index(expand_shards(str(shards)))
    trained = {int(number) for batch in take(opened, 0, 9) for number in batch.ids}
    held = np.array(sorted(set(range(120)) - trained))
    whole = survey_captions(Kept(index), ShardBytes(index), CaptionRules(), 0)
    assert set(survey.labels) == set(
        survey_captions(Kept(index, held), ShardBytes(index), CaptionRules(), 0).labels
    )
    assert len(set(whole.labels) - set(survey.labels)) == 30


def test_fields_are_counted_as_they_are_drawn(tmp_path: Path) -> None:
    samples = [
        [(f"{n}.png", b"x"), (f"{n}.txt", b"same"), (f"{n}.json", b'{"c": "%d"}' % n)] for n in range(400)
    ]
    index = build_index([str(write_tar(tmp_path / "a.tar", samples))])
    rules = CaptionRules((CaptionField("txt"), CaptionField("json.c", 3.0)))
    survey = survey_captions(Kept(index), ShardBytes(index), rules, 1)
    assert survey.read == 400
    assert survey.repeats.max() == 400 - (survey.distinct - 1)
    assert 60 < survey.repeats.max() < 140


def test_large_sets_are_sampled_all_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the index has an offset for some samples only; and the batches are not moved by it."""
    shards = write_shards(tmp_path / "set", [90, 110])
    monkeypatch.setattr(caption_survey, "EVERY_PAIR", 100)
    monkeypatch.setattr(caption_survey, "SAMPLED_PAIRS", 64)
    index = build_index(expand_shards(str(shards)))
    reads: list[tuple[int, int]] = []
    source: Any = ShardBytes(index)
    plain = source.read
    source.read = lambda shard, begin, end: (reads.append((shard, end - begin)), plain(shard, begin, end))[1]
    survey = survey_captions(Kept(index), source, CaptionRules(), 0)
    assert (survey.read, survey.distinct, survey.sampled) == (64, 64, True)
    assert {shard for shard, _ in reads} == {0, 1}
    # Headers and captions, no images.
    assert max(size for _, size in reads) == 512
    before = take(stream(shards, 10), 0, 1)[0].ids.tolist()
    opened = stream(shards, 10)
    assert opened.survey is not None
    opened.survey()
    assert take(opened, 0, 1)[0].ids.tolist() == before
