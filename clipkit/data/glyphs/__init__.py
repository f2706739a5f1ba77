"""The embedded corpora: scenes and characters, drawn from the DejaVu faces that matplotlib ships."""

from clipkit.data.glyphs.characters import make_characters, read_groups
from clipkit.data.glyphs.corpus import CompositionalPair, compositional_pairs, make_scenes

__all__ = ["CompositionalPair", "compositional_pairs", "make_characters", "make_scenes", "read_groups"]
