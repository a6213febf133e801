"""Guards: maps of the denoised estimate. ``base`` combines them; every other file is one published method."""

from steerclear.guards.aleatoric import AleatoricGuidance
from steerclear.guards.base import Guard, Requires, chain, during, requirements, when
from steerclear.guards.calibration import Calibration, calibrate
from steerclear.guards.certainty import Certain, Settled
from steerclear.guards.conditional_release import ConditionalRelease
from steerclear.guards.dynamic_negative import DynamicNegativeGuidance
from steerclear.guards.finished import FinishedSamples
from steerclear.guards.negative_prompt import NegativePrompt
from steerclear.guards.published import PublishedLoop
from steerclear.guards.radius import radius_of
from steerclear.guards.safe_denoiser import SafeDenoiser
from steerclear.guards.safe_redirect import SafeRedirect
from steerclear.guards.safety_guided_flow import SafetyGuidedFlow
from steerclear.guards.seen import Seen
from steerclear.guards.seen_posterior import SeenPosterior
from steerclear.guards.seen_references import SeenReferences
from steerclear.guards.sfw import SFW
from steerclear.guards.sld import SLD
from steerclear.guards.spell import SPELL, Shield
from steerclear.guards.subspace import Subspace
from steerclear.guards.tracked_release import TrackedRelease
from steerclear.guards.weights import Dynamic, Gate, TwoSample, Weight

__all__ = [
    "SFW",
    "SLD",
    "SPELL",
    "AleatoricGuidance",
    "Calibration",
    "Certain",
    "ConditionalRelease",
    "Dynamic",
    "DynamicNegativeGuidance",
    "FinishedSamples",
    "Gate",
    "Guard",
    "NegativePrompt",
    "PublishedLoop",
    "Requires",
    "SafeDenoiser",
    "SafeRedirect",
    "SafetyGuidedFlow",
    "Seen",
    "SeenPosterior",
    "SeenReferences",
    "Settled",
    "Shield",
    "Subspace",
    "TrackedRelease",
    "TwoSample",
    "Weight",
    "calibrate",
    "chain",
    "during",
    "radius_of",
    "requirements",
    "when",
]
