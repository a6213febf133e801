"""What a task file may put into an arm, by name: guards ``(pipe, **settings) -> guard``, prompt guards
``(**settings) -> prompt guard``, and guards that live in weights ``(**settings) -> (pipe -> block)``.

Module-level functions, so that workers in other processes find them.
"""

from collections.abc import Callable

from steerclear.app.arms import shipped
from steerclear.attach import PromptGuard
from steerclear.evaluate.task import Weights
from steerclear.guards.base import Guard

GUARDS: dict[str, Callable[..., Guard]] = {
    "recommended": shipped.recommended,
    "release": shipped.released,
    "latent-release": shipped.latent_release,
    "tracked-release": shipped.tracked,
    "composed": shipped.composed,
    "safe-denoiser": shipped.two_sample,
    "safe-denoiser-exact": shipped.exact,
    "safe-denoiser-dynamic": shipped.dynamic,
    "safe-denoiser-published": shipped.published,
    "control-mean-vector": shipped.mean_vector,
    "control-renoise-only": shipped.renoise_only,
    "own": shipped.own,
}

PROMPTS: dict[str, Callable[..., PromptGuard]] = {}

WEIGHTS: dict[str, Callable[..., Weights]] = {}
