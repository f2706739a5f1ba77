"""The data of a run before anything is built: made into shards, looked at, refused or described."""

from __future__ import annotations

import sys
from pathlib import Path

from clipkit.config import Config
from clipkit.data import preflight
from clipkit.data.caption_survey import CaptionSurvey
from clipkit.data.engine import usable_processors
from clipkit.data.loader import TrainStream
from clipkit.data.mixture_stream import source_names
from clipkit.data.mixture_survey import MixtureSurvey
from clipkit.data.options import Source
from clipkit.data.raw import Rules, raw_path
from clipkit.data.raw.sharing import refuse_unknown_columns, shards_of
from clipkit.data.source import expand_shards
from clipkit.data.waiting import together
from clipkit.dist import World
from clipkit.learner import Learner
from clipkit.log import StageProgress
from clipkit.redaction import visible
from clipkit.train.watch import CURES, DUPLICATES
from clipkit.types import Needs


def open_sources(config: Config, needs: Needs, world: World) -> tuple[Source, ...]:
    """Returns the training data of the configuration as shards, made now of raw data; called by all ranks.

    Before any are made, sources that are shards are looked at as well.
    """
    data = config.data
    rules = Rules(
        None if data.cache is None else Path(data.cache), usable_processors(), data.max_reject_fraction
    )
    # Before minutes go into the shards of the first.
    refuse_unknown_columns([entry.source for entry in data.train], world)

    def look() -> None:
        for number, entry in enumerate(data.train if world.is_main and len(data.train) > 1 else ()):
            if raw_path(entry.shards) is None:
                _looked_at(config, number, entry.source, needs)

    together(look)
    with StageProgress() as progress:
        return tuple(shards_of(entry.source, rules, world, _say, progress) for entry in data.train)


def _say(line: str) -> None:
    print(visible(line), file=sys.stderr, flush=True)


def look_at_data(config: Config, sources: tuple[Source, ...], needs: Needs, world: World) -> list[str]:
    """Returns what a few samples of the sources hold, as lines for the banner of the main rank.

    Called by all ranks. Raises the error of a source without what `needs` declares on every rank.
    """

    def look() -> list[str]:
        if not world.is_main:
            return []
        lines: list[str] = []
        for number, (source, name) in enumerate(zip(sources, source_names(sources), strict=True)):
            found, wanted = _looked_at(config, number, source, needs)
            of_source = f"{name}: " if len(sources) > 1 else ""
            lines += [f"{of_source}{line}" for line in preflight.describe(found, wanted)]
        return lines

    lines: list[str] = together(look)
    return lines


def _looked_at(
    config: Config, number: int, source: Source, needs: Needs
) -> tuple[preflight.Look, preflight.Wanted]:
    """What a few samples of a source hold, and must; raises ConfigError or DataError where they do not."""
    wanted = preflight.Wanted.of(needs, source)
    shards = expand_shards(source.shards, allow_pipe=config.data.allow_pipe)
    found = preflight.look(shards, wanted, config.data.storage.storage)
    preflight.check(found, wanted, f"data.train.{number}")
    return found, wanted


def count_captions(
    config: Config, stream: TrainStream, learner: Learner, world: World
) -> tuple[list[str], list[str]]:
    """Returns how often captions repeat as (lines for the banner, warnings) of the main rank.

    Called by all ranks. Both are empty where captions are not read, or only by reading everything.
    """

    def count() -> CaptionSurvey | MixtureSurvey | None:
        return stream.survey() if world.is_main and stream.survey is not None else None

    survey: CaptionSurvey | MixtureSurvey | None = together(count)
    if survey is None:
        return [], []
    share = survey.duplicate_share(config.data.batch_size)
    lines = [f"captions: {survey.describe(config.data.batch_size)}"]
    label = next((pair.label for pair in learner.pairs if pair.repels), None)
    if share <= DUPLICATES or label is None:
        return lines, []
    cause = f"{share:.0%} of a batch are expected to share a caption, and {label} pushes them apart"
    return lines, [f"{cause} ({CURES['duplicates']})"]
