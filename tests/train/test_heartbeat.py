"""A rank that is killed or stopped is named by the other one, which leaves with code 1 and no workers."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from clipkit.dist import World
from clipkit.lock import process_start
from clipkit.train.heartbeat import Heartbeat, Sign, behind, missing, read_signs
from clipkit.types import ClipkitError


def sign(rank: int, **changes: Any) -> Sign:
    me = {"host": "elsewhere", "pid": 7, "start": "then", "step": 5, "doing": "in a step"}
    return Sign(**{"rank": rank, **me, **changes})


def test_the_strongest_evidence_is_named() -> None:
    here = {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}
    alive, late = sign(1, **here), sign(2, doing="waiting for data")
    silent, failed = sign(3, age=60.0), sign(4, left="MemoryError: none left")
    gone = sign(5, **{**here, "start": "of another process with this number"})
    following = sign(6, left="")
    every = [alive, late, silent, failed, gone, following]
    assert [text[:6] for text in missing(every, 0, 30.0)] == ["rank 5", "rank 4"]
    assert "none left" in missing(every, 0, 30.0)[1]
    assert [text[:6] for text in missing([alive, late, silent, following], 0, 30.0)] == ["rank 3"]
    assert missing([alive, late, following, gone], 5, 30.0) == [], "nobody waits for himself"
    assert [text[:6] for text in behind([alive, late, following])] == ["rank 2"]
    assert behind([alive, sign(0), following]) == []


def test_only_a_failed_collective_is_translated(tmp_path: Path) -> None:
    other = Heartbeat(tmp_path, World(1, 2), 60.0)
    with pytest.raises(MemoryError), other:
        raise MemoryError("none left")
    first = Heartbeat(tmp_path, World(0, 2), 60.0)
    first.at(4, "in a step")
    with pytest.raises(ClipkitError, match=r"^a collective failed: rank 1 .* step 0: none left"), first:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
    assert [(found.step, found.doing, found.left) for found in read_signs(other.folder)] == [
        (4, "in a step", ""),
        (0, "starting", "none left"),
    ]
    with pytest.raises(RuntimeError, match="shapes"), Heartbeat(tmp_path, World(0, 2), 60.0):
        raise RuntimeError("shapes differ")
    first.prepare()
    with Heartbeat(tmp_path, World(0, 1), 60.0):
        assert read_signs(other.folder) == [], "one process signs nothing"
