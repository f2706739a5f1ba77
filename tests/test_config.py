"""A configuration is complete and checked, or refused with every problem, its place and its cure."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.config import (
    Config,
    ConfigErrors,
    check_schedule,
    load_config,
    make_config,
    parse_interval,
    read_values,
)
from clipkit.config.reading import MAX_BYTES, dump_yaml, parse_text
from clipkit.types import ConfigError

MINIMAL = """\
model: ViT-B-32
data: {train: "shards/{00..03}.tar", batch_size: 256}
run: {epochs: 2}
"""


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path, *overrides: str) -> list[tuple[str, str]]:
    with pytest.raises(ConfigErrors) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.cause
    assert "\n" not in caught.value.cure
    return [(str(problem), problem.cure) for problem in caught.value.problems]


def config(**sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "model": {"name": "ViT-B-32"},
        "data": {"train": "x.tar", "batch_size": 256},
        "run": {"epochs": 2},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return make_config(values)


# ---- what is accepted


def test_the_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    found = load_config(written(tmp_path, MINIMAL))
    assert [(o.name, o.weight, o.options) for o in found.objectives] == [("clip", 1.0, {})]
    assert found.optim.betas == (0.9, 0.98)
    assert (found.optim.eps, found.optim.weight_decay, found.optim.clip_norm) == (1e-6, 0.2, 1.0)
    assert (found.optim.warmup, found.optim.schedule) == ("5%", "cosine")
    assert found.learning_rate == 1e-3
    assert config(data={"batch_size": 32768}).learning_rate == 5e-4
    assert found.run.dir == "runs/run"
    assert found.data.train[0].shards == "shards/{00..03}.tar"
    assert found.data.train[0].captions[0].field == "txt"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("5_000", 5000),
        ("010", 10),
        ("12:30", "12:30"),
        ("2024-01-31", "2024-01-31"),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'3e-4'", "3e-4"),
        ("30min", "30min"),
        ("5%", "5%"),
        ("1.2.3", "1.2.3"),
        ("0x1f", "0x1f"),
    ],
)
def test_scalars_mean_what_a_reader_expects(text: str, value: Any) -> None:
    found = parse_text(f"key: {text}", "a.yaml").tree["key"]
    assert found == value
    assert type(found) is type(value)


def test_counts_may_be_written_as_floats_and_numbers_with_exponents(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL.replace("epochs: 2", "samples: 12.8e9").replace("256", "32_768"))
    found = load_config(path, ["optim.lr=3e-4"])
    assert found.run.samples == 12_800_000_000
    assert type(found.run.samples) is int
    assert found.data.batch_size == 32768
    assert found.optim.lr == 3e-4
    assert found.total_steps(steps_per_epoch=7) == 12_800_000_000 // 32768


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(
        st.characters(
            codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\ufeff\x85"
        )
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=10,
)


@given(plain)
def test_what_is_written_reads_back_as_the_same_value(value: Any) -> None:
    assert parse_text(dump_yaml({"key": value}), "a.yaml").tree["key"] == value


def test_the_resolved_dump_loads_to_the_same_configuration(tmp_path: Path) -> None:
    first = load_config(
        written(tmp_path, MINIMAL),
        ["objectives.0.weight=0.5", "objectives.1={name: siglip, beta: 3e-4}", "optim.clip_norm=null"],
    )
    again = load_config(written(tmp_path, first.dump(), "resolved.yaml"))
    assert again == first
    assert again.objectives[1].options == {"beta": 3e-4}
    assert again.optim.clip_norm is None
    assert first.differences(read_values(tmp_path / "resolved.yaml").tree) == []


def test_an_inline_model_is_handed_on_as_written(tiny_model_cfg: dict[str, Any]) -> None:
    found = make_config(
        {"model": tiny_model_cfg, "data": {"train": "x", "batch_size": 8}, "run": {"steps": 4}}
    )
    assert found.model.spec == tiny_model_cfg
    assert config().model.spec == "ViT-B-32"


def test_a_configuration_is_immutable_and_travels_between_processes() -> None:
    found = config()
    with pytest.raises(ValueError, match="frozen"):
        found.data.batch_size = 1  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(found)) == found


def test_a_source_names_its_caption_fields(tmp_path: Path) -> None:
    spec = "{shards: a.tar, missing: reject, captions: [txt, {field: json.re, weight: 3}]}"
    (source,) = load_config(written(tmp_path, MINIMAL), [f"data.train=[{spec}]"]).data.train
    assert source.missing == "reject"
    assert [(c.field, c.weight, c.lines) for c in source.captions] == [
        ("txt", 1.0, False),
        ("json.re", 3.0, False),
    ]
    lines = load_config(written(tmp_path, MINIMAL), ["data.train.0.captions=[{field: txt, lines: true}]"])
    assert lines.data.train[0].captions[0].lines
    assert lines.data.train[0].missing == "fallback"
    named = {"shards": "a.tar", "captions": "json.caption"}
    assert config(data={"train": [named]}).data.train[0].captions[0].field == "json.caption"


# ---- layers


def test_later_layers_win_and_mappings_merge(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    written(tmp_path / "base", MINIMAL + "optim: {lr: 1e-3, eps: 1e-8}\nobjectives: [siglip]\n", "base.yaml")
    path = written(tmp_path, "extends: base/base.yaml\noptim: {lr: 2e-3}\nrun: {steps: 500}\n")
    found = load_config(path, ["optim.lr=5e-3", "data.workers=0", "model.image.freeze=trunk"])
    assert (found.optim.lr, found.optim.eps, found.data.workers) == (5e-3, 1e-8, 0)
    assert found.objectives[0].name == "siglip"
    assert (found.model.name, found.model.image.freeze) == ("ViT-B-32", "trunk")
    # The length of a run is one choice: the later layer replaces it, it does not conflict with it.
    assert (found.run.steps, found.run.epochs) == (500, None)
    assert load_config(path, ["run.samples=1e6"]).run.steps is None


def test_a_model_of_a_later_layer_replaces_the_other_kind(
    tmp_path: Path, tiny_model_cfg: dict[str, Any]
) -> None:
    written(tmp_path, MINIMAL, "base.yaml")
    path = written(tmp_path, "extends: base.yaml\n" + dump_yaml({"model": tiny_model_cfg}))
    assert load_config(path).model.spec == tiny_model_cfg
    assert load_config(path, ["model=RN50"]).model.spec == "RN50"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.train=*.tar", "*.tar"),
        ("data.train={00..12}.tar", "{00..12}.tar"),
        ("data.train=a,b.tar", "a,b.tar"),
        ("data.train.0.shards=[a.tar, b.tar]", ("a.tar", "b.tar")),
        ("data.train.0.shards=['my #1/a.tar', \"b: c.tar\"]", ("my #1/a.tar", "b: c.tar")),
        ("data.train=/data/my #1/{0..3}.tar", "/data/my #1/{0..3}.tar"),
        ("data.train=/data/{a,b} #1/x.tar", "/data/{a,b} #1/x.tar"),
        ("data.train=/data/a: b/x.tar", "/data/a: b/x.tar"),
        ("data.train='/data/a: b #1/x.tar'", "/data/a: b #1/x.tar"),
        ("data.train=[{shards: x.tar}]", "x.tar"),
    ],
)
def test_shard_patterns_need_no_second_quoting(tmp_path: Path, override: str, value: Any) -> None:
    assert load_config(written(tmp_path, MINIMAL), [override]).data.train[0].shards == value


@pytest.mark.parametrize(
    ("override", "cause"),
    [
        ("optim.lr", "written key=value"),
        ("=3", "written key=value"),
        ("objectives.4.weight=1", "no position"),
        ("data.batch_size.x=1", "has no 'x' below it"),
        ("run.steps=abc", "run.steps: expected a whole number, not 'abc'"),
        ("run.stepz=4", "unknown key run.stepz"),
    ],
)
def test_bad_overrides_are_named(tmp_path: Path, override: str, cause: str) -> None:
    ((found, _),) = refused(written(tmp_path, MINIMAL), override)
    assert cause in found
    assert f"override {override!r}" in found


# ---- what is refused


@pytest.mark.parametrize(
    ("section", "line", "cause", "cure"),
    [
        (
            "optim",
            "learning_rte: 1e-3",
            "unknown key optim.learning_rte (value 0.001)",
            "did you mean optim.lr?",
        ),
        (
            "optim",
            "weight_deacy: 1",
            "unknown key optim.weight_deacy (value 1)",
            "did you mean optim.weight_decay?",
        ),
        ("optim", "workers: 3", "unknown key optim.workers (value 3)", "did you mean data.workers?"),
        ("optim", "zzz: 3", "unknown key optim.zzz (value 3)", "remove it; optim has lr, "),
        ("optim", "lr: '1e-3'", "optim.lr: expected a number, not '1e-3'", "set optim.lr to a number"),
        ("optim", "lr: -1", "optim.lr: expected a number above 0, not -1", "a number above 0"),
        ("optim", "lr: .nan", "optim.lr: expected a finite number", "finite"),
        ("optim", "eps: true", "optim.eps: expected a number, not True", "a number"),
        ("optim", "betas: 0.9", "optim.betas: expected a list, not 0.9", "a list"),
        ("optim", "betas: [0.9]", "optim.betas has too few entries", "at least 2"),
        ("optim", "betas: [0.9, 1.5]", "a beta outside [0, 1)", "[0.9, 0.98]"),
        ("optim", "schedule: cosin", "expected cosine or constant, not 'cosin'", "cosine or constant"),
        ("optim", "warmup: 30%", "warm-up over 25% of the run", "up to 25%"),
        ("optim", "warmup: 10min", "expected a number of steps or a share", "up to 25%"),
        ("model", "name: ''", "model.name: expected a text that is not empty", "not empty"),
        (
            "model",
            "image: {freeze: head}",
            "expected false, true, trunk or all, not 'head'",
            "true means trunk",
        ),
        ("model", "embed_dim: 4\n  name: x", "both a name and an inline model_cfg", "keep one"),
        ("model", "embed_dim: 4", "vision_cfg, text_cfg missing", "ViT-B-32"),
        ("run", "steps: 4\n  epochs: 3", "found epochs and steps", "keep one"),
        ("run", "seed: 0", "found none of them", "keep one"),
        ("run", "steps: 4.5", "run.steps: expected a whole number, not 4.5", "whole number"),
        ("run", "steps: 4\n  checkpoint_every: 4 weeks", "the unit of '4 weeks' is none of", "30min"),
        ("run", "steps: 4\n  weight_ema: 2.0", "a decay between 0 and 1", "auto"),
        ("run", "steps: 4\n  world_size: 3", "does not divide data.batch_size 256", "multiple"),
        ("run", "samples: 100", "less than one batch of 256", "at least 256"),
        (
            "run",
            "steps: 4\n  evaluate: [{task: zero, data: d}]",
            "expected zeroshot, retrieval or probe",
            "zeroshot",
        ),
        ("run", "steps: 100\n  precision: fp64", "expected fp32, bf16 or fp16", "fp32"),
        ("data", "batch_size: '256'", "expected a whole number, not '256'", "whole number"),
        ("data", "batch_size: 0", "expected a number above 0, not 0", "above 0"),
        ("data", "batch_size: 8\n  micro_batch: 16", "micro_batch 16 exceeds batch_size 8", "global"),
        ("data", "batch_size: 8\n  lanes: 3", "lanes 3 does not divide batch_size 8", "divisor"),
        ("data", "batch_size: 8\n  crop_scale: [0.9, 0.5]", "not a range of areas", "0 < low <= high <= 1"),
        ("data", "batch_size: 8\n  train: 7", "data.train", "list"),
        (
            "data",
            "batch_size: 8\n  train: [{shards: a, name: c}, {shards: b, name: c}]",
            "two sources are called c",
            "a name of its own",
        ),
        ("data", "batch_size: 8\n  train: [{shards: a, weight: 0}]", "expected a number above 0", "above 0"),
        *(
            ("data", f"batch_size: 8\n  train: [{{shards: a, {entry}}}]", cause, cure)
            for entry, cause, cure in (
                ("captions: []", "captions", "a longer list"),
                ("captions: [txt, txt]", "the field txt is named twice", "larger weight"),
                ("captions: [{field: txt, weight: 0}]", "expected a number above 0", "above 0"),
                ("captions: 7", "captions", "list"),
                ("missing: skip", "expected fallback or reject, not 'skip'", "fallback"),
            )
        ),
    ],
)
def test_one_wrong_line_is_named_with_its_cure(
    tmp_path: Path, section: str, line: str, cause: str, cure: str
) -> None:
    sections = {"model": "name: ViT-B-32", "data": "batch_size: 256", "optim": "lr: 1e-3", "run": "epochs: 2"}
    sections[section] = line
    if "train" not in sections["data"]:
        sections["data"] += "\n  train: x.tar"
    path = written(tmp_path, "".join(f"{key}:\n  {body}\n" for key, body in sections.items()))
    ((found, help_line),) = refused(path)
    assert found.startswith(f"{path}:")
    assert cause in found
    assert cure in help_line


def test_all_problems_come_at_once_each_with_its_line(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "model: {nme: ViT-B-32}\ndata:\n  train: x\n  batch_size: '256'\n"
        "run:\n  epochs: 1\n  steps: 1\n  sed: 2\nxx: 4\n",
    )
    found = [cause.removeprefix(f"{path}:") for cause, _ in refused(path, "optim.eps=no")]
    starts = ["1: unknown key model.nme", "4: data.batch_size", "8: unknown key run.sed", "9: unknown key xx"]
    starts += ["1: model: neither a name", "5: run: exactly one of", "override 'optim.eps=no': optim.eps"]
    assert len(found) == len(starts)
    for start in starts:
        assert any(cause.startswith(start) for cause in found), (start, found)


def test_a_problem_of_the_extended_file_names_that_file(tmp_path: Path) -> None:
    base = written(tmp_path, MINIMAL + "optim:\n  lrr: 1\n", "base.yaml")
    ((found, _),) = refused(written(tmp_path, "extends: base.yaml\n"))
    assert found.startswith(f"{base}:5: unknown key optim.lrr")


def test_files_that_cannot_be_a_configuration(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path / "absent.yaml")[0][0]
    assert "cannot be read" in refused(tmp_path)[0][0]
    assert "larger than" in refused(written(tmp_path, "#" * (MAX_BYTES + 1)))[0][0]
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused(tmp_path / "binary.yaml")[0][0]
    assert {cause.split(": ")[1] for cause, _ in refused(written(tmp_path, ""))} == {
        "model is missing",
        "data is missing",
        "run is missing",
    }


def test_extends_goes_one_level(tmp_path: Path) -> None:
    written(tmp_path, MINIMAL, "a.yaml")
    written(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert "extends another file itself" in refused(written(tmp_path, "extends: b.yaml\n"))[0][0]
    assert "absent.yaml: cannot be read" in refused(written(tmp_path, "extends: absent.yaml\n"))[0][0]
    assert "extends is 3" in refused(written(tmp_path, "extends: 3\n"))[0][0]


def test_an_error_travels_between_processes(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors) as caught:
        load_config(written(tmp_path, "zz: 1\n"))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.cause, again.cure, again.problems) == (
        caught.value.cause,
        caught.value.cure,
        caught.value.problems,
    )


# ---- continuing a run


def test_differences_name_what_forbids_continuing() -> None:
    ours = config()
    assert ours.differences(config(data={"workers": 0, "micro_batch": 16, "max_reject_fraction": 0.5})) == []
    assert ours.differences(config(run={"precision": "bf16", "checkpoint_every": "1h", "dir": "y"})) == []
    for section in (
        {"data": {"batch_size": 128}},
        {"data": {"train": "y.tar"}},
        {"optim": {"warmup": 10}},
        {"run": {"seed": 1}},
        {"run": {"epochs": 3}},
        {"model": {"name": "RN50"}},
    ):
        (difference,) = ours.differences(config(**section))
        ((name, values),) = section.items()
        assert difference.startswith(f"{name}.{next(iter(values))}")
    # Runs that were begun when a source had neither of these keys go on.
    before = ours.values()
    (source,) = before["data"]["train"]
    del source["missing"], source["captions"][0]["lines"]
    assert ours.differences(before) == []
    source["missing"] = "reject"
    assert [line.split(":")[0] for line in ours.differences(before)] == ["data.train.0.missing"]


def test_secrets_of_urls_are_in_no_dump_and_no_message(tmp_path: Path) -> None:
    url = "https://me:TOKEN@host/x.tar?sig=TOKEN"
    path = written(tmp_path, MINIMAL, "a.yaml")
    found = load_config(path, [f"data.train={url}"])
    assert "TOKEN" in str(found.data.train)
    assert "TOKEN" not in found.dump()
    assert found.differences(found) == []
    for override in (f"data.trainn={url}", f"data.batch_size={url}"):
        assert "TOKEN" not in str(refused(path, override))


# ---- schedules


@pytest.mark.parametrize(
    ("text", "steps", "seconds", "fraction"),
    [
        (500, 500, None, None),
        ("500", 500, None, None),
        ("90s", None, 90.0, None),
        ("30min", None, 1800.0, None),
        ("1.5 h", None, 5400.0, None),
        ("2d", None, 172800.0, None),
        ("5%", None, None, 0.05),
        ("100%", None, None, 1.0),
        ("1epoch", None, None, None),
        ("0.5 epochs", None, None, None),
    ],
)
def test_intervals(text: Any, steps: int | None, seconds: float | None, fraction: float | None) -> None:
    found = parse_interval(text)
    assert (found.steps, found.seconds, found.fraction) == (steps, seconds, fraction)
    assert found.epochs == ({"1epoch": 1.0, "0.5 epochs": 0.5}.get(text) if isinstance(text, str) else None)


@pytest.mark.parametrize("epochs", [0.1, 0.3, 1, 1.5, 7])
@pytest.mark.parametrize("per_epoch", [1, 3, 10, 96])
def test_epochs_are_due_where_a_multiple_of_them_is_reached(epochs: float, per_epoch: int) -> None:
    """By fractions, which have no rounding: the first step at or behind each multiple, once."""
    interval, total = parse_interval(f"{epochs}epochs"), 5 * per_epoch
    due = [step for step in range(1, total + 1) if interval.due(step, total, 0.0, per_epoch)]
    period = Fraction(str(epochs)) * per_epoch
    assert due == sorted({math.ceil(period * count) for count in range(1, int(total / period) + 1)})
    assert not interval.due(per_epoch, total)


def test_epochs_need_a_length() -> None:
    for key in ("checkpoint_every", "evaluate_every"):
        length = {"epochs": None, "steps": 500, key: "2epochs"}
        with pytest.raises(ConfigError, match=f"run.{key} 2epochs needs the length of an epoch"):
            config(data={"index": "lazy"}, run=length)
        assert getattr(config(run=length).run, key) == "2epochs"
    with pytest.raises(ConfigError, match="a number of steps or a share"):
        config(optim={"warmup": "1epoch"})


@pytest.mark.parametrize(
    "text", [0, -1, True, 1.5, "", "0%", "101%", "5 %%", "1.5", "min", "1e3", "5 weeks", "-3h"]
)
def test_what_is_no_interval(text: Any) -> None:
    with pytest.raises(ValueError, match=r"interval|expected|share|unit|whole"):
        parse_interval(text)


@given(st.integers(1, 100), st.integers(1, 500))
def test_a_share_of_the_run_comes_due_evenly_and_at_the_end(percent: int, total: int) -> None:
    interval = parse_interval(f"{percent}%")
    due = [step for step in range(1, total + 1) if interval.due(step, total)]
    # Never more often than once a step, otherwise as often as the share says.
    assert len(due) == min(total, 100 // percent)
    if 100 % percent == 0:
        assert due[-1] == total


def test_steps_and_wall_time_come_due() -> None:
    assert [step for step in range(1, 13) if parse_interval(4).due(step, 12)] == [4, 8, 12]
    assert [parse_interval("1min").due(1, 10, seconds) for seconds in (59.9, 60.0)] == [False, True]


def test_a_schedule_that_cannot_work_is_refused_and_a_poor_one_explained() -> None:
    with pytest.raises(ConfigError, match="over 25% of the run of 100 steps") as caught:
        check_schedule(config(optim={"warmup": 30}), 100)
    assert "at most 25" in caught.value.cure
    with pytest.raises(ConfigErrors, match="over 25%"):
        config(optim={"warmup": 30}, run={"epochs": None, "steps": 100})
    with pytest.raises(ConfigError, match="no step"):
        check_schedule(config(), 0)
    assert check_schedule(config(optim={"warmup": 25}), 6000) == []
    few, small = check_schedule(config(data={"batch_size": 64}), 100)[::-1]
    assert "fewer than 5,000" in few
    assert "below 256" in small
    assert config(optim={"warmup": 0}).warmup_steps(100) == 0
    assert config().warmup_steps(1000) == 50


@pytest.mark.parametrize("text", ["a: &a [*a]\n", "a: &a {b: *a}\n", "a: &a\n  - {b: [*a]}\n"])
def test_an_alias_inside_its_own_anchor_is_refused(tmp_path: Path, text: str) -> None:
    ((found, _),) = refused(written(tmp_path, text))
    assert "nested more than 32 deep" in found
