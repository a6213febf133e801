"""The models and policies that ship with the package, and how to load them.

>>> pipe = steerclear.load("emoji-sd")
>>> guard = zoo.guard(["weapons", "alcohol"])
"""

from steerclear.zoo.models import ShippedModel, load, quiet, shipped, use_scheduler
from steerclear.zoo.policies import Policy, guard, policies, policy, safe_denoiser

__all__ = [
    "Policy",
    "ShippedModel",
    "guard",
    "load",
    "policies",
    "policy",
    "quiet",
    "safe_denoiser",
    "shipped",
    "use_scheduler",
]
