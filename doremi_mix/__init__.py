"""doremi_mix: learn how much of each dataset to train on.

    from doremi_mix import learn
    weights = learn("data/", run_dir="runs/first", token_budget=1_000_000)

Importing this package loads nothing heavy; torch and the rest load when something runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from doremi_mix.domain_weights import DomainWeights
    from doremi_mix.pipeline import learn

__version__ = "0.1.0"
__all__ = ["DomainWeights", "__version__", "learn"]


def __getattr__(name: str) -> object:
    if name == "DomainWeights":
        from doremi_mix.domain_weights import DomainWeights

        return DomainWeights
    if name == "learn":
        from doremi_mix.pipeline import learn

        return learn
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
