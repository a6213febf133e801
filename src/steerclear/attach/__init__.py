"""The only package that knows diffusers: guards on any pipeline, for the length of its calls.

``steerclear.attach`` names both this package and the function :func:`attach`. Importing the package makes Python bind
that name to it, so the package is callable and stands for the function.
"""

import sys
from contextlib import AbstractContextManager
from types import ModuleType

from steerclear.attach.api import Pipeline, PromptGuard, apply_guard, attach, remove_guard, suspended
from steerclear.attach.clip import Clip, ClipScore, Preparation, sfw
from steerclear.attach.coupling import Coupling
from steerclear.attach.decoder import Decoder, decoder_of
from steerclear.attach.space import PipelineEncoder, encoder_of
from steerclear.attach.trace import CallRecord, StepRecord, Trace
from steerclear.attach.walk import see, walk
from steerclear.guards.base import Guard

__all__ = [
    "CallRecord",
    "Clip",
    "ClipScore",
    "Coupling",
    "Decoder",
    "PipelineEncoder",
    "Preparation",
    "PromptGuard",
    "StepRecord",
    "Trace",
    "apply_guard",
    "attach",
    "decoder_of",
    "encoder_of",
    "remove_guard",
    "see",
    "sfw",
    "suspended",
    "walk",
]


class _Package(ModuleType):
    def __call__(
        self, pipe: Pipeline, *guards: Guard, prompts: PromptGuard | None = None, coupling: Coupling = "score"
    ) -> AbstractContextManager[Trace]:
        return attach(pipe, *guards, prompts=prompts, coupling=coupling)


sys.modules[__name__].__class__ = _Package
