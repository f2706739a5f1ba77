"""Slow and obvious references, written from the definitions, one group per subject. Nothing here is fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

# --- Retrieval and zero-shot: exact rational scores, one sort per query ----------------------------------


def grid_rows(rows: Sequence[Sequence[float]]) -> list[list[Fraction]]:
    """Unit rows with entries rounded to multiples of 2^-25, as exact fractions."""
    result = []
    for row in rows:
        norm = math.sqrt(math.fsum(x * x for x in row))
        result.append([Fraction(round(x / norm * 2**25), 2**25) for x in row])
    return result


def exact_score(a: Sequence[Fraction], b: Sequence[Fraction]) -> Fraction:
    """The dot product, without rounding."""
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def first_right_rank(scores: Sequence[Fraction], right: Sequence[bool], ties_won: bool = False) -> int | None:
    """The 1-based place of the first right answer when equal scores put wrong answers first (or last)."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], right[i] != ties_won))
    return next((place for place, i in enumerate(order, 1) if right[i]), None)


def retrieval_ranks_by_sorting(
    images: Sequence[Sequence[float]],
    texts: Sequence[Sequence[float]],
    owners: Sequence[int],
    ties_won: bool = False,
) -> tuple[list[int | None], list[int | None]]:
    """Ranks (text -> image, image -> text); None for an image without captions."""
    image_rows, text_rows = grid_rows(images), grid_rows(texts)
    text_to_image = [
        first_right_rank(
            [exact_score(text, image) for image in image_rows],
            [number == owner for number in range(len(image_rows))],
            ties_won,
        )
        for text, owner in zip(text_rows, owners, strict=True)
    ]
    image_to_text = [
        first_right_rank(
            [exact_score(text, image) for text in text_rows], [owner == number for owner in owners], ties_won
        )
        for number, image in enumerate(image_rows)
    ]
    return text_to_image, image_to_text


def recall_by_counting(ranks: Sequence[int | None], k: int) -> float:
    """The share of queries with a right answer among the first k; a query without any is a miss."""
    return sum(rank is not None and rank <= k for rank in ranks) / len(ranks)


def hit_rates_by_topk(images: Tensor, texts: Tensor, owners: Tensor, k: int) -> tuple[float, float]:
    """(image retrieval, text retrieval) from the full matrix and topk, the way CLIP_benchmark counts them."""
    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(texts)), owners] = True
    image_hits = positive.gather(1, scores.topk(k, dim=1).indices).any(1)
    text_hits = positive.T.gather(1, scores.T.topk(k, dim=1).indices).any(1)
    return image_hits.float().mean().item(), text_hits.float().mean().item()


def class_ranks_by_sorting(
    images: Sequence[Sequence[float]], classes: Sequence[Sequence[float]], labels: Sequence[int]
) -> list[int]:
    """1-based place of the true class; of equal scores the lower class number comes first."""
    image_rows, class_rows = grid_rows(images), grid_rows(classes)
    ranks = []
    for image, label in zip(image_rows, labels, strict=True):
        scores = [exact_score(image, row) for row in class_rows]
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        ranks.append(order.index(label) + 1)
    return ranks


def balanced_accuracy(ranks: Sequence[int], labels: Sequence[int]) -> float:
    """The mean, over the classes that occur, of the share of their images at rank 1."""
    recalls = []
    for label in sorted(set(labels)):
        own = [rank for rank, found in zip(ranks, labels, strict=True) if found == label]
        recalls.append(sum(rank == 1 for rank in own) / len(own))
    return sum(recalls) / len(recalls)


def ensembled_classes(prompts: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """One unit row per class from the rows of its prompts: normalise, mean, normalise."""

    def unit(row: Sequence[float]) -> list[float]:
        norm = math.sqrt(math.fsum(x * x for x in row))
        return [x / norm for x in row]

    classes = []
    for rows in prompts:
        columns = zip(*(unit(row) for row in rows), strict=True)
        classes.append(unit([math.fsum(column) / len(rows) for column in columns]))
    return classes


# Losses: double loops over pairs, in float64.


def slow_clip_loss(image: Tensor, text: Tensor, scale: float) -> float:
    """Returns the symmetric InfoNCE of N pairs, one anchor at a time."""
    count, total = len(image), 0.0
    for anchors, candidates in ((image, text), (text, image)):
        for row in range(count):
            scores = [scale * float(anchors[row] @ candidates[column]) for column in range(count)]
            total -= scores[row] - math.log(sum(math.exp(score) for score in scores))
    return total / (2 * count)


def slow_sigmoid_loss(image: Tensor, text: Tensor, scale: float, bias: float) -> float:
    """Returns the pairwise sigmoid loss of N pairs, one pair at a time."""
    total = 0.0
    for row in range(len(image)):
        for column in range(len(text)):
            sign = 1.0 if row == column else -1.0
            logit = scale * float(image[row] @ text[column]) + bias
            total += math.log(1 + math.exp(-sign * logit))
    return total / len(image)


def rows_of(x: Tensor) -> list[list[float]]:
    """A matrix as nested lists: what the loops below run over."""
    found: list[list[float]] = x.detach().double().tolist()
    return found


def dot(x: Sequence[float], y: Sequence[float]) -> float:
    return math.fsum(p * q for p, q in zip(x, y, strict=True))


def squared_gap(x: Sequence[float], y: Sequence[float]) -> float:
    return math.fsum((p - q) ** 2 for p, q in zip(x, y, strict=True))


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def slow_shares(logits: Sequence[float], scale: float = 1.0) -> list[float]:
    """The softmax, by exponentials."""
    powers = [math.exp(scale * logit) for logit in logits]
    return [power / math.fsum(powers) for power in powers]


def two_views(a: Tensor, b: Tensor) -> tuple[list[list[float]], list[int]]:
    """All rows of both views, and the index of the other view of each."""
    count = len(a)
    return rows_of(a) + rows_of(b), [*range(count, 2 * count), *range(count)]


def slow_nt_xent(a: Tensor, b: Tensor, scale: float) -> float:
    rows, partner = two_views(a, b)
    costs = []
    for i, anchor in enumerate(rows):
        below = math.fsum(math.exp(scale * dot(anchor, rows[k])) for k in range(len(rows)) if k != i)
        costs.append(-math.log(math.exp(scale * dot(anchor, rows[partner[i]])) / below))
    return mean(costs)


def slow_dcl(a: Tensor, b: Tensor, scale: float, sigma: float | None = None, within: bool = True) -> float:
    """Decoupled: neither the anchor nor its positive is in the sum. `sigma` weighs the positive term."""
    rows, partner = two_views(a, b)
    count, costs = len(a), []
    agreement = [dot(x, y) for x, y in zip(rows_of(a), rows_of(b), strict=True)]
    for i, anchor in enumerate(rows):
        others = [
            k for k in range(2 * count) if k not in (i, partner[i]) and (within or (k < count) != (i < count))
        ]
        below = math.fsum(math.exp(scale * dot(anchor, rows[k])) for k in others)
        weight = 1.0
        if sigma is not None:
            average = mean([math.exp(s / sigma) for s in agreement])
            weight = 2 - math.exp(agreement[i % count] / sigma) / average
        costs.append(-weight * scale * dot(anchor, rows[partner[i]]) + math.log(below))
    return mean(costs)


def slow_supcon(views: Sequence[Tensor], labels: Sequence[int], scale: float, form: str) -> float:
    """Anchors without a positive are skipped; a negative label is shared by the views of one sample alone."""
    rows = [row for view in views for row in rows_of(view)]
    count, costs = len(labels), []
    for i, anchor in enumerate(rows):
        same = [
            k
            for k in range(len(rows))
            if k != i and (k % count == i % count or labels[i % count] == labels[k % count] >= 0)
        ]
        if not same:
            continue
        below = math.fsum(math.exp(scale * dot(anchor, rows[k])) for k in range(len(rows)) if k != i)
        shares = [math.exp(scale * dot(anchor, rows[k])) / below for k in same]
        costs.append(-mean([math.log(s) for s in shares]) if form == "out" else -math.log(mean(shares)))
    return mean(costs)


def slow_unicl(image: Tensor, text: Tensor, labels: Sequence[int], scale: float) -> float:
    costs = []
    for anchors, candidates in ((rows_of(image), rows_of(text)), (rows_of(text), rows_of(image))):
        for i, anchor in enumerate(anchors):
            shares = slow_shares([dot(anchor, candidate) for candidate in candidates], scale)
            same = [k for k, label in enumerate(labels) if label == labels[i]]
            costs.append(-mean([math.log(shares[k]) for k in same]))
    return mean(costs)


def slow_cross_entropy(logits: Tensor, weights: Tensor) -> float:
    """Rows of weights normalised to sum 1; rows of zeros skipped."""
    costs = []
    for row, weight in zip(rows_of(logits), rows_of(weights), strict=True):
        if sum(weight) > 0:
            shares = slow_shares(row)
            total = math.fsum(w * math.log(s) for w, s in zip(weight, shares, strict=True))
            costs.append(-total / sum(weight))
    return mean(costs)


def slow_hcl(
    a: Tensor, b: Tensor, scale: float, beta: float, tau_plus: float, decoupled: bool = False
) -> tuple[float, float]:
    """(loss, fraction of anchors at the bound) in plain exponentials."""
    rows, partner = two_views(a, b)
    costs, bound = [], []
    for i, anchor in enumerate(rows):
        logits = [scale * dot(anchor, rows[k]) for k in range(len(rows)) if k not in (i, partner[i])]
        count = len(logits)
        average = mean([math.exp(beta * logit) for logit in logits])
        hard = math.fsum(math.exp(beta * logit) / average * math.exp(logit) for logit in logits)
        positive = math.exp(scale * dot(anchor, rows[partner[i]]))
        debiased = (hard - count * tau_plus * positive) / (1 - tau_plus)
        lowest = count * math.exp(-scale)
        bound.append(float(debiased < lowest))
        negatives = max(debiased, lowest)
        costs.append(-math.log(positive / (negatives if decoupled else positive + negatives)))
    return mean(costs), mean(bound)


def slow_hard_captions(image: Tensor, text: Tensor, hard: Tensor, present: Tensor, scale: float) -> float:
    """CLIP in which every image also sees every hard caption that exists."""
    images, texts = rows_of(image), rows_of(text)
    wrong = [
        rows_of(hard[i])[m] for i in range(len(hard)) for m in range(hard.shape[1]) if bool(present[i, m])
    ]
    costs = []
    for i in range(len(images)):
        costs.append(-math.log(slow_shares([dot(images[i], t) for t in texts + wrong], scale)[i]))
        costs.append(-math.log(slow_shares([dot(texts[i], x) for x in images], scale)[i]))
    return mean(costs)


def slow_moco(queries: Tensor, keys: Tensor, queue: Tensor, scale: float) -> float:
    costs = []
    for query, key in zip(rows_of(queries), rows_of(keys), strict=True):
        shares = slow_shares([dot(query, other) for other in [key, *rows_of(queue)]], scale)
        costs.append(-math.log(shares[0]))
    return mean(costs)


def slow_pair_margin(a: Tensor, b: Tensor, similar: Sequence[bool], margin: float) -> float:
    costs = []
    for x, y, alike in zip(rows_of(a), rows_of(b), similar, strict=True):
        gap = math.sqrt(squared_gap(x, y))
        costs.append(0.5 * gap**2 if alike else 0.5 * max(0.0, margin - gap) ** 2)
    return mean(costs)


def slow_triplets(
    distance: Sequence[Sequence[float]],
    positive: Sequence[Sequence[bool]],
    negative: Sequence[Sequence[bool]],
    margin: float,
    miner: str,
) -> list[float]:
    """The hinge of every mined triplet, anchor by anchor."""
    costs = []
    for row, same, other in zip(distance, positive, negative, strict=True):
        near = [d for d, yes in zip(row, same, strict=True) if yes]
        far = [d for d, yes in zip(row, other, strict=True) if yes]
        if not near or not far:
            continue
        if miner == "hard":
            chosen = [(max(near), min(far))]
        elif miner == "all":
            chosen = [(p, n) for p in near for n in far]
        else:
            chosen = [(p, min((n for n in far if n > p), default=max(far))) for p in near]
        costs += [max(0.0, p - n + margin) for p, n in chosen]
    return costs


def slow_nce(
    positive: Tensor, negative: Tensor, log_noise_positive: Tensor, log_noise_negative: Tensor
) -> float:
    """Logistic regression of data against noise with the posterior written out."""
    costs = []
    count = negative.shape[1]
    for i in range(len(positive)):
        data = math.exp(float(positive[i]))
        noise = count * math.exp(float(log_noise_positive[i]))
        cost = -math.log(data / (data + noise))
        for v in range(count):
            data = math.exp(float(negative[i, v]))
            noise = count * math.exp(float(log_noise_negative[i, v]))
            cost -= math.log(noise / (data + noise))
        costs.append(cost)
    return mean(costs)


def slow_barlow_twins(a: Tensor, b: Tensor, off_diagonal: float, eps: float) -> float:
    columns = []
    for view in (a, b):
        found = []
        for column in zip(*rows_of(view), strict=True):
            middle = mean(column)
            spread = math.sqrt(mean([(x - middle) ** 2 for x in column]) + eps)
            found.append([(x - middle) / spread for x in column])
        columns.append(found)
    total = 0.0
    for d, one in enumerate(columns[0]):
        for e, other in enumerate(columns[1]):
            correlation = dot(one, other) / len(one)
            total += (correlation - 1) ** 2 if d == e else off_diagonal * correlation**2
    return total


def slow_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> list[list[float]]:
    """In the exponential domain: columns to equal mass, then rows to mass 1."""
    mass = [[math.exp(s / epsilon) for s in row] for row in rows_of(scores)]
    for _ in range(iterations):
        columns = [math.fsum(column) for column in zip(*mass, strict=True)]
        mass = [[m / c for m, c in zip(row, columns, strict=True)] for row in mass]
        mass = [[m / math.fsum(row) for m in row] for row in mass]
    return mass


def slow_swav(
    scores: Sequence[Tensor], assigned: Sequence[int], temperature: float, epsilon: float, iterations: int
) -> float:
    costs = []
    for crop in assigned:
        codes = slow_sinkhorn(scores[crop], epsilon, iterations)
        for number, other in enumerate(scores):
            if number == crop:
                continue
            for code, row in zip(codes, rows_of(other), strict=True):
                shares = slow_shares(row, 1 / temperature)
                costs.append(-math.fsum(q * math.log(p) for q, p in zip(code, shares, strict=True)))
    return mean(costs)


def slow_proto_nce(
    anchors: Tensor, prototypes: Sequence[Tensor], assignments: Sequence[Tensor], spreads: Sequence[Tensor]
) -> float:
    costs = []
    for centres, assignment, spread in zip(prototypes, assignments, spreads, strict=True):
        for anchor, own in zip(rows_of(anchors), assignment.tolist(), strict=True):
            logits = [
                dot(anchor, centre) / phi
                for centre, phi in zip(rows_of(centres), spread.tolist(), strict=True)
            ]
            costs.append(-math.log(slow_shares(logits)[own]))
    return mean(costs)


def slow_cosine_regression(predicted: Tensor, target: Tensor) -> float:
    costs = []
    for p, z in zip(rows_of(predicted), rows_of(target), strict=True):
        lengths = math.sqrt(dot(p, p)), math.sqrt(dot(z, z))
        costs.append(squared_gap([x / lengths[0] for x in p], [x / lengths[1] for x in z]))
    return mean(costs)


def slow_distillation(
    image: Tensor, text: Tensor, scale: float, teachers: Sequence[tuple[Tensor, Tensor, float]]
) -> float:
    """Cross-entropy of rows, both directions; the teachers' PROBABILITIES are averaged."""
    costs = []
    for flip in (False, True):
        anchors, candidates = (rows_of(text), rows_of(image)) if flip else (rows_of(image), rows_of(text))
        for i, anchor in enumerate(anchors):
            student = slow_shares([dot(anchor, c) for c in candidates], scale)
            wanted = [0.0] * len(candidates)
            for teacher_image, teacher_text, teacher_scale in teachers:
                x, y = rows_of(teacher_image), rows_of(teacher_text)
                x, y = (y, x) if flip else (x, y)
                for k, share in enumerate(slow_shares([dot(x[i], c) for c in y], teacher_scale)):
                    wanted[k] += share / len(teachers)
            costs.append(-math.fsum(w * math.log(s) for w, s in zip(wanted, student, strict=True)))
    return mean(costs)


def slow_cyclip(image: Tensor, text: Tensor) -> tuple[float, float]:
    """(in-modal, cross-modal): sums over all pairs, divided by the number of rows."""
    i, t = rows_of(image), rows_of(text)
    pairs = [(j, k) for j in range(len(i)) for k in range(len(i))]
    in_modal = math.fsum((dot(i[j], i[k]) - dot(t[j], t[k])) ** 2 for j, k in pairs)
    cross_modal = math.fsum((dot(i[j], t[k]) - dot(i[k], t[j])) ** 2 for j, k in pairs)
    return in_modal / len(i), cross_modal / len(i)


def slow_uniformity(x: Tensor, t: float) -> float:
    rows = rows_of(x)
    pairs = [(j, k) for j in range(len(rows)) for k in range(j)]
    return math.log(mean([math.exp(-t * squared_gap(rows[j], rows[k])) for j, k in pairs]))
