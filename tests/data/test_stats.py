"""Statistics of shards against slow counts of the same files; the page is safe whatever a caption holds."""

from __future__ import annotations

import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tarfile
import xml.etree.ElementTree
from base64 import b64decode
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clipkit.cli import main
from clipkit.data.captions import DRAWN, CaptionRules, SlotCaptions, field_captions, slot_key
from clipkit.data.describing.job import describe_set
from clipkit.data.describing.scripts import script_of
from clipkit.data.describing.shard import Description
from clipkit.data.describing.summary import NAMED, Summary, lines_of, quantile, shown
from clipkit.data.describing.tokens import TokenRule, counter, rule_of
from clipkit.data.engine import Engine
from clipkit.data.options import CaptionField
from clipkit.data.sample import Absent, RawSample
from clipkit.proposal.survey import FieldFacts
from clipkit.types import ConfigError
from tests.commands import fails
from tests.data.damages import tar_bytes
from tests.data.makers import encoded

ODD_CAPTIONS = [
    *("a red car", "don't you'll I'M THEY'VE", "<start_of_text> hi <end_of_text>", "_a_b__c", "x" * 300),
    *("na\u00efve &amp; &lt;b&gt; caf\u00c3\u00a9", "\u0130stanbul \u00c9COLE", "a\x1b[2Jb"),
    *("\u65e5\u672c\u8a9e\u306e\u30c6\u30ad", "\u05e9\u05dc\u05d5\u05dd", "\u041c\u0438\u0440, 2024"),
    *("\U0001f642\U0001f3f3\ufe0f\u200d\U0001f308 flag", "\u201cquoted\u201d it\u2019s"),
    *("\ufb01 \u2460 \u00bd 12345", "tabs\tand\nlines", "word " * 90),
]


def test_tokens_are_those_of_open_clip() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    for clean in ("lower", "whitespace", "canonicalize"):
        theirs = SimpleTokenizer(clean=clean)
        expected = [len(theirs.encode(text)) + 2 for text in ODD_CAPTIONS]
        assert counter(TokenRule(clean=clean))(ODD_CAPTIONS) == expected


def test_models_and_files_name_their_tokenizer(tmp_path: Path) -> None:
    from open_clip.tokenizer import get_clean_fn
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert rule_of("ViT-B-32", None, None) == TokenRule("clip", 77)
    assert rule_of("ViT-B-32", None, 20).context == 20
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "red": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text_cfg = {"context_length": 16, "hf_tokenizer_name": "nobody/nothing"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": text_cfg}}))
    rule = rule_of(str(tmp_path), None, None)
    assert rule == TokenRule(str(tmp_path / "tokenizer.json"), 16, "whitespace")
    tokenizer.no_truncation()
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert counter(rule)(ODD_CAPTIONS[:4]) == [
        len(theirs(get_clean_fn("whitespace")(text)).input_ids) for text in ODD_CAPTIONS[:4]
    ]
    for model, file in (("no-such-model", None), (None, "no-such-file")):
        with pytest.raises(ConfigError):
            rule_of(model, file, None)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        rule_of(None, str(tmp_path / "bad.json"), None)


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("a red car", "Latin"),
        ("\u00e9cole \u0141\u00f3d\u017a", "Latin"),
        ("\uff26\uff55\uff4c\uff4c", "Latin"),
        ("\u041a\u0440\u0430\u0441\u043d\u0430\u044f car", "Cyrillic"),
        ("\u03b1\u03b2\u03b3", "Greek"),
        ("\u7ea2\u8272\u6c7d\u8f66", "Han"),
        ("\u8d64\u3044\u8eca", "Kana"),
        ("\ube68\uac04 \ucc28", "Hangul"),
        ("\u0932\u093e\u0932 \u0915\u093e\u0930", "Devanagari"),
        ("\u0633\u064a\u0627\u0631\u0629", "Arabic"),
        ("\u05de\u05db\u05d5\u05e0\u05d9\u05ea", "Hebrew"),
        ("\u0e23\u0e16", "Thai"),
        ("12:30 !\U0001f642", "no letters"),
        ("", "no letters"),
    ],
)
def test_scripts(text: str, script: str) -> None:
    assert script_of(text) == script


def picture(number: int) -> tuple[str, bytes]:
    """Extension and bytes; sizes, modes and formats that differ."""
    kind, mode = (("jpg", "RGB"), ("png", "RGBA"), ("png", "L"), ("webp", "RGB"))[number % 4]
    colour = number % 5 * 40
    image = Image.new(
        mode, (20 + number % 7, 30 - number % 3), colour if mode == "L" else (colour,) * len(mode)
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if number % 8 == 4 else {}
    return kind, encoded(image, {"jpg": "JPEG"}.get(kind, kind.upper()), **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards of 60 samples, a few of them unusable, hostile captions and names among them."""
    samples = []
    for number in range(60):
        kind, data = picture(number % 50)
        text = ODD_CAPTIONS[number % len(ODD_CAPTIONS)] if number % 3 else f"caption {number % 9}"
        members = [(f"{number:03d}.{kind}", data), (f"{number:03d}.txt", text.encode())]
        samples.append(members)
    samples[7][0] = (samples[7][0][0], b"broken")
    samples[8][1] = ("008.txt", b"")
    samples[9].append(("009.<img src=x onerror=alert(1)>$x", b"x"))
    samples[10][1] = ("010.txt", b"<script>alert(1)</script> \x1b[2J")
    samples[11][1] = ("011.txt", b"<script>alert(1)</script> \x1b[2J")
    shards = tmp_path / "set"
    shards.mkdir()
    for number in range(4):
        (shards / f"{number}.tar").write_bytes(tar_bytes(samples[15 * number : 15 * number + 15]))
    return shards


def describe(folder: Path, engine: Engine | None = None, **options: Any) -> Any:
    shards = sorted(map(str, folder.glob("*.tar")))
    numbers = options.pop("numbers", range(len(shards)))
    return describe_set(shards, numbers, Description(), engine or Engine(), **options)


def test_numbers_are_those_of_a_slow_count(folder: Path) -> None:
    captions, images, pairs, extensions = [], [], [], Counter()
    for path in sorted(folder.glob("*.tar")):
        by_key: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for entry in tar:
                stem, _, extension = entry.name.partition(".")
                by_key.setdefault(stem, {})[extension] = tar.extractfile(entry).read()  # type: ignore[union-attr]
                extensions[extension] += 1
        for members in by_key.values():
            text = members["txt"].decode().strip()
            data = next(members[name] for name in ("jpg", "png", "webp") if name in members)
            good = data != b"broken"
            captions += [text] if text else []
            images += [data] if good else []
            pairs += [(data, text)] if text and good else []
    result = describe(folder).result()
    metrics, opened = result["metrics"], [Image.open(io.BytesIO(data)) for data in images]

    def spread(values: list[float]) -> tuple[float, float, float]:
        return min(values), max(values), round(statistics.mean(values), 4)

    for name, values in {
        "words": [len(text.split()) for text in captions],
        "characters": [len(text) for text in captions],
        "tokens": counter(TokenRule())(captions),
        "width": [image.width for image in opened],
        "short side": [min(image.size) for image in opened],
    }.items():
        found = metrics[name]
        assert (found["least"], found["most"], found["mean"]) == spread([float(value) for value in values])
        ordered = sorted(values)
        for quantile_name, percent in (("5 %", 5), ("median", 50), ("95 %", 95)):
            assert found[quantile_name] == ordered[math.ceil(percent * len(ordered) / 100) - 1]
    assert metrics["extensions"] == extensions
    assert metrics["modes"] == Counter(image.mode for image in opened)
    assert metrics["formats"] == Counter(image.format for image in opened)
    assert metrics["turned by EXIF"] == sum(image.getexif().get(0x0112) == 6 for image in opened) > 0
    for name, contents in {"caption": captions, "image": images, "pair": pairs}.items():
        share = round(1 - len(set(contents)) / len(contents), 6)
        assert metrics["duplicates"][name] == {"share": share, "looked at": len(contents)}
    long = [
        text for text, tokens in zip(captions, counter(TokenRule())(captions), strict=True) if tokens > 77
    ]
    assert metrics["truncated captions"] == round(len(long) / len(captions), 6) > 0
    scripts = Counter(map(script_of, captions))
    assert metrics["truncated captions by script"] == {
        script: {
            "captions": count,
            "truncated": round(sum(script_of(text) == script for text in long) / count, 6),
        }
        for script, count in scripts.items()
    }
    frequent, times = metrics["most frequent captions"], Counter(captions)
    assert dict(map(tuple, frequent)).items() <= times.items()
    assert [count for _, count in frequent] == [count for _, count in times.most_common(10) if count > 1]
    assert metrics["unusable"] == {"bad image": 1, "empty caption": 1}
    assert result["counts"]["samples"] == 60
    assert result["counts"]["described"] == 58
    json.dumps(result, allow_nan=False)


def test_quantiles_are_values_that_occur() -> None:
    values = [3, 3, 4, 9, 9, 9, 10, 50]
    assert [quantile(Counter(values), share) for share in (0.05, 0.5, 0.95)] == [3, 9, 50]


def test_files_do_not_depend_on_workers_shares_and_interruptions(folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    describe(folder, out=first)
    for share in (range(0, 3), range(3, 4)):
        describe(folder, out=second, numbers=share)
        assert not (second / "stats.json").exists()
    describe(folder, Engine(2), out=second)
    assert sorted(path.name for path in second.iterdir()) == ["stats.html", "stats.json"]
    for name in ("stats.html", "stats.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


_INSIDE = "data:image/svg+xml;base64,"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


def test_what_is_not_shown_by_name_is_summed_up() -> None:
    counts = {f"Script{number}": number + 1 for number in range(20)}
    tokens = {name: Counter({10.0: count - 1, 99.0: 1}) for name, count in counts.items()}
    empty = {name: Counter[str]() for name in (*NAMED, "turned", "unusable")}
    lines = list(lines_of(Summary(Description(), tokens=tokens, counts=empty)))
    rows = [re.fullmatch(r"  (.+): ([\d.]+)% of (\d+)", line) for line in lines]
    found = [(row[1], float(row[2]), int(row[3])) for row in rows if row]
    assert found[-1][0] == "12 more scripts"
    assert sum(total for _, _, total in found) == sum(counts.values())
    # One caption of each script is too long.
    assert [round(share * total / 100) for _, share, total in found] == [1] * 8 + [12]
    assert [total for _, total in shown(counts, 12)] == [*range(20, 8, -1), sum(range(1, 9))]


def test_the_captions_of_a_field_are_those_that_training_may_draw() -> None:
    """Against the draw itself, over so many slots that every entry comes up."""
    document = json.dumps({"many": ["a", " ", "b", None, "a"], "none": [" "]}).encode()
    members = {"json": (0, len(document)), "txt": (len(document), len(document) + 8)}
    sample = RawSample("0", members, document + b"x\n\n y z\n")
    for field in (CaptionField("json.many"), CaptionField("txt"), CaptionField("txt", lines=True)):
        rules = CaptionRules((field,))
        drawn = {SlotCaptions(rules, sample, slot_key(0, 0, slot)).caption(DRAWN) for slot in range(200)}
        assert set(field_captions(sample, field)) == drawn
    assert field_captions(sample, CaptionField("json.many")) == ["a", "b", "a"]
    with pytest.raises(Absent):
        field_captions(sample, CaptionField("json.none"))


def test_init_and_stats_call_scripts_by_the_same_names() -> None:
    texts = ["a car", "\u8d64\u3044\u8eca", "\u0440\u0443\u0441", "12"]
    assert FieldFacts(texts=texts).scripts() == Counter(map(script_of, texts))


def test_the_page_holds_no_script_and_loads_nothing(folder: Path, tmp_path: Path) -> None:
    describe(folder, out=tmp_path, title="<script>x</script>")
    page = (tmp_path / "stats.html").read_text(encoding="utf-8")
    parser = Tags()
    parser.feed(page)
    tags = Counter(tag for tag, _ in parser.found)
    assert not tags.keys() & {"script", "link", "iframe", "object", "form", "a", "base"}
    assert tags["img"] >= 7
    for _, attributes in parser.found:
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("src") or _INSIDE).startswith(_INSIDE)
    (policy,) = [given["content"] for tag, given in parser.found if tag == "meta" and "http-equiv" in given]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\x1b" not in page
    for _, attributes in parser.found:
        if "src" in attributes:
            picture = b64decode((attributes["src"] or "").partition(",")[2])
            tree = xml.etree.ElementTree.fromstring(picture)
            assert not [node for node in tree.iter() if node.tag.rpartition("}")[2] in ("script", "image")]


def test_the_commands_load_no_torch(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from clipkit.cli import main; "
        f"codes = [main(['data', 'stats', {str(folder)!r}, '--out', {str(tmp_path / 'out')!r}]), "
        f"main(['data', 'check-shards', {str(folder)!r}])]; "
        "assert codes == [0, 3], codes; assert not {'torch', 'open_clip', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=dict(os.environ))


def test_the_command_says_what_is_wrong(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "stats", str(folder), "--context", "5"]) == 0
    printed = capsys.readouterr().out
    assert "longer than 5 tokens" in printed
    assert "not usable: 1 x bad image" in printed
    listing = sorted(tmp_path.iterdir())
    assert main(["data", "stats", str(folder), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert sorted(tmp_path.iterdir()) == listing
    assert fails(capsys, 2, "no open_clip model", "data", "stats", folder, "--model", "ViT-Z")
    assert fails(capsys, 2, "--out", "data", "stats", folder, "--out", folder / "0.tar")
    assert fails(capsys, 2, "none of 4 shards", "data", "stats", folder, "--start", "4")
    assert fails(capsys, 3, "has an image and a caption", "data", "stats", folder, "--caption", "json.x")
    (tmp_path / "empty.tar").write_bytes(tar_bytes([]))
    assert fails(capsys, 3, "none of 0 samples has an image and a caption (no sample)", "data", "stats",
                 tmp_path / "empty.tar")  # fmt: skip
    data = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(data[: len(data) // 2])
    assert "check-shards" in fails(capsys, 3, "1.tar", "data", "stats", folder)
    assert fails(capsys, 3, "gone.tar", "data", "stats", folder / "gone.tar")
