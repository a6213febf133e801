"""Which reader belongs to which scheduler class, and which classes cannot be guarded, with the reason."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from steerclear.attach.readers import edm, flow, others, solvers, ve, vp
from steerclear.attach.readers.base import Arguments, Field, Floats, Reading, Scheduler, timestep_value
from steerclear.errors import UnsupportedScheduler

# (calls made before this one, calls of the whole trajectory) -> (index of the step, number of steps)
Progress = Callable[[int, int], tuple[int, int]]


def one_by_one(call: int, calls: int) -> tuple[int, int]:
    """One call is one step."""
    return call, calls


def in_pairs(call: int, calls: int) -> tuple[int, int]:
    """Two calls are one step, and the last step makes do with one."""
    return call // 2, (calls + 1) // 2


def linear_multistep(call: int, calls: int) -> tuple[int, int]:
    """PNDM without Runge-Kutta: the second call repeats the first step."""
    return max(0, call - 1), max(1, calls - 1)


def runge_kutta(call: int, calls: int) -> tuple[int, int]:
    """PNDM: three steps of four calls each, then one call a step."""
    warm = min(12, calls)
    return (call // 4 if call < warm else 3 + call - warm), -(-warm // 4) + calls - warm


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerReader:
    """How to read one scheduler class.

    Args:
        read: ``(scheduler, arguments of step, floats) -> Reading``.
        progress: Maps calls to steps.
        one_call: Whether a step is one call, so one network evaluation.
        trailing: Entries at the end of ``timesteps`` that are no steps.
        resamples: Whether ``timesteps`` also goes up, by jumps that are no steps.
        method: Name of the method that advances the sample.
    """

    read: Callable[[Any, Arguments, Floats], Reading]
    progress: Progress = one_by_one
    one_call: bool = True
    trailing: int = 0
    resamples: bool = False
    method: str = "step"

    def calls(self, scheduler: Scheduler, timestep: float | Tensor, floats: Floats) -> int:
        """Calls that a trajectory makes which starts with ``timestep``; partial schedules start late."""
        table = floats(scheduler.timesteps)
        if self.resamples:
            return 1 + sum(later < earlier for earlier, later in pairwise(table))
        start = getattr(scheduler, "step_index", None)
        if start is None:
            value = timestep_value(scheduler, timestep, floats)
            start = table.index(value) if value in table else 0
        sigmas = getattr(scheduler, "sigmas", None)
        # A timestep for every sigma means that the last one, at sigma 0, is no step (LTX with explicit sigmas).
        trailing = self.trailing or int(isinstance(sigmas, Tensor) and len(sigmas) == len(table) and table[-1] == 0)
        return max(1, len(table) - trailing - start)

    def steps(self, scheduler: Scheduler, call: int, calls: int) -> tuple[int, int]:
        """Index of the step and number of steps, for the ``call``-th of ``calls`` calls."""
        progress = self.progress
        if progress is runge_kutta and scheduler.config.skip_prk_steps:
            progress = linear_multistep
        step, total = progress(call, max(1, calls))
        return step, max(total, step + 1)


def _one(read: Callable[[Any, Arguments, Floats], Reading], **more: Field) -> SchedulerReader:
    return SchedulerReader(read=read, **more)


def _two(read: Callable[[Any, Arguments, Floats], Reading]) -> SchedulerReader:
    return SchedulerReader(read=read, progress=in_pairs, one_call=False)


READERS: dict[str, SchedulerReader] = {
    "CMStochasticIterativeScheduler": _one(others.consistency),
    "CogVideoXDDIMScheduler": _one(vp.cogvideox_ddim),
    "CogVideoXDPMScheduler": _one(vp.cogvideox_dpm),
    "ConsistencyDecoderScheduler": _one(others.consistency_decoder),
    "CosineDPMSolverMultistepScheduler": _one(edm.cosine),
    "DDIMInverseScheduler": _one(vp.ddim_inverse),
    "DDIMParallelScheduler": _one(vp.ddim),
    "DDIMScheduler": _one(vp.ddim),
    "DDPMParallelScheduler": _one(vp.ancestral),
    "DDPMScheduler": _one(vp.ancestral),
    "DDPMWuerstchenScheduler": _one(others.wuerstchen, trailing=1),
    "DEISMultistepScheduler": _one(solvers.deterministic),
    "DPMSolverMultistepInverseScheduler": _one(solvers.dpm),
    "DPMSolverMultistepScheduler": _one(solvers.dpm),
    "DPMSolverSDEScheduler": _two(ve.dpm_sde),
    "DPMSolverSinglestepScheduler": _one(solvers.dpm),
    "EDMDPMSolverMultistepScheduler": _one(edm.dpm),
    "EDMEulerScheduler": _one(edm.euler),
    "EulerAncestralDiscreteScheduler": _one(ve.euler_ancestral),
    "EulerDiscreteScheduler": _one(ve.euler),
    "FlowMapEulerDiscreteScheduler": _one(flow.flow_map),
    "FlowMatchEulerDiscreteScheduler": _one(flow.euler),
    "FlowMatchHeunDiscreteScheduler": _two(flow.heun),
    "FlowMatchLCMScheduler": _one(flow.lcm),
    "HeliosDMDScheduler": _one(flow.helios_dmd),
    "HeliosScheduler": _one(flow.helios),
    "HeunDiscreteScheduler": _two(ve.heun),
    "IPNDMScheduler": _one(others.ipndm),
    "KDPM2AncestralDiscreteScheduler": _two(ve.kdpm2_ancestral),
    "KDPM2DiscreteScheduler": _two(ve.kdpm2),
    "LCMScheduler": _one(vp.lcm),
    "LMSDiscreteScheduler": _one(ve.lms),
    "LTXEulerAncestralRFScheduler": _one(flow.ltx_ancestral),
    "MiniMaxH3Scheduler": _one(flow.minimax),
    "PNDMScheduler": SchedulerReader(read=vp.pndm, progress=runge_kutta, one_call=False),
    "PiflowScheduler": _one(flow.piflow),
    "RFD4ProteinaScheduler": _one(flow.proteina),
    "RePaintScheduler": _one(vp.repaint, resamples=True),
    "SASolverScheduler": _one(solvers.sa),
    "SCMScheduler": _one(others.trigflow, trailing=1),
    "ScoreSdeVeScheduler": _one(others.score_ve, method="step_pred"),
    "TCDScheduler": _one(vp.tcd),
    "UnCLIPScheduler": _one(vp.ancestral),
    "UniPCMultistepScheduler": _one(solvers.deterministic),
}

_DISCRETE = "its states are tokens: there is no continuous denoised estimate"
_DEPRECATED = "it is deprecated upstream, no pipeline uses it, and its step has another signature"

UNSUPPORTED: dict[str, str] = {
    "AmusedScheduler": _DISCRETE,
    "BlockRefinementScheduler": _DISCRETE,
    "DiscreteDDIMScheduler": _DISCRETE,
    "EntropyBoundScheduler": _DISCRETE,
    "KarrasVeScheduler": _DEPRECATED,
    "ScoreSdeVpScheduler": _DEPRECATED,
    "VQDiffusionScheduler": _DISCRETE,
}


def reader_of(scheduler: object) -> SchedulerReader:
    """The reader of a scheduler's class or of the nearest base class that has one, so that subclasses work.

    Raises:
        UnsupportedScheduler: The class cannot be guarded, or nothing is known about it.
    """
    for base in type(scheduler).__mro__:
        reader = READERS.get(base.__name__)
        if reader is not None:
            return reader
        reason = UNSUPPORTED.get(base.__name__)
        if reason is not None:
            raise UnsupportedScheduler(
                f"attach: expected a scheduler with a continuous denoised estimate, got {base.__name__}: {reason}. "
                "Use another model family, or judge its finished images with a detector"
            )
    raise UnsupportedScheduler(
        f"attach: expected one of the {len(READERS)} scheduler classes that can be guarded or a subclass of one, got "
        f"{type(scheduler).__name__}. Set one, for example "
        "pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)"
    )
