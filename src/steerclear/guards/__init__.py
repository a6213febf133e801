"""Guards: maps of the denoised estimate. ``base`` combines them; every other file is one published method."""

from steerclear.guards.base import Guard, Requires, chain, during, requirements, when
from steerclear.guards.calibration import Calibration, calibrate
from steerclear.guards.conditional_release import ConditionalRelease
from steerclear.guards.dynamic_negative import DynamicNegativeGuidance
from steerclear.guards.negative_prompt import NegativePrompt
from steerclear.guards.published import PublishedLoop
from steerclear.guards.safe_denoiser import SafeDenoiser
from steerclear.guards.seen import Seen
from steerclear.guards.seen_references import SeenReferences
from steerclear.guards.sld import SLD
from steerclear.guards.subspace import Subspace
from steerclear.guards.tracked_release import TrackedRelease
from steerclear.guards.weights import Dynamic, Gate, TwoSample, Weight

__all__ = [
    "SLD",
    "Calibration",
    "ConditionalRelease",
    "Dynamic",
    "DynamicNegativeGuidance",
    "Gate",
    "Guard",
    "NegativePrompt",
    "PublishedLoop",
    "Requires",
    "SafeDenoiser",
    "Seen",
    "SeenReferences",
    "Subspace",
    "TrackedRelease",
    "TwoSample",
    "Weight",
    "calibrate",
    "chain",
    "during",
    "requirements",
    "when",
]
