"""What a reshard must not do: touch the work of others, mix up samples or states, write what is no JSON."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from clipkit.data.engine import Engine
from clipkit.data.key_table import TableSpec, build_key_table
from clipkit.data.making.collection import Reading
from clipkit.data.making.tables import read_table
from clipkit.data.reshard import Reshard, Resharding, input_shards, named
from clipkit.data.tables import jsonable
from clipkit.types import ConfigError, DataError
from tests.data.makers import write_tar
from tests.data.test_reshard import datacomp, numbers, read, run, sample, uid, write_csv, write_inputs


def test_shards_put_where_a_finished_job_was_are_not_replaced(tmp_path: Path) -> None:
    inputs, out = write_inputs(tmp_path / "in", [3]), tmp_path / "out"
    run(out, inputs)
    for number in range(3):
        (out / f"{number:05d}.tar").write_bytes(b"of someone else")
    with pytest.raises(ConfigError, match="not what this command wrote"):
        run(out, inputs)
    assert {path.read_bytes() for path in out.glob("*.tar")} == {b"of someone else"}
    run(out, inputs, overwrite=True)
    assert sorted(read(out)) == sorted(read(inputs))


def test_a_second_job_of_a_process_reads_the_inputs_as_they_are_then(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", [3])
    run(tmp_path / "first", inputs)
    (inputs / "00000.tar").rename(tmp_path / "before.tar")
    write_tar(inputs / "00000.tar", [sample(90 + n, f"{n:09d}") for n in range(3)])
    run(tmp_path / "second", inputs)
    assert sorted(read(tmp_path / "second")) == sorted(read(inputs))


def test_a_link_to_a_shard_in_the_output_folder_is_refused(tmp_path: Path) -> None:
    out, links = write_inputs(tmp_path / "out", [3]), tmp_path / "links"
    links.mkdir()
    (links / "a.tar").symlink_to(out / "00000.tar")
    with pytest.raises(ConfigError, match="would be replaced"):
        run(out, links, overwrite=True)


def test_a_key_that_a_renamed_one_meets_names_the_cure(tmp_path: Path) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    for name, keys in (("0.tar", ("a", "00001-a")), ("1.tar", ("a", "c"))):
        write_tar(inputs / name, [sample(n, key) for n, key in enumerate(keys)])
    with pytest.raises(DataError, match="occurs twice") as caught:
        run(tmp_path / "out", inputs)
    assert "--rekey" in caught.value.cure
    run(tmp_path / "out", inputs, rekey=True)
    assert len(read(tmp_path / "out")) == 4


def test_numbers_that_json_cannot_hold_do_not_get_into_it(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("key,v,w\na,1e999,1e99\nb,2,2\n", encoding="utf-8")
    table = build_key_table(TableSpec(tmp_path / "t.csv"), tmp_path / "stem", True)
    assert table.find("a") == {"v": "1e999", "w": 1e99}


def test_a_decimal_column_holds_numbers_whichever_job_reads_it(tmp_path: Path) -> None:
    given = ("1.50", "19.99", "12345678901234567890", "NaN", "-Infinity", "1e999")
    numbers = [1.5, 19.99, 12345678901234567890, None, None, None]
    assert [jsonable(Decimal(each)) for each in given] == numbers
    with pytest.raises(ConfigError, match="bytes"):
        jsonable([b"x"])
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    prices = pyarrow.array([Decimal("19.99"), None], pyarrow.decimal128(10, 2))
    columns = {"key": ["a", "b"], "image": ["a.jpg", "b.jpg"], "caption": ["a", "b"], "price": prices}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    joined = build_key_table(TableSpec(tmp_path / "t.parquet", None, ("price",)), tmp_path / "stem", True)
    made = read_table(tmp_path / "t.parquet", Reading(images=tmp_path, keep=("price",))).entries()
    assert [joined.find(key) for key in "ab"] == [entry.fields for entry in made]
    assert joined.find("a") == {"price": 19.99}


def test_a_list_of_shards_and_keys_means_the_samples_of_those_shards(tmp_path: Path) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    for shard in range(2):
        write_tar(inputs / f"{shard:05d}.tar", [sample(10 * shard + n, f"{n}") for n in range(3)])
    (tmp_path / "names.csv").write_text("shard,key\n00000.tar,0\n00001.tar,1\n", encoding="utf-8")
    run(tmp_path / "names", inputs, subset=tmp_path / "names.csv")
    assert sorted(numbers(tmp_path / "names")) == [0, 11]
    # As lists say it when two shards have one name.
    (tmp_path / "paths.csv").write_text(f"shard,key\n{inputs}/00001.tar,2\n", encoding="utf-8")
    run(tmp_path / "paths", inputs, subset=tmp_path / "paths.csv")
    assert numbers(tmp_path / "paths") == [12]
    (tmp_path / "keys.csv").write_text("key\n0\n", encoding="utf-8")
    _, counts = run(tmp_path / "keys", inputs, subset=tmp_path / "keys.csv", rekey=True)
    assert sorted(numbers(tmp_path / "keys")) == [0, 10]
    assert counts["keys of the subset that several samples have"] == 1


def test_keys_that_name_no_sample_are_counted_and_the_first_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named, "_BLOCK", 2)
    inputs = write_inputs(tmp_path / "in", [20, 30])
    wrong = [f"x{n}" for n in range(5)]

    def unnamed(name: str, subset: Path | None = None, **options: Any) -> tuple[int, tuple[str, ...]]:
        job = Reshard(input_shards([str(inputs)]), tmp_path / name, subset=subset, **options)
        with Resharding(job, Engine(1), lambda *_: None) as work:
            work.begin()
            plan = work.plan()
        (kind,) = (kind for kind, first in plan.examples.items() if first)
        return plan.counts[kind], plan.examples[kind]

    # A sample that a condition leaves out is one all the same; a key on two rows is one key.
    keys = [wrong[4], *(f"{n:09d}" for n in range(40)), *wrong, wrong[1], f"{3:09d}"]
    listed = write_csv(tmp_path / "keys.csv", [["key"], *([key] for key in keys)])
    assert unnamed("keys", listed, where="json.width < 110") == (5, ("x4", "x0", "x1"))
    rows = [["00000.tar", "000000003"], ["00001.tar", "000000003"], [str(inputs / "00001.tar"), "000000025"]]
    by_shard = write_csv(tmp_path / "shards.csv", [["shard", "key"], *rows])
    assert unnamed("shards", by_shard) == (1, ("00001.tar, 000000003",))
    uids = [*map(uid, range(45)), "0" * 32, "f" * 32, "f" * 32, "e" * 31 + "f", uid(4)]
    found = unnamed("uids", datacomp(tmp_path / "ids.npy", uids), where="json.width < 110")
    assert found == (4, ("0" * 32, "e" * 31 + "f", "f" * 32))
    table = write_csv(tmp_path / "new.csv", [["key", "v"], *([key, 1] for key in dict.fromkeys(keys))])
    assert unnamed("fields", fields=table) == (5, ("x4", "x0", "x1"))
    only = write_csv(tmp_path / "wrong.csv", [["key"], *([key] for key in wrong)])
    with pytest.raises(DataError, match=r"no key of it is that of a sample \(first: x0, x1, x2; 50 samples"):
        unnamed("none", only)


def test_a_group_that_no_sample_has_is_no_split(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", [9])
    with pytest.raises(DataError, match=r"none of 9 samples has json\.nope"):
        run(tmp_path / "out", inputs, split=(0.5, 0.5), group="json.nope")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"key": "uid"}, "--key without a table"),
        ({"match": "json.uid"}, "--match without a table"),
        ({"subset": Path("nowhere.npy")}, "nowhere.npy: no such file"),
        ({"fields": Path("nowhere.csv")}, "nowhere.csv: no such file"),
    ],
)
def test_options_of_tables_without_one_are_refused(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    inputs = write_inputs(tmp_path / "in", [3])
    with pytest.raises(ConfigError, match=said):
        run(tmp_path / "out", inputs, **options)
    assert not (tmp_path / "out").exists()
