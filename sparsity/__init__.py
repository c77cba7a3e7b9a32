"""The method: what is observed, when to switch, which blocks to keep."""

from sparsity.patterns import PATTERNS, select_blocks

__all__ = ["PATTERNS", "select_blocks"]
