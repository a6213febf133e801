"""What users need to test guards of their own: closed-form mixtures here, samplers and tiny pipelines one level down.

``steerclear.testing.sampling`` runs a mixture through diffusers' schedulers; ``steerclear.testing.pipelines`` has tiny
pipelines with random weights. Both import diffusers, this module does not.
"""

from steerclear.testing.mixture import Condition, Mixture

__all__ = ["Condition", "Mixture"]
