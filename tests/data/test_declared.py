"""Declared views, labels and stored vectors in a stream: built once, in every split the same, or refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipkit.data.loader import LoaderOptions, Source, TrainStream, open_train
from clipkit.data.rows import slot_seeds
from clipkit.data.targets import caption_label
from clipkit.data.text import text_view
from clipkit.data.views import image_view
from clipkit.dist import World
from clipkit.types import Batch, ConfigError, DataError, View
from tests.data.makers import ByteTokenizer, Members, npy, png, same, take, write_tar

CFG = {"size": 16}
WORDS = ("small", "dog", "car", "street", "boy", "photo", "happy", "big")
TOKENIZER = ByteTokenizer(48)
OTHER_TOKENIZER = ByteTokenizer(32)

SIMCLR = [View(f"simclr:{n}", "image", "simclr", n) for n in range(2)]
EDA = [View(f"eda:{n}", "text", "eda", n) for n in range(2)]
SIMCSE = [View(f"dropout:{n}", "text", "dropout", n) for n in range(2)]
PLAIN = [View("image", "image"), View("text", "text")]
HARD = [View(f"hard_{n}", "text", index=n, field="json.hard", optional=True) for n in range(2)]
ALL = [*PLAIN, *SIMCLR, *EDA, *SIMCSE, *HARD, View("image@big", "image"), View("text@big", "text")]
LABELS = ("caption", "cls", "json.category")
STORED = ("teacher_image.npy",)


def full(number: int) -> Members:
    """A sample with every member; captions repeat every 12 samples, hard ones are partly absent."""
    text = f"a {WORDS[number % 4]} and a {WORDS[4 + number % 3]} walking near the water"
    document: dict[str, Any] = {"category": f"kind {number % 5}"}
    if number % 3:
        document["hard"] = [f"hard {number}", f"harder {number}"][: number % 3]
    key = f"{number:06d}"
    return [
        (f"{key}.png", png(number, 24)),
        (f"{key}.txt", text.encode()),
        (f"{key}.cls", str(number % 7).encode()),
        (f"{key}.json", json.dumps(document).encode()),
        (f"{key}.teacher_image.npy", npy(np.full(6, number, np.float16))),
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 samples in three shards."""
    folder = tmp_path_factory.mktemp("full")
    for shard, numbers in enumerate([range(29), range(29, 40), range(40, 60)]):
        write_tar(folder / f"{shard}.tar", map(full, numbers))
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tar(tmp_path_factory.mktemp("packed") / "a.tar.gz", map(full, range(60)), "w:gz")


def opened(
    shards: Path,
    batch_size: int,
    views: Sequence[View],
    world: World | None = None,
    saved: Any = None,
    labels: Sequence[str] = (),
    stored: Sequence[str] = (),
    **options: Any,
) -> TrainStream:
    images = [
        image_view(view, CFG, size=(24, 24) if "@" in view.name else None, crop_scale=(0.3, 1.0))
        for view in views
        if view.tower == "image"
    ]
    texts = [
        text_view(view, OTHER_TOKENIZER, 32, 0)
        if "@" in view.name
        else text_view(view, TOKENIZER, 48, "argmax")
        for view in views
        if view.tower == "text"
    ]
    settings = LoaderOptions(Source(str(shards)), batch_size, 5, **options)
    return open_train(settings, images, texts, world or World(), saved=saved, labels=labels, stored=stored)


def everything(shards: Path, batch_size: int, world: World | None = None, **options: Any) -> TrainStream:
    return opened(shards, batch_size, ALL, world, labels=LABELS, stored=STORED, **options)


def joined(parts: Sequence[Sequence[Batch]]) -> list[Batch]:
    """Batches of all ranks in rank order; texts padded back to one length."""

    def cat(tensors: list[torch.Tensor], text: bool = False) -> torch.Tensor:
        width = max(x.shape[1] for x in tensors) if text else 0
        return torch.cat(
            [torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in tensors] if text else tensors
        )

    def one(batches: tuple[Batch, ...]) -> Batch:
        def part(name: str) -> dict[str, torch.Tensor]:
            found = [getattr(batch, name) for batch in batches]
            return {key: cat([entry[key] for entry in found], name == "texts") for key in found[0]}

        return Batch(
            **{name: part(name) for name in ("images", "texts", "stored", "labels", "present")},
            ids=cat([batch.ids for batch in batches]),
            slots=cat([batch.slots for batch in batches]),
            keys=sum((batch.keys for batch in batches), ()),
            rejects=sum((batch.rejects for batch in batches), ()),
        )

    return [one(batches) for batches in zip(*parts, strict=True)]


def words(tokens: torch.Tensor) -> list[str]:
    return [bytes(token for token in row.tolist() if 0 < token < 256).decode() for row in tokens]


def test_a_batch_holds_what_is_declared(shards: Path) -> None:
    stream = everything(shards, 12)
    assert stream.stored_widths == {"teacher_image.npy": 6}
    (batch,) = take(stream, 0, 1)
    assert not batch.rejects
    assert {name: x.shape[2] for name, x in batch.images.items()} == {
        "image": 16, "simclr:0": 16, "simclr:1": 16, "image@big": 24
    }  # fmt: skip
    assert set(batch.texts) == {view.name for view in ALL if view.tower == "text"}
    captions = words(batch.texts["text"])
    for row, number in enumerate(batch.ids.tolist()):
        members = dict(full(number))
        assert captions[row] == members[f"{number:06d}.txt"].decode()
        assert batch.labels["cls"][row] == number % 7
        assert batch.labels["caption"][row] == caption_label(captions[row])
        assert batch.stored["teacher_image.npy"][row].tolist() == [number] * 6
        assert batch.present["hard_0"][row] == (number % 3 > 0)
        assert batch.present["hard_1"][row] == (number % 3 > 1)
        expected = f"hard {number}" if number % 3 else "a"
        assert words(batch.texts["hard_0"])[row] == expected
    assert set(batch.present) == {"hard_0", "hard_1"}
    assert batch.stored["teacher_image.npy"].dtype == torch.float32
    assert batch.labels["caption"].dtype == batch.labels["json.category"].dtype == torch.int64
    kinds = dict(zip((batch.ids % 5).tolist(), batch.labels["json.category"].tolist(), strict=True))
    assert [kinds[number % 5] for number in batch.ids.tolist()] == batch.labels["json.category"].tolist()
    assert len(set(kinds.values())) == len(kinds) > 1
    assert not torch.equal(batch.images["simclr:0"], batch.images["simclr:1"])


def test_one_caption_is_tokenised_once(shards: Path) -> None:
    counts: list[int] = []
    stream = everything(shards, 12)

    class Counting(ByteTokenizer):
        def __call__(self, captions: list[str]) -> torch.Tensor:
            counts.append(len(captions))
            return super().__call__(captions)

    tokenizer = Counting(48)
    for view in stream._recipe.text_views:
        if view.context_length == 48:
            object.__setattr__(view, "tokenizer", tokenizer)
    (batch,) = take(stream, 0, 1)
    # text with both dropout views, two edited ones, two hard ones.
    assert counts == [12] * 5
    assert batch.texts["dropout:1"] is batch.texts["text"]
    assert batch.texts["text@big"].shape[1] == 32
    edited = [words(batch.texts[f"eda:{n}"]) for n in range(2)]
    plain = words(batch.texts["text"])
    assert len({*edited[0], *edited[1], *plain}) > 15
    assert all(text for text in edited[0] + edited[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_split_builds_the_same(shards: Path, workers: int) -> None:
    reference = take(everything(shards, 12), 0, 7)
    assert same(take(everything(shards, 12, workers=workers), 0, 7), reference)
    for size in (2, 3):
        parts = [
            take(everything(shards, 12, World(rank, size), workers=workers), 0, 7) for rank in range(size)
        ]
        assert same(joined(parts), reference)


def test_spawned_workers_share_texts_too(shards: Path) -> None:
    reference = take(everything(shards, 12), 0, 2)
    batches = take(everything(shards, 12, workers=2, start_method="spawn"), 0, 2)
    assert same(batches, reference)


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_is_exact(shards: Path, workers: int) -> None:
    whole = take(everything(shards, 14), 0, 9)
    state = everything(shards, 14).state(5)
    assert same(take(everything(shards, 14, saved=state, workers=workers), 5, 9), whole[5:])


def test_another_view_changes_nothing_else(shards: Path) -> None:
    """Adding views, labels or stored vectors leaves every pixel and token of the others as it was."""
    reference = take(opened(shards, 12, PLAIN), 0, 6)
    for views in ([*PLAIN, *SIMCLR], [*EDA, *SIMCLR, *PLAIN], ALL):
        for before, after in zip(
            reference, take(opened(shards, 12, views, labels=LABELS, stored=STORED), 0, 6), strict=True
        ):
            assert torch.equal(after.images["image"], before.images["image"])
            assert torch.equal(after.texts["text"], before.texts["text"])
            assert torch.equal(after.ids, before.ids)
    alone = take(opened(shards, 12, [SIMCLR[1], EDA[1]]), 0, 2)
    together = take(opened(shards, 12, ALL), 0, 2)
    for before, after in zip(alone, together, strict=True):
        assert torch.equal(after.images["simclr:1"], before.images["simclr:1"])
        assert torch.equal(after.texts["eda:1"], before.texts["eda:1"])


def test_a_plain_view_is_pixel_for_pixel_the_default_crop(shards: Path) -> None:
    """The declared view "image" draws what the loader has always drawn for it."""
    from clipkit.data.views import ImageView

    source = LoaderOptions(Source(str(shards)), 12, 5)
    old = open_train(source, [ImageView.from_preprocess(CFG, scale=(0.3, 1.0))], [], World())
    for before, after in zip(take(old, 0, 5), take(opened(shards, 12, ALL), 0, 5), strict=True):
        assert torch.equal(after.images["image"], before.images["image"])


def test_a_teacher_sees_the_same_crop_and_edit(shards: Path) -> None:
    views = [View("image", "image"), View("image@same", "image"), EDA[0], View("eda:0@big", "text", "eda")]
    images = [image_view(view, CFG, crop_scale=(0.1, 0.4)) for view in views[:2]]
    texts = [text_view(views[2], TOKENIZER, 48, None), text_view(views[3], ByteTokenizer(48), 48, None)]
    stream = open_train(LoaderOptions(Source(str(shards)), 12, 5), images, texts, World())
    (batch,) = take(stream, 0, 1)
    assert torch.equal(batch.images["image@same"], batch.images["image"])
    assert torch.equal(batch.texts["eda:0@big"], batch.texts["eda:0"])
    assert slot_seeds(1, 2, "eda:0@big", [3]) == slot_seeds(1, 2, "eda:0", [3])


# Members that are required, and those that are not.


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz")])
def test_images_alone_and_texts_alone(tmp_path: Path, name: str, mode: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "texts").mkdir()
    images = write_tar(tmp_path / "images" / name, [[(f"{n}.png", png(n))] for n in range(6)], mode)
    texts = write_tar(
        tmp_path / "texts" / name, [[(f"{n}.txt", f"dog {n}".encode())] for n in range(6)], mode
    )
    for path, views in ((images, SIMCLR), (texts, [*EDA, *SIMCSE])):
        (first, second) = take(opened(path, 3, views), 0, 2)
        assert not first.rejects + second.rejects
        assert set(first.images) | set(first.texts) == {view.name for view in views}
        assert len({*first.keys, *second.keys}) == 6
    with pytest.raises(DataError, match="missing caption"):
        take(opened(images, 3, PLAIN), 0, 1)
    with pytest.raises(DataError, match="missing image"):
        take(opened(texts, 3, PLAIN), 0, 1)
    with pytest.raises(DataError, match="missing caption"):
        take(opened(images, 3, SIMCLR, labels=("caption",)), 0, 1)
    # A label of another field does not ask for the usual caption either.
    (tmp_path / "notes").mkdir()
    members = [
        [(f"{n}.png", png(n)), (f"{n}.json", json.dumps({"note": f"n{n % 2}"}).encode())] for n in range(6)
    ]
    notes = write_tar(tmp_path / "notes" / name, members, mode)
    (batch,) = take(opened(notes, 6, SIMCLR, labels=("caption:json.note",)), 0, 1)
    assert torch.equal(
        batch.labels["caption:json.note"], torch.tensor([caption_label(f"n{n % 2}") for n in batch.ids])
    )
    (batch,) = take(opened(texts, 6, [], labels=("caption",)), 0, 1)
    assert len(batch.labels["caption"].unique()) == 6


def test_packed_shards_hold_the_same(packed: Path) -> None:
    stream = everything(packed, 12)
    assert not stream.exact
    assert stream.stored_widths == {"teacher_image.npy": 6}
    batches = take(stream, 0, 5)
    assert sorted(number for batch in batches for number in batch.ids.tolist()) == list(range(60))
    for batch in batches:
        assert torch.equal(batch.labels["cls"], batch.ids % 7)
        assert torch.equal(batch.stored["teacher_image.npy"][:, 0], batch.ids.float())
        assert torch.equal(batch.present["hard_0"], batch.ids % 3 > 0)
    workers = [take(everything(packed, 12, World(rank, 2)), 0, 5) for rank in range(2)]
    assert all(len(batch) == 6 for part in workers for batch in part)


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz")])
def test_bad_labels_and_vectors_are_rejected(tmp_path: Path, name: str, mode: str) -> None:
    """The width is that of the first usable vector; a sample is replaced for any one thing it lacks."""
    spoiled: dict[int, tuple[str, str, bytes | None]] = {
        0: ("bad stored vector", "teacher_image.npy", b"\x93NUMPY"),
        3: ("missing label", "cls", None),
        4: ("bad label", "json", b"{"),
        7: ("bad stored vector", "teacher_image.npy", npy(np.ones(7, np.float16))),
        8: ("missing stored vector", "teacher_image.npy", None),
        9: ("missing label", "json", b"{}"),
        11: ("bad stored vector", "teacher_image.npy", npy(np.full(6, np.nan, np.float16))),
    }
    samples = []
    for number in range(30):
        members = full(number)
        if number in spoiled:
            _, extension, data = spoiled[number]
            at = f"{number:06d}.{extension}"
            members = [(key, old if key != at else data or b"") for key, old in members]
            members = [entry for entry in members if entry[0] != at or data is not None]
        samples.append(members)
    path = write_tar(tmp_path / name, samples, mode)
    stream = opened(path, 10, PLAIN, labels=LABELS, stored=STORED)
    assert stream.stored_widths == {"teacher_image.npy": 6}
    rejects = [reject for batch in take(stream, 0, 3) for reject in batch.rejects]
    found = {int(reject.key): reject.reason for reject in rejects}
    assert found == {number: reason for number, (reason, _, _) in spoiled.items()}


def test_a_set_without_the_stored_vectors_is_refused_when_opened(shards: Path, packed: Path) -> None:
    for path in (shards, packed):
        with pytest.raises(DataError, match=r"usable \.other\.npy \(000000: missing stored vector"):
            opened(path, 12, PLAIN, stored=("other.npy",))


def test_optional_captions_are_absent_not_wrong(tmp_path: Path) -> None:
    samples = [
        [("a.png", png(0)), ("a.txt", b"x"), ("a.json", b'{"hard": "good"}')],
        [("b.png", png(1)), ("b.txt", b"x"), ("b.json", b'{"hard": null}')],
        [("c.png", png(2)), ("c.txt", b"x")],
        [("d.png", png(3)), ("d.txt", b"x"), ("d.json", b'{"hard": " "}')],
        [("e.png", png(4)), ("e.txt", b"x"), ("e.json", b'{"hard": 7}')],
    ]
    path = write_tar(tmp_path / "a.tar", samples)
    (batch,) = take(opened(path, 5, [*PLAIN, HARD[0]]), 0, 1)
    assert [(reject.key, reject.reason) for reject in batch.rejects] == [("e", "caption is not text")]
    present = dict(zip(batch.keys, batch.present["hard_0"].tolist(), strict=True))
    assert [present[key] for key in "abcd"] == [True, False, False, False]
    required = View("hard_0", "text", field="json.hard")
    (batch,) = take(opened(path, 5, [*PLAIN, required]), 0, 1)
    assert set(batch.keys) == {"a"}
    # Two views of one field: it is required when one of them requires it.
    (batch,) = take(opened(path, 5, [*PLAIN, HARD[0], View("must", "text", field="json.hard")]), 0, 1)
    assert batch.present["hard_0"].all()


def test_a_second_caption(tmp_path: Path) -> None:
    samples = [
        [(f"{n}.txt", f"first {n}\nsecond {n}".encode()), (f"{n}.alt", b"from a file of its own")]
        for n in range(4)
    ]
    path = write_tar(tmp_path / "a.tar", samples)
    views = [
        View("text", "text"),
        View("line:0", "text", field="txt"),
        View("line:1", "text", index=1),
        View("alt", "text", field="alt"),
    ]
    (batch,) = take(opened(path, 4, views), 0, 1)
    for row, number in enumerate(batch.ids.tolist()):
        found = {name: words(tokens)[row] for name, tokens in batch.texts.items()}
        assert found == {
            "text": f"first {number}\nsecond {number}",
            "line:0": f"first {number}",
            "line:1": f"second {number}",
            "alt": "from a file of its own",
        }


def test_wrong_declarations_are_refused(shards: Path) -> None:
    with pytest.raises(ConfigError, match="two views are called image"):
        opened(shards, 12, [View("image", "image"), View("image", "image")])
    with pytest.raises(ConfigError, match="view 'eda:0': no text recipe is called 'edda'") as caught:
        text_view(View("eda:0", "text", "edda"), TOKENIZER, 48, None)
    assert "'eda'" in caught.value.cure
