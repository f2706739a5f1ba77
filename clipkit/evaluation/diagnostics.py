"""What embeddings look like: pure functions of features, no gradient, the same while training and after.

Shapes: image and text (N, D) L2-normalised rows of pairs; features (N, F) any rows. Numbers are floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clipkit.losses import alignment, uniformity
from clipkit.losses.geometry import spread

BINS = 64
NEAR = 0.95  # cosine from which two pictures, or two captions, count as nearly the same
COLLAPSED = 0.1  # of `losses.geometry.spread`, which is 1 on a sphere and 0 in one point


@torch.no_grad()
def similarity_histogram(image: Tensor, text: Tensor, bins: int = BINS) -> dict[str, list[float]]:
    """Returns {"edges", "positive", "negative"}: shares of the cosines of pairs and of all other couples.

    edges has bins + 1 values from -1 to 1; both shares sum to one.
    """
    cosines = (image.float() @ text.float().T).clamp(-1, 1)
    own = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    found = {"edges": torch.linspace(-1, 1, bins + 1).tolist()}
    for name, mask in (("positive", own), ("negative", ~own)):
        counts = torch.histc(cosines[mask].cpu(), bins, -1, 1)
        found[name] = (counts / counts.sum().clamp(min=1)).tolist()
    return found


@torch.no_grad()
def similarity_summary(image: Tensor, text: Tensor) -> dict[str, float]:
    """Returns the mean cosine of pairs and of other couples, and how often another text beats the own one."""
    cosines = image.float() @ text.float().T
    own = cosines.diagonal()
    count = len(cosines)
    others = (cosines.sum() - own.sum()) / max(1, count * (count - 1))
    beaten = (cosines > own[:, None]).sum() / max(1, count * (count - 1))
    return {
        "positive_similarity": float(own.mean()),
        "negative_similarity": float(others),
        "negatives_above_positive": float(beaten),
    }


@torch.no_grad()
def modality_gap(image: Tensor, text: Tensor) -> float:
    """Returns the distance between the mean image and the mean text, 0..2 (arXiv:2203.02053 section 2)."""
    return float((image.float().mean(dim=0) - text.float().mean(dim=0)).norm())


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """Returns exp of the entropy of the normalised singular values of centred features, 1..min(N, F).

    RankMe, arXiv:2210.02885 eq. 1, on centred rows. Low while the rows spread well: dimensional collapse.
    """
    centred = features.double() - features.double().mean(dim=0)
    # The smaller of the two products has the same non-zero spectrum, and is the cheaper one.
    gram = centred.T @ centred if features.shape[0] >= features.shape[1] else centred @ centred.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    # Rounding leaves tiny values where there is none; their roots would add up over many dimensions.
    values[values <= values.amax() * len(values) * torch.finfo(values.dtype).eps] = 0
    values = values.sqrt()
    total = values.sum()
    if not float(total) > 0:
        return 1.0
    shares = values / total
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


@torch.no_grad()
def duplicate_share(labels: Tensor) -> float:
    """Returns the share of rows whose label (a hash of the caption) another row has as well, 0..1."""
    _, inverse, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    return float((counts[inverse] > 1).double().mean())


@torch.no_grad()
def near_duplicate_share(image: Tensor, text: Tensor, threshold: float = NEAR) -> float:
    """Returns the share of rows with another row that is nearly the same picture AND caption, 0..1."""
    near = (image.float() @ image.float().T > threshold) & (text.float() @ text.float().T > threshold)
    near.fill_diagonal_(False)
    return float(near.any(dim=1).double().mean())


def gradient_shares(norms: Sequence[float]) -> list[float]:
    """Returns each term's part of the sum of gradient norms, 0..1; zeros when nothing has a gradient."""
    total = math.fsum(norms)
    return [norm / total if total > 0 else 0.0 for norm in norms]


@torch.no_grad()
def describe_pairs(image: Tensor, text: Tensor, limit: int = 512) -> dict[str, float]:
    """Returns the numbers of this module for pairs, of the first `limit` rows: they need products (N, N)."""
    image, text = image[:limit], text[:limit]
    return {
        **similarity_summary(image, text),
        "alignment": float(alignment(image.float(), text.float())),
        "uniformity_image": float(uniformity(image.float())) if len(image) > 1 else 0.0,
        "uniformity_text": float(uniformity(text.float())) if len(text) > 1 else 0.0,
        "modality_gap": modality_gap(image, text),
        "near_duplicates": near_duplicate_share(image, text),
    }


@torch.no_grad()
def describe_embeddings(image: Tensor, text: Tensor, limit: int = 512) -> dict[str, float]:
    """Returns `describe_pairs` of the first `limit` pairs, with the rank and the spread of either side."""
    image, text = image[:limit], text[:limit]
    found = describe_pairs(image, text, limit)
    for name, rows in (("image", image), ("text", text)):
        found[f"effective_rank_{name}"] = effective_rank(rows)
        found[f"spread_{name}"] = float(spread(rows.float()))
    return found
