"""What to steer away from: sets of latents, their exact posterior, their file format, and how pictures get in."""

from steerclear.negation.encoder import Encoder, encoder_of
from steerclear.negation.images import Skip, find_images
from steerclear.negation.posterior import Posterior
from steerclear.negation.sets import NegationSet
from steerclear.negation.space import Space

__all__ = ["Encoder", "NegationSet", "Posterior", "Skip", "Space", "encoder_of", "find_images"]
