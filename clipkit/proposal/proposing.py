"""From data, machine and budget to the text of a run file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.config import make_config
from clipkit.config.reading import flow_yaml, parse_text
from clipkit.data.raw.cache import in_words
from clipkit.data.raw.reading import CAPTIONS, FOUND, Raw, planned, raw_path
from clipkit.proposal.machine import Machine, look_at_machine, measure
from clipkit.proposal.model import Chosen, choose_model, continue_model
from clipkit.proposal.plan import (
    Pace,
    Section,
    plan_data,
    plan_optimizer,
    plan_run,
    power_of_two,
    seen_samples,
)
from clipkit.proposal.sampling import copy_raw, copy_shards
from clipkit.proposal.survey import DataFacts, FieldFacts, at, survey
from clipkit.redaction import visible
from clipkit.types import ConfigError, DataError

_WIDTH = 110
_OPTIONS = {"--caption-key": "--caption", "--images": "--image-root", " and --keep": ""}
_MEASURED_BATCH = {"cuda": 256, "mps": 64, "cpu": 64}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Proposal:
    """text: the run file; rows: what was found out, as (what, finding)."""

    text: str
    rows: list[tuple[str, str]]


def propose(
    data: str,
    *,
    model: str | None = None,
    budget: str | None = None,
    budget_s: float | None = None,
    image_root: str | None = None,
    image_key: str | None = None,
    captions: tuple[str, ...] = (),
    progress: Progress,
) -> Proposal:
    """Returns a run file for `data` (a table, a folder of pairs, or shards) on this machine; writes nothing.

    model: weights to fine-tune. budget: the time that the run may take, as it was written and in seconds.
    image_root, image_key, captions: as in data.train, for raw data and for shards with their captions
    elsewhere. A few real steps are measured on a sample. Raises ConfigError and DataError.
    """
    with tempfile.TemporaryDirectory(prefix="clipkit-init-") as name:
        folder = Path(name)
        source, facts = _look(data, image_root, image_key, captions, folder, progress)
        progress("looking at the machine", 0, 1)
        machine = look_at_machine()
        chosen = choose_model(facts, machine) if model is None else continue_model(model, facts)
        pace = _paced(folder, facts, chosen, machine, progress)
    seen = seen_samples(facts, chosen, pace, budget_s)
    section = plan_data(source, facts, chosen, machine, pace, seen)
    batch = section["batch_size"][0]
    run, samples = plan_run(facts, chosen, machine, pace, seen, batch, budget)
    optim = plan_optimizer(chosen, batch, samples // batch)
    sections: dict[str, Section] = {"model": chosen.values, "data": section, "optim": optim, "run": run}
    text = "\n".join(_lines(data, facts, chosen, sections)) + "\n"
    # As whoever reads the file will: what is proposed must be a configuration.
    make_config(parse_text(text, "the proposal").tree)
    return Proposal(text, _rows(facts, chosen, machine, pace))


def _look(
    data: str,
    image_root: str | None,
    image_key: str | None,
    captions: tuple[str, ...],
    folder: Path,
    progress: Progress,
) -> tuple[Any, DataFacts]:
    """Copies a sample into `folder`; returns what data.train will say, and what was found."""
    path = raw_path(data)
    if path is not None:
        names = captions or (FOUND,)
        root = None if image_root is None else Path(image_root)
        with in_words(_OPTIONS):
            sampled = copy_raw(planned(Raw(path, root, image_key, names)), folder, progress)
    elif image_root is not None or image_key is not None:
        raise ConfigError(f"{data}: shards hold their images", "leave --image-root and --image-key out")
    else:
        sampled = copy_shards(data, folder, progress)
        sampled.captions = captions
    facts = survey(folder, sampled, data)
    entry: dict[str, Any] = {"shards": data}
    for key, value in (("image_root", image_root), ("image_key", image_key)):
        if value is not None:
            entry[key] = value
    named = captions if path is not None else facts.captions
    if named and named != (FOUND,):
        entry["captions"] = [{"field": name} for name in named]
    return (data if len(entry) == 1 else [entry]), facts


def _paced(folder: Path, facts: DataFacts, chosen: Chosen, machine: Machine, progress: Progress) -> Pace:
    """Measures real steps on the sample with two sizes of batches: the difference is what samples take."""
    section = {key: value for key, (value, _) in chosen.values.items()}
    # Weights change nothing of the speed, and may have to be fetched.
    section.pop("init", None)
    usable = facts.looked - facts.unusable.total()
    if usable < 2:
        raise DataError(f"{usable} usable pair(s): nothing to contrast", "give at least two pairs")
    rows = min(_MEASURED_BATCH[machine.device], power_of_two(usable))
    fewer = max(2, rows // 4)
    speeds = []
    for number, batch in enumerate((fewer, rows)):
        progress("measuring steps", number, 2)
        values = {
            "model": section,
            "data": {
                "train": [
                    {"shards": str(folder), "captions": [{"field": name} for name in facts.captions[:1]]}
                ],
                "batch_size": batch,
                "workers": 0,
                "max_reject_fraction": 1.0,
            },
            "run": {"steps": 8, "precision": machine.precision, "dir": str(folder / "run")},
            "optim": {"warmup": 0},
        }
        speeds.append(measure(values))
    small, large = speeds
    if small is None:
        raise ConfigError(
            f"the model does not fit into the memory of this {machine.name}", "name a smaller one with --from"
        )
    return Pace(small, large if rows > fewer else None)


def _lines(data: str, facts: DataFacts, chosen: Chosen, sections: dict[str, Section]) -> Iterator[str]:
    """The text of the run file: every value with its reason beside it."""
    yield visible(
        f"# Proposed by `clipkit init` for {data}: {facts.looked:,} pairs looked at, steps measured."
    )
    yield "# Start: clipkit pretrain THIS_FILE (with --dry-run first to see what it costs)."
    for name, section in sections.items():
        yield f"{name}:"
        for key, (value, reason) in section.items():
            line = f"  {key}: {flow_yaml(value)}"
            comment = f"# {visible(reason)}"
            if len(line) + len(comment) > _WIDTH:
                yield f"  {comment}"
                yield line
            else:
                yield f"{line}  {comment}"
        if name == "model":
            yield "objectives:"
            entry, reason = chosen.objective
            yield f"  - {flow_yaml(entry)}  # {reason}"


def _rows(facts: DataFacts, chosen: Chosen, machine: Machine, pace: Pace) -> list[tuple[str, str]]:
    how = "counted" if facts.exact else "estimated from sizes"
    distinct, compared = facts.distinct
    rows = [
        ("pairs", f"{facts.pairs:,} ({how}); {facts.looked:,} looked at"),
        ("distinct captions", f"{distinct:,} of {compared:,} compared"),
    ]
    for name, field in facts.fields.items():
        if name not in facts.captions and (name == CAPTIONS or at(field.words, 0.5) < 2):
            continue  # the list repeats the text member; single words are categories and addresses
        mark = "" if name in facts.captions else " (not used)"
        rows.append((f"captions {name}{mark}", _about_captions(field, chosen.tokens)))
    sides = f"{at(facts.sides, 0.05)} / {at(facts.sides, 0.5)} / {at(facts.sides, 0.95)}"
    rows.append(("images", f"shorter side 5 / 50 / 95 %: {sides} pixels; {_shares(facts.formats)}"))
    if facts.unusable:
        rows.append(("unusable", ", ".join(f"{n:,} {reason}" for reason, n in facts.unusable.most_common())))
    memory = "unknown" if machine.memory is None else f"{machine.memory / 1e9:.1f} GB"
    rows.append(
        ("machine", f"{machine.name}, {memory}, {machine.processors} processor(s), {machine.precision}")
    )
    rows.append(("speed", f"{pace.samples_per_s:,.0f} samples/s measured with the proposed model"))
    return rows


def _about_captions(field: FieldFacts, context: int) -> str:
    words, tokens = ((at(counts, 0.5), at(counts, 0.99)) for counts in (field.words, field.tokens))
    return (
        f"in {field.present:,}; {words[0]} words (99 %: {words[1]}), {tokens[0]} tokens (99 %: {tokens[1]}); "
        f"{field.longer(context):.1%} cut at {context}; {_shares(field.scripts())}"
    )


def _shares(counts: Any) -> str:
    total = max(1, sum(counts.values()))
    return ", ".join(f"{name} {count / total:.0%}" for name, count in counts.most_common(3))
