"""Filters, deduplications and hard captions that are killed, and started again until they are finished."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from clipkit.cli.app import main
from tests.data.curation.test_commands import files, sample
from tests.data.killing import in_a_child
from tests.data.makers import png, write_tar


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("filter", ("--min-words", "3", "--clip-score", "json.score", "--top", "0.7", "--balance", "LIST")),
        ("dedup", ("--by", "image", "--by", "phash")),
        ("hard-captions", ()),
    ],
)
def test_killed_anywhere_and_started_again_gives_the_same_bytes(
    tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    for shard in range(3):
        numbers = range(11 * shard, 11 * shard + 11)
        write_tar(pool / f"{shard:03d}.tar", [sample(n, image=png(n % 26, 16)) for n in numbers])
    (tmp_path / "list.txt").write_text("dog\ncat\n")
    given = [str(tmp_path / "list.txt") if option == "LIST" else option for option in options]

    def job(out: Path) -> Callable[[], None]:
        def run() -> None:
            code = main(["data", name, str(pool), "--out", str(out), *given])
            # Killed after the last shard was there, it is finished, and refuses to replace them.
            assert code == 0 or (code == 2 and (out / "manifest.json").exists())

        return run

    whole = tmp_path / "whole"
    calls = in_a_child(job(whole), whole)
    assert calls > 12
    for point in sorted(random.Random(0).sample(range(1, calls + 1), 7)):
        out = tmp_path / f"killed-{point}"
        assert in_a_child(job(out), out, point) == -1
        assert in_a_child(job(out), out) >= 0
        assert files(out) == files(whole), f"killed at call {point} of {calls}"
