"""Contrastive losses: pure functions of embeddings, torch only, collectives passed in by the caller."""

from clipkit.losses.sigmoid import sigmoid_loss
from clipkit.losses.softmax import clip_loss, info_nce

__all__ = ["clip_loss", "info_nce", "sigmoid_loss"]
