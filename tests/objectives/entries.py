"""One or more configurations of every objective, small enough for the tests that run all of them."""

from __future__ import annotations

from typing import Any

HEAD = {"hidden": 12, "dim": 6}

ENTRIES: dict[str, dict[str, Any]] = {
    "clip": {"name": "clip"},
    "clip, own scale": {"name": "clip", "own_scale": True},
    "clip, fixed temperature": {"name": "clip", "temperature": 0.2},
    "clip, label smoothing": {"name": "clip", "label_smoothing": 0.1},
    "clip, hard negatives": {"name": "clip", "hard_negatives": {"beta": 0.2, "tau_plus": 0.05}},
    "clip, hard captions": {"name": "clip", "hard_captions": {"field": "json.hard", "num": 2}},
    "clip, graded targets": {"name": "clip", "targets": {"temperature": 0.3}},
    "siglip": {"name": "siglip"},
    "siglip, own scale": {"name": "siglip", "own_scale": True},
    "siglip, fixed temperature": {"name": "siglip", "temperature": 0.2},
    "unicl": {"name": "unicl", "label": "cls"},
    "cyclip": {"name": "cyclip"},
    "simclr": {"name": "simclr", **HEAD},
    "simclr, texts": {"name": "simclr", "tower": "text", **HEAD},
    "simclr, euclidean": {"name": "simclr", "similarity": "negative_squared_euclidean", **HEAD},
    "simclr, hard negatives": {"name": "simclr", "hard_negatives": {"beta": 1.0, "tau_plus": 0.1}, **HEAD},
    "dcl": {"name": "dcl", **HEAD},
    "dcl, weighted": {"name": "dcl", "sigma": 0.5, **HEAD},
    "dcl, hard negatives": {"name": "dcl", "hard_negatives": {"beta": 1.0, "tau_plus": 0.1}, **HEAD},
    "infonce": {"name": "infonce"},
    "infonce, hard negatives": {"name": "infonce", "symmetric": True, "hard_negatives": {"beta": 0.5}},
    "infonce, hard captions": {"name": "infonce", "hard_captions": {"num": 2, "bonus": 0.5}},
    "infonce, images": {"name": "infonce", "tower": "image", "symmetric": True, **HEAD},
    "supcon": {"name": "supcon", "label": "cls", **HEAD},
    "supcon, in": {"name": "supcon", "label": "cls", "form": "in", **HEAD},
    "barlow_twins": {"name": "barlow_twins", "hidden": 12, "dim": 8, "off_diagonal": 0.1},
    "triplet": {"name": "triplet"},
    "triplet, labels": {"name": "triplet", "tower": "image", "label": "cls", "miner": "hard"},
    "triplet, all": {"name": "triplet", "miner": "all", "distance": "cosine", "average": "nonzero"},
    "pair_margin": {"name": "pair_margin"},
    "pair_margin, labels": {"name": "pair_margin", "tower": "text", "label": "cls"},
    "moco": {"name": "moco", "queue": 30, "momentum": 0.9, **HEAD},
    "pcl": {
        "name": "pcl", "queue": 30, "momentum": 0.9, "clusters": [3, 5], "every": 1, "warmup": 0.0, **HEAD,
    },
    "byol": {"name": "byol", "momentum": 0.9, **HEAD},
    "simsiam": {"name": "byol", "simsiam": True, **HEAD},
    "swav": {"name": "swav", "local": 1, "prototypes": 5, "frozen": 0.1, **HEAD},
    "swav, queue": {
        "name": "swav", "local": 0, "prototypes": 5, "frozen": 0.0, "queue": 12, "queue_start": 0.0, **HEAD,
    },
    "distill": {"name": "distill", "teachers": ["big", "bigger"]},
    "distill, features": {"name": "distill", "teachers": ["big", "bigger"], "features": 20.0},
    "distill, stored": {"name": "distill", "stored": {}},
}  # fmt: skip
