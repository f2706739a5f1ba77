"""What a reshard must not do: touch the work of others, mix up samples or states, write what is no JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipkit.types import ConfigError
from tests.data.test_reshard import read, run, write_inputs


def test_shards_put_where_a_finished_job_was_are_not_replaced(tmp_path: Path) -> None:
    inputs, out = write_inputs(tmp_path / "in", [3]), tmp_path / "out"
    run(out, inputs)
    for number in range(3):
        (out / f"{number:05d}.tar").write_bytes(b"of someone else")
    with pytest.raises(ConfigError, match="already holds shards"):
        run(out, inputs)
    assert {path.read_bytes() for path in out.glob("*.tar")} == {b"of someone else"}
    run(out, inputs, overwrite=True)
    assert sorted(read(out)) == sorted(read(inputs))
