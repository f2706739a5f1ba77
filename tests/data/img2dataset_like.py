"""Folders as img2dataset 1.47 leaves them: tars, a parquet file with every row, statistics, and holes.

Source: its writer.py, downloader.py and logger.py. Also a stand-in for the program itself (see `main`).
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import os
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

PER_SHARD = 10_000  # keys count in these steps


class Fetched(NamedTuple):
    """One row: its address and caption, and the picture, or the status and error of a failure."""

    url: str
    caption: str | None
    picture: bytes | None
    uid: str = ""
    status: str = "success"
    error: str | None = None


def _meta(row: Fetched, key: str) -> dict[str, Any]:
    good = row.picture is not None
    return {
        "uid": row.uid,
        "caption": row.caption,
        "url": row.url,
        "key": key,
        "status": row.status,
        "error_message": row.error,
        "width": 32 if good else None,
        "height": 32 if good else None,
        "original_width": 32 if good else None,
        "original_height": 32 if good else None,
        "sha256": hashlib.sha256(row.picture).hexdigest() if row.picture is not None else None,
    }


def write_shard(folder: Path, number: int, rows: Sequence[Fetched], per_shard: int = PER_SHARD) -> None:
    """Writes shard `number`: successes into the tar, every row into the parquet file, counts beside it."""
    digits = len(str(per_shard - 1))
    metas = []
    with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
        for at, row in enumerate(rows):
            key = f"{10**digits * number + at:0{5 + digits}d}"
            meta = _meta(row, key)
            metas.append(meta)
            if row.picture is None:
                continue
            members = {
                "jpg": row.picture,
                "json": json.dumps(meta, indent=4).encode(),
                "txt": (row.caption or "").encode(),
            }
            for extension, content in sorted(members.items()):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mode, info.uname, info.gname = len(content), 0o444, "bigdata", "bigdata"
                tar.addfile(info, io.BytesIO(content))
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        pass  # clipkit does not read it
    else:
        parquet.write_table(pyarrow.Table.from_pylist(metas), folder / f"{number:05d}.parquet")
    states = Counter(row.status for row in rows)
    stats = {
        "count": len(rows),
        "successes": states["success"],
        "failed_to_download": states["failed_to_download"],
        "failed_to_resize": states["failed_to_resize"],
        "duration": 0.5,
        "start_time": 1.0,
        "end_time": 1.5,
        "status_dict": Counter(row.error or "success" for row in rows),
    }
    (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats, indent=4))


def failed(url: str, error: str = "HTTP Error 404: Not Found", uid: str = "") -> Fetched:
    """A row whose picture could not be fetched."""
    return Fetched(url, "lost", None, uid, "failed_to_download", error)


def _flags(arguments: Sequence[str]) -> dict[str, Any]:
    """The flags after `img2dataset`, each written as --name=value; fire reads the values as literals."""
    own = arguments[arguments.index("img2dataset") + 1 :]
    pairs = (flag.removeprefix("--").partition("=")[::2] for flag in own)
    return {name: _literal(value) for name, value in pairs}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def main(arguments: Sequence[str]) -> int:
    """Stands in for `uvx --from img2dataset== img2dataset --flag=value ...`.

    Fetches nothing: an address names a picture file; of others "404", "torn", "crash", "partial" or "asleep"
    is the fate.
    """
    flags = _flags(arguments)
    folder = Path(flags["output_folder"])
    folder.mkdir(parents=True, exist_ok=True)
    # The real one fails here with a ValueError on any other JSON file, hidden ones included.
    done = {int(path.name.split("_")[0]) for path in folder.iterdir() if path.name.endswith(".json")}
    (folder / "arguments").write_text(json.dumps(list(arguments)))
    with open(flags["url_list"], encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream, delimiter="\t" if flags["input_format"] == "tsv" else ","))
    per_shard = flags["number_sample_per_shard"]
    print("Starting the downloading of this file", flush=True)
    for number in range(-(-len(table) // per_shard)):
        if number in done:
            continue
        rows = []
        for entry in table[number * per_shard : (number + 1) * per_shard]:
            url, caption = entry[flags["url_col"]], entry.get(flags.get("caption_col"))
            if os.path.isfile(url):
                rows.append(Fetched(url, caption, Path(url).read_bytes(), entry.get("uid", "")))
            elif "asleep" in url:
                (folder / f"{number:05d}.tar").write_bytes(b"x" * 700)
                print("asleep", flush=True)
                time.sleep(120)
            elif "crash" in url:
                (folder / f"{number:05d}.tar").write_bytes(b"x" * 700)
                print("shard failed\x1b[2J with error", file=sys.stderr, flush=True)
                return 1
            elif "404" in url:
                rows.append(failed(url))
            elif "torn" in url:
                rows.append(Fetched(url, caption, None, "", "failed_to_resize", "Image decoding error"))
            elif "partial" in url:
                break
            else:
                raise AssertionError(f"no fate in {url}")
        else:
            write_shard(folder, number, rows, per_shard)
            share = sum(row.picture is not None for row in rows) / len(rows)
            print(f"total   - success: {share:.3f} - failed to download: 0 - count: {len(rows)}", flush=True)
            continue
        (folder / f"{number:05d}.tar").write_bytes(b"\0" * 1024)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
