"""Big sets without reading all of them: clusters, bounds of what each adds, and rows that speak for the others."""

from steerclear.negation.index.indexed import Certified, IndexedSet
from steerclear.negation.index.live import LiveIndex

__all__ = ["Certified", "IndexedSet", "LiveIndex"]
