"""One million samples through make, check, stats and reshard in little memory, with throughput.

Run it with: pytest -n 0 -m slow -s tests/data/test_million.py. Last result (2026-11-23, two idle cores of an
AMD EPYC, 13 min 4 s); peaks are of the process tree:

    make-shards  307 s, 3,257 samples/s; 238 MB (a table of a million rows over ten thousand files)
    check        118 s, 8,504 samples/s; 173 MB
    stats        114 s, 8,805 samples/s; 267 MB
    reshard      243 s, 4,111 samples/s; 285 MB (shuffle, split by group, index)
"""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest

SAMPLES = 1_000_000
PICTURES = 10_000
MEMORY = 2 * 10**9
WORKERS = 2


def png(number: int) -> bytes:
    """A PNG of 8 x 8 grey pixels that spell the number."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    line = b"\0" + struct.pack(">Q", number)
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    pixels = zlib.compress(line * 8, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def write_table(folder: Path) -> Path:
    """A table of a million rows over ten thousand picture files: seven rows in turn are one group."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(PICTURES):
        (pictures / f"{number}.png").write_bytes(png(number))
    table = folder / "pairs.csv"
    with table.open("w", encoding="utf-8", newline="") as stream:
        stream.write("filepath,caption,group\n")
        for number in range(SAMPLES):
            stream.write(f"pictures/{number % PICTURES}.png,caption {number},{number // 7}\n")
    return table


def tree(root: int) -> set[int]:
    """The process `root` and all its descendants."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat") as stream:
                    parents[int(name)] = int(stream.read().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it ended meanwhile
    found = {root}
    while True:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        if not more:
            return found
        found |= more


def resident(root: int) -> int:
    """Bytes in memory of the whole tree; pages that processes share are counted for each."""
    total = 0
    for pid in tree(root):
        try:
            with open(f"/proc/{pid}/statm") as stream:
                total += int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return total


def measured(name: str, *arguments: object) -> None:
    """Runs a program, prints seconds, samples per second and peak memory, and asserts the last."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    output: list[str] = []
    assert process.stdout is not None
    stream = process.stdout
    reader = threading.Thread(target=lambda: output.extend(stream))
    reader.start()
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.2)
    reader.join()
    stream.close()
    seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"\n{name}: {seconds:.0f} s, {SAMPLES / seconds:,.0f} samples/s; "
        f"{cpu:.0f} s of processors, {SAMPLES / cpu:,.0f} samples/s each; peak {peak / 1e6:.0f} MB",
        flush=True,
    )
    print("".join(output[-3:]), end="")
    assert process.returncode == 0
    assert peak < MEMORY


@pytest.mark.slow  # several minutes and 5 GB of disk
@pytest.mark.timeout(4 * 3600)
def test_a_million_samples_in_two_gigabytes(tmp_path: Path) -> None:
    made, out = tmp_path / "made", tmp_path / "out"
    clipkit = ("-m", "clipkit")
    table = write_table(tmp_path)
    job = ("data", "make-shards", table, "--out", made, "--keep", "group", "--workers", WORKERS)
    measured("make", *clipkit, *job)
    measured("check", *clipkit, "data", "check-shards", made, "--workers", WORKERS)
    measured("stats", *clipkit, "data", "stats", made, "--workers", WORKERS)
    job = ("data", "reshard", made, "--out", out, "--workers", WORKERS)
    measured("reshard", *clipkit, *job, "--split", "0.9/0.1", "--group", "json.group")
    sizes = [json.loads((out / side / "sizes.json").read_text()) for side in ("train", "validation")]
    assert sum(sum(each.values()) for each in sizes) == SAMPLES
