"""Captions that are wrong for their picture by one exchange of words, by rules and word lists (English).

Two rules (as NegCLIP, arXiv:2210.01936, and SugarCrepe, arXiv:2306.14610, have them, without a tagger):
swap     two words of one class change places: "a red cup and a blue plate" -> "a blue cup and a red plate"
replace  a word becomes another of its class: "two dogs" -> "three dogs"
A caption that the true ones show to be true as well is not made: see `hard_captions`. What no caption of the
picture mentions cannot be known: "bowls" may stand beside the "plates" they replace. Swaps do not have that.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clipkit.data.curation.selection import Target, working
from clipkit.data.curation.survey import OnPart
from clipkit.data.engine import Engine
from clipkit.data.finished import Ended, Finished, is_whole
from clipkit.data.sample import MAX_JSON_BYTES, RawSample, Unusable, caption
from clipkit.data.shard_folder import SUMMARIES, begin_shards
from clipkit.data.shards import ShardRecord, finish_train_shards, shard_name, write_copied_shard
from clipkit.data.source import plain_shards
from clipkit.data.walked import walked_samples
from clipkit.data.word_classes import QUALITIES, THINGS
from clipkit.types import ConfigError, DataError

RULES = ("swap", "replace")
_WORD = re.compile(r"[A-Za-z]+(?:[-'\u2019][A-Za-z]+)*")
# Between two words that stand side by side, exchanging them changes nothing: red and blue stripes.
_JOINING = {"and", "or", "with", "a", "an", "the"}
# Words whose two sides are not the same: a cat on a box, but not a cat beside a box.
_DIRECTED_WORDS = """
on in under over above below behind inside into onto left right top underneath beneath atop
wearing holding carrying riding eating chasing pulling pushing feeding driving biting
"""
_DIRECTED = frozenset(_DIRECTED_WORDS.split())
_NO_PLURAL = {"sheep", "fish", "mouse", "goose", "trousers", "football", "tennis", "baseball", "basketball"}
_IRREGULAR = ("s", "x", "ch", "sh", "y", "z", "f", "fe", "o")


class _Known(NamedTuple):
    """A word of a caption that a class holds."""

    start: int
    end: int
    text: str
    kind: int
    entry: int
    plural: bool


def _lexicon() -> dict[str, list[tuple[int, int, bool]]]:
    """Word -> (class, entry, plural) of every class that holds it."""
    found: dict[str, list[tuple[int, int, bool]]] = {}
    for kind, entries in enumerate((*QUALITIES, *THINGS)):
        for entry, spellings in enumerate(entries):
            for word in spellings:
                found.setdefault(word, []).append((kind, entry, False))
                if kind >= len(QUALITIES) and _plural(word):
                    found.setdefault(_plural(word), []).append((kind, entry, True))
    return found


def _plural(word: str) -> str:
    """The regular plural, "" for a word that has none."""
    return "" if word in _NO_PLURAL or word.endswith(_IRREGULAR) or word in ("men", "women") else word + "s"


_ENTRIES = (*QUALITIES, *THINGS)
_LEXICON = _lexicon()


def hard_captions(
    text: str, true: Sequence[str], draw: random.Random, num: int, rules: Sequence[str] = RULES
) -> list[str]:
    """Returns up to `num` captions that are wrong where `text` is right; rules take turns, swap first.

    true: every caption of the picture. None of what is returned equals one of them, whatever their case and
    punctuation; no word is put in that one of them holds; words are not swapped that stand side by side (red
    and blue), describe the same word (a red ball, a blue ball), or are things that nothing directed stands
    between (a cat beside a dog); nor where the parts around `and` are the same afterwards. Only
    `draw.random()` is used.
    """
    known = _known_words(text)
    made = {"swap": _swapped(text, known, draw), "replace": _replaced(text, known, true, draw)}
    forbidden = {_plain(caption) for caption in (text, *true)}
    parts = {_parts(caption) for caption in (text, *true)}
    queues = [
        [c for c in made[rule] if _plain(c) not in forbidden and _parts(c) not in parts] for rule in rules
    ]
    chosen: list[str] = []
    while len(chosen) < num and any(queues):
        for queue in queues:
            if queue and len(chosen) < num:
                made_one = queue.pop(0)
                if made_one not in chosen:
                    chosen.append(made_one)
    return chosen


def _known_words(text: str) -> list[_Known]:
    found = []
    for match in _WORD.finditer(text):
        for kind, entry, plural in _LEXICON.get(match[0].lower(), ()):
            found.append(_Known(match.start(), match.end(), match[0], kind, entry, plural))
    return found


def _swapped(text: str, known: Sequence[_Known], draw: random.Random) -> list[str]:
    made = []
    for at, first in enumerate(known):
        for second in known[at + 1 :]:
            same = (first.kind, first.plural) == (second.kind, second.plural)
            if same and first.entry != second.entry and _differ(text, first, second):
                changed = _edited(text, {first: second.text, second: first.text})
                made.append((draw.random(), changed))
    return [changed for _, changed in sorted(made)]


def _differ(text: str, first: _Known, second: _Known) -> bool:
    """Whether exchanging the two says something else about the picture."""
    between = [word.lower() for word in _WORD.findall(text[first.end : second.start])]
    same_class = {word for word in between if any(kind == first.kind for kind, *_ in _LEXICON.get(word, ()))}
    if set(between) <= _JOINING | same_class:
        return False
    if first.kind >= len(QUALITIES):
        return bool(set(between) & _DIRECTED)
    return _head(text, first) != _head(text, second)


def _head(text: str, known: _Known) -> str:
    """The word after a word, which an adjective describes; "" at the end."""
    found = _WORD.search(text, known.end)
    return found[0].lower() if found else ""


def _replaced(text: str, known: Sequence[_Known], true: Sequence[str], draw: random.Random) -> list[str]:
    taken = {word.lower() for caption in (text, *true) for word in _WORD.findall(caption)}
    made = []
    for word in known:
        others = []
        for entry, spellings in enumerate(_ENTRIES[word.kind]):
            form = _plural(spellings[0]) if word.plural else spellings[0]
            forms = {form, *spellings, *(_plural(spelling) for spelling in spellings)}
            if entry != word.entry and form and not forms & taken:
                others.append(form)
        pick = draw.random()
        if others:
            made.append((draw.random(), _edited(text, {word: others[int(pick * len(others))]})))
    return [changed for _, changed in sorted(made)]


def _edited(text: str, changes: Mapping[_Known, str]) -> str:
    """The text with words replaced in the case of those they replace, and with `a` and `an` to match."""
    for word, other in sorted(changes.items(), key=lambda change: -change[0].start):
        shaped = other.lower()
        if word.text.isupper() and len(word.text) > 1:
            shaped = shaped.upper()
        elif word.text[0].isupper():
            shaped = shaped.capitalize()
        text = _with_article(text[: word.start], shaped) + shaped + text[word.end :]
    return text


def _with_article(before: str, word: str) -> str:
    """The text before a word, its last word `a` or `an` as the word wants it."""
    ending = "n" if word[0].lower() in "aeiou" else ""
    return re.sub(r"\b([Aa])n?(\s+)$", lambda found: found[1] + ending + found[2], before)


def _plain(text: str) -> str:
    return " ".join(word.lower() for word in _WORD.findall(text))


def _parts(text: str) -> tuple[str, ...]:
    """What stands around `and`, commas and the like, in any order, without articles."""
    parts = re.split(r"[,;.&]|\band\b|\bbeside\b|\bnext to\b|\bnear\b|\bwith\b", text.lower())
    plain = (
        " ".join(word for word in _WORD.findall(part) if word not in ("a", "an", "the")) for part in parts
    )
    return tuple(sorted(part for part in plain if part))


@dataclass(frozen=True)
class HardCaptions:
    """How hard captions are made and where they go.

    field    entry of the JSON member that gets the list; num: how many at most
    caption  field of the caption that is changed; true: JSON entries with further true captions
    replace  whether an entry `field` that is there already is replaced
    """

    field: str = "hard"
    num: int = 2
    rules: tuple[str, ...] = RULES
    caption: str = "txt"
    true: tuple[str, ...] = ("captions", "caption")
    seed: int = 0
    replace: bool = False

    def of(self, sample: RawSample, document: Mapping[str, Any]) -> list[str]:
        """Returns the hard captions of a sample whose JSON is `document`. Raises Unusable."""
        text = " ".join(caption(sample, self.caption).split())
        state = hashlib.blake2b(f"{self.seed} {sample.key}".encode("utf-8", "surrogateescape"), digest_size=8)
        draw = random.Random(int.from_bytes(state.digest(), "little"))
        true = [
            line for line in (sample.member("txt") or b"").decode("utf-8-sig", "replace").split("\n") if line
        ]
        for name in self.true:
            value = document.get(name)
            values = value if isinstance(value, list) else [value]
            true += [entry for entry in values if isinstance(entry, str)]
        return hard_captions(text, true, draw, self.num, self.rules)


class Written(NamedTuple):
    """What was written: the shard, how many samples got 0, 1, ... hard captions, and why some could not."""

    record: ShardRecord
    made: dict[int, int]
    reasons: dict[str, int]


def add_hard_captions(path: Path, shard: str, options: HardCaptions) -> Written:
    """Writes a copy of a shard whose JSON members hold hard captions; every other member stays as it is.

    Samples for which none can be made are copied unchanged. DataError for an entry that is there already.
    """
    made: Counter[int] = Counter()
    reasons: Counter[str] = Counter()

    def members() -> Iterator[tuple[str, Mapping[str, bytes]]]:
        for sample in walked_samples(shard):
            stored = {extension: sample.chunk[a:b] for extension, (a, b) in sample.members.items()}
            hard: list[str] = []
            try:
                document = _document(sample)
                if options.field in document and not options.replace:
                    raise DataError(
                        f"{shard}: sample {sample.key!r} has an entry {options.field!r} already",
                        "name another --field, or pass --replace",
                    )
                hard = options.of(sample, document)
                if hard or options.field in document:
                    changed = {**document, options.field: hard}
                    stored["json"] = json.dumps(changed, ensure_ascii=False, sort_keys=True).encode()
            except Unusable as error:
                reasons[error.reason] += 1
            made[len(hard)] += 1
            yield sample.key, stored

    record = write_copied_shard(path, members())
    return Written(record, dict(made), dict(reasons))


def _document(sample: RawSample) -> dict[str, Any]:
    content = sample.member("json")
    if content is None:
        return {}
    if len(content) > MAX_JSON_BYTES:
        raise Unusable("JSON too long", f"{len(content)} bytes")
    try:
        document = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Unusable("bad JSON", f"{type(error).__name__}: {error}"[:200]) from None
    if not isinstance(document, dict):
        raise Unusable("JSON is no object", type(document).__name__)
    return document


@dataclass(frozen=True)
class Outcome:
    """What was written: a part, or the whole set with its manifest; nothing by a job that has `ended`."""

    parts: tuple[Written, ...]
    whole: bool
    ended: Ended | None = None


def _refuse_unread(options: HardCaptions, found: Sequence[Written], folder: Path, work: Finished) -> None:
    """Raises DataError when no sample had a caption: the field is a mistake, and what was written goes."""
    samples = sum(written.record.samples for written in found)
    without = sum(sum(written.reasons.values()) for written in found)
    if samples and without == samples:
        reasons = Counter[str]()
        for written in found:
            reasons.update(written.reasons)
            (folder / written.record.name).unlink(missing_ok=True)
        work.clear()
        why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        raise DataError(
            f"no caption could be read from {options.caption} ({why})", "name the field with --caption"
        )


def write_hard_captions(
    specs: Sequence[str],
    out: Path,
    options: HardCaptions,
    engine: Engine,
    numbers_of: Callable[[int], range],
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: OnPart | None = None,
) -> Outcome:
    """Writes shard i of `specs` with hard captions as out/0000i.tar, and the manifest when all are written.

    numbers_of: number of shards -> those to write. Finished shards are not written again. Raises ConfigError
    when `out` holds other shards, DataError for damage and for entries that are there already.
    """
    if not options.field or "." in options.field:
        raise ConfigError(f"--field {options.field!r} is no name of an entry", "give a name without dots")
    shards = plain_shards(specs)
    numbers = numbers_of(len(shards))
    target = Target(out, None)
    values = {"rule" if name == "rules" else name: value for name, value in asdict(options).items()}
    with working(target, shards, "hard-captions", values, overwrite=overwrite, dry_run=dry_run) as survey:
        if survey.ended is not None:
            return Outcome((), whole=True, ended=survey.ended)
        work = survey.work
        folder = work.place("copies").parent if dry_run else out
        if not dry_run:
            # They speak of the shards that are replaced now.
            begin_shards(out, *SUMMARIES)
        pending = [
            number
            for number in numbers
            if (record := work.get(shard_name(number))) is None
            or not is_whole(folder / shard_name(number), record["record"]["bytes"])
        ]
        parts = ((folder / shard_name(number), shards[number], options) for number in pending)
        for done, written in enumerate(engine.map(add_hard_captions, parts), 1):
            entry = {"record": vars(written.record), "made": list(written.made.items())}
            work.put(written.record.name, {**entry, "reasons": written.reasons})
            if dry_run:
                (folder / written.record.name).unlink()
            if progress is not None:
                progress("shards", done, len(pending))
        known = [work.get(shard_name(number)) for number in range(len(shards))]
        found = [
            Written(ShardRecord(**entry["record"]), dict(map(tuple, entry["made"])), entry["reasons"])
            for entry in known
            if entry is not None
        ]
        whole = len(numbers) == len(shards)
        if whole:
            _refuse_unread(options, found, folder, work)
        if whole and not dry_run:
            records = finish_train_shards(out, [written.record for written in found])
            outputs = (out / name for name in (*SUMMARIES, *(record.name for record in records)))
            work.end(outputs, sum(record.samples for record in records))
        return Outcome(tuple(found), whole)
