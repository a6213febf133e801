"""The models and policies that ship with the package, and how to load them.

>>> pipe = steerclear.load("emoji-sd")
>>> guard = zoo.guard(["weapons", "alcohol"])
"""

from steerclear.zoo.class_conditional import (
    class_guard,
    class_redirect,
    class_references,
    classes,
    see_classes,
)
from steerclear.zoo.clip import load_clip, sfw
from steerclear.zoo.models import ShippedModel, load, quiet, shipped, use_scheduler
from steerclear.zoo.policies import (
    Policy,
    guard,
    joined,
    latent_weight,
    policies,
    policy,
    safe_denoiser,
    seen_weight,
)

__all__ = [
    "Policy",
    "ShippedModel",
    "class_guard",
    "class_redirect",
    "class_references",
    "classes",
    "guard",
    "joined",
    "latent_weight",
    "load",
    "load_clip",
    "policies",
    "policy",
    "quiet",
    "safe_denoiser",
    "see_classes",
    "seen_weight",
    "sfw",
    "shipped",
    "use_scheduler",
]
