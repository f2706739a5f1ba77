"""Draws the embedded corpora (made data) as training shards and evaluation sets.

scenes: one to three coloured glyphs with several captions; held out: shape-colour pairs, company, a face, a
background
    python data_scripts/make_glyphs.py scenes --out data/scenes
characters: 2,297 named characters in twelve faces; held out: one face and a tenth of the characters
    python data_scripts/make_glyphs.py characters --out data/characters

Train on OUT/train; the other folders are in CLIP_benchmark layout. Exit codes: 0 done, 2 usage, 3 data.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clipkit.cli.output import StageProgress
from clipkit.data.glyphs import make_characters, make_scenes
from clipkit.types import ClipkitError


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line; a usage error leaves with exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    corpora = parser.add_subparsers(dest="corpus", required=True)
    scenes = corpora.add_parser("scenes", help="one to three coloured glyphs")
    scenes.add_argument(
        "--train", type=_positive, default=40_000, metavar="N", help="scenes (default: 40000)"
    )
    scenes.add_argument(
        "--evaluation", type=_positive, default=1_000, metavar="N", help="per set (default: 1000)"
    )
    characters = corpora.add_parser("characters", help="named characters in twelve faces")
    characters.add_argument(
        "--num-characters", type=_positive, metavar="N", help="the first N (default: all 2297)"
    )
    for command, side in ((scenes, 48), (characters, 32)):
        command.add_argument("--out", type=Path, required=True, help="folder to write")
        command.add_argument("--size", type=_positive, default=side, help=f"pixels a side (default: {side})")
        command.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: 0)")
        command.add_argument("--workers", type=_positive, default=2, help="processes (default: 2)")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    options = vars(parse(arguments))
    corpora: dict[str, Callable[..., dict[str, Any]]] = {"scenes": make_scenes, "characters": make_characters}
    make = corpora[options.pop("corpus")]
    began = time.perf_counter()
    done = 0
    try:
        with StageProgress() as stage:

            def count(images: int) -> None:
                nonlocal done
                done += images
                stage("images drawn", done, done)

            description = make(options.pop("out"), progress=count, **options)
    except ClipkitError as error:
        print(f"error: {error.cause}\n  cure: {error.cure}", file=sys.stderr)
        return error.exit_code
    print(
        f"{description['train']:,} training images and {len(description['sets'])} evaluation sets, ", end=""
    )
    print(f"{time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
