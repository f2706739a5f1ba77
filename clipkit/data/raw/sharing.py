"""Raw data of a starting job: its shards are made by one process, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clipkit import dist
from clipkit.data.options import Source
from clipkit.data.raw.cache import Made, Progress, Rules, Say, check_columns, made_shards, read_record
from clipkit.data.raw.reading import raw_of, raw_path
from clipkit.data.waiting import together
from clipkit.types import ConfigError


def refuse_unknown_columns(sources: Sequence[Source], world: dist.World) -> None:
    """Raises the errors of columns and captions of all raw data; called by all ranks before any is made."""

    def look() -> None:
        for source in sources if world.is_main else ():
            path = raw_path(source.shards)
            if path is not None:
                check_columns(raw_of(source, path))

    together(look)


def shards_of(source: Source, rules: Rules, world: dist.World, say: Say, progress: Progress) -> Source:
    """Returns the source as shards: of raw data those that were made of it; called by all ranks.

    The main rank makes them. Ranks of a machine that does not see its folder make their own, one of them for
    all: the same bytes. Caption fields that name columns become the fields under which the columns are
    stored, and `content` says what the shards hold. Raises ConfigError for image_root or image_key beside
    shards, and for `lines` of raw data, whose captions have none.
    """
    # What one rank sees decides: ranks of different opinions would wait in different collectives.
    path: Path | None = dist.gather_objects(together(lambda: raw_path(source.shards)))[0]
    if path is None:
        if source.image_root is not None or source.image_key is not None:
            raise ConfigError(
                f"data.train has image_root or image_key beside shards ({source.shards})",
                "they belong to a CSV, TSV or Parquet table; remove them, or name the table",
            )
        return source
    raw = raw_of(source, path)

    def make() -> Made:
        return made_shards(raw, rules, say if world.is_main else _say_nothing, progress)

    first: Made | None = dist.gather_objects(together(lambda: make() if world.is_main else None))[0]
    assert first is not None
    # A folder of the same name on another machine is another folder.
    made = together(lambda: first if read_record(first.folder) == first else make())
    return replace(
        source,
        shards=str(made.folder),
        captions=tuple(
            replace(caption, field=field) for caption, field in zip(source.captions, made.fields, strict=True)
        ),
        name=source.name or (path if path.is_dir() else path.parent).resolve().name or "data",
        content=made.content,
        image_root=None,
        image_key=None,
    )


def _say_nothing(_: str) -> None:
    return None
