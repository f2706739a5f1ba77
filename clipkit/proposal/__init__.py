"""`clipkit init`: a look at data and machine, and a run file with the reason behind every value."""

from __future__ import annotations

from clipkit.proposal.proposing import Proposal, propose

__all__ = ["Proposal", "propose"]
