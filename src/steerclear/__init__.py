"""Makes any diffusers pipeline steer clear of unwanted content while it samples."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steerclear.attach import Trace, apply_guard, attach, remove_guard, see
    from steerclear.denoise import DenoiseState, GuardedDenoiser
    from steerclear.errors import (
        GuardNotApplied,
        InvalidInput,
        MissingExtra,
        NegationFileError,
        NegationMismatch,
        SampleRefused,
        SteerclearError,
        UnsoundCombination,
        UnsupportedPipeline,
        UnsupportedScheduler,
    )
    from steerclear.evaluate import Arm, Judge, Prompt, Sampling, Task
    from steerclear.guards import (
        SFW,
        SLD,
        SPELL,
        AleatoricGuidance,
        Certain,
        ConditionalRelease,
        Dynamic,
        DynamicNegativeGuidance,
        FinishedSamples,
        Guard,
        NegativePrompt,
        SafeDenoiser,
        SafeRedirect,
        SafetyGuidedFlow,
        Seen,
        SeenPosterior,
        SeenReferences,
        Settled,
        Shield,
        TrackedRelease,
        TwoSample,
        chain,
        during,
        when,
    )
    from steerclear.negation import IndexedSet, LiveIndex, LiveSet, NegationSet, NegationStatistics, NegationStore
    from steerclear.noise import NoiseLevel
    from steerclear.prompts import SAFREE, NegativeText
    from steerclear.zoo import load

__version__ = "0.1.0"

# Imported on first use, so that `import steerclear` and `steerclear --help` stay fast.
_HOME = {
    "AleatoricGuidance": "guards",
    "Arm": "evaluate",
    "Certain": "guards",
    "ConditionalRelease": "guards",
    "DenoiseState": "denoise",
    "Dynamic": "guards",
    "DynamicNegativeGuidance": "guards",
    "FinishedSamples": "guards",
    "Guard": "guards",
    "GuardNotApplied": "errors",
    "GuardedDenoiser": "denoise",
    "IndexedSet": "negation",
    "InvalidInput": "errors",
    "Judge": "evaluate",
    "LiveIndex": "negation",
    "LiveSet": "negation",
    "MissingExtra": "errors",
    "NegationFileError": "errors",
    "NegationMismatch": "errors",
    "NegationSet": "negation",
    "NegationStatistics": "negation",
    "NegationStore": "negation",
    "NegativePrompt": "guards",
    "NegativeText": "prompts",
    "NoiseLevel": "noise",
    "Prompt": "evaluate",
    "SAFREE": "prompts",
    "SFW": "guards",
    "SLD": "guards",
    "SPELL": "guards",
    "SafeDenoiser": "guards",
    "SafeRedirect": "guards",
    "SafetyGuidedFlow": "guards",
    "SampleRefused": "errors",
    "Sampling": "evaluate",
    "Seen": "guards",
    "SeenPosterior": "guards",
    "SeenReferences": "guards",
    "Settled": "guards",
    "Shield": "guards",
    "SteerclearError": "errors",
    "Task": "evaluate",
    "Trace": "attach",
    "TrackedRelease": "guards",
    "TwoSample": "guards",
    "UnsoundCombination": "errors",
    "UnsupportedPipeline": "errors",
    "UnsupportedScheduler": "errors",
    "apply_guard": "attach",
    "attach": "attach",
    "chain": "guards",
    "during": "guards",
    "load": "zoo",
    "remove_guard": "attach",
    "see": "attach",
    "when": "guards",
}

__all__ = [
    "SAFREE",
    "SFW",
    "SLD",
    "SPELL",
    "AleatoricGuidance",
    "Arm",
    "Certain",
    "ConditionalRelease",
    "DenoiseState",
    "Dynamic",
    "DynamicNegativeGuidance",
    "FinishedSamples",
    "Guard",
    "GuardNotApplied",
    "GuardedDenoiser",
    "IndexedSet",
    "InvalidInput",
    "Judge",
    "LiveIndex",
    "LiveSet",
    "MissingExtra",
    "NegationFileError",
    "NegationMismatch",
    "NegationSet",
    "NegationStatistics",
    "NegationStore",
    "NegativePrompt",
    "NegativeText",
    "NoiseLevel",
    "Prompt",
    "SafeDenoiser",
    "SafeRedirect",
    "SafetyGuidedFlow",
    "SampleRefused",
    "Sampling",
    "Seen",
    "SeenPosterior",
    "SeenReferences",
    "Settled",
    "Shield",
    "SteerclearError",
    "Task",
    "Trace",
    "TrackedRelease",
    "TwoSample",
    "UnsoundCombination",
    "UnsupportedPipeline",
    "UnsupportedScheduler",
    "__version__",
    "apply_guard",
    "attach",
    "chain",
    "during",
    "load",
    "remove_guard",
    "see",
    "when",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        value = getattr(import_module(f"steerclear.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'steerclear' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
