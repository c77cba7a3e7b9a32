"""The method: what is observed, when to switch, which blocks to keep, the order of phases.

Works on tensors and knows nothing of models or runs. Importing it does not load torch, so that
--help can ask the registries.
"""

from sparsity.criteria import CRITERIA, Criterion, Verdict
from sparsity.patterns import PATTERNS, Pattern, select_blocks

__all__ = [
    "CRITERIA",
    "PATTERNS",
    "Criterion",
    "Pattern",
    "Verdict",
    "agreement",
    "best_mass",
    "capture",
    "chance_mass",
    "kept_mass",
    "select_blocks",
]


def __getattr__(name: str):  # what needs torch
    if name in __all__:
        from sparsity import observe

        return getattr(observe, name)
    raise AttributeError(f"module 'sparsity' has no attribute {name!r}")
