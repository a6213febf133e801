"""What to steer away from: sets of latents, their exact posterior, their file format, and how pictures get in."""

from steerclear.negation.bulk import Built, build_many
from steerclear.negation.encoder import Encoder, encoder_of
from steerclear.negation.images import Skip, find_images
from steerclear.negation.index import Certified, IndexedSet, LiveIndex
from steerclear.negation.live import LiveSet
from steerclear.negation.posterior import Posterior
from steerclear.negation.references import Items, References
from steerclear.negation.sets import NegationSet
from steerclear.negation.snapshot import Snapshot
from steerclear.negation.space import Space
from steerclear.negation.statistics import NegationStatistics
from steerclear.negation.store import NegationStore, StoreReport

__all__ = [
    "Built",
    "Certified",
    "Encoder",
    "IndexedSet",
    "Items",
    "LiveIndex",
    "LiveSet",
    "NegationSet",
    "NegationStatistics",
    "NegationStore",
    "Posterior",
    "References",
    "Skip",
    "Snapshot",
    "Space",
    "StoreReport",
    "build_many",
    "encoder_of",
    "find_images",
]
