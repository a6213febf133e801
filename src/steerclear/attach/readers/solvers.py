r"""Exponential-integrator solvers that keep sigmas and derive :math:`(\alpha, \sigma)` from them.

With flow sigmas :math:`(1-\sigma, \sigma)`; otherwise variance preserving, :math:`\alpha = 1/\sqrt{1+\sigma^2}` and
:math:`\sigma\alpha`. Their timesteps are rounded to integers, so the level follows the solver's sigma, which decides
where a rewritten estimate lands.
"""

from steerclear.attach.readers.base import (
    Arguments,
    Floats,
    Projection,
    Reading,
    Scheduler,
    by_prediction,
    root,
    step_index,
)
from steerclear.noise import NoiseLevel


def _level(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> NoiseLevel:
    sigma = floats(scheduler.sigmas)[step_index(scheduler, arguments["timestep"])]
    if scheduler.config.get("use_flow_sigmas", False):
        return NoiseLevel(1.0 - sigma, sigma)
    alpha = 1.0 / root(1.0 + sigma * sigma)
    return NoiseLevel(alpha, sigma * alpha)


def _reading(scheduler: Scheduler, arguments: Arguments, floats: Floats, eta: float | None) -> Reading:
    config = scheduler.config
    projection: Projection | None = scheduler._threshold_sample if config.get("thresholding", False) else None
    level = _level(scheduler, arguments, floats)
    return by_prediction(level, config.prediction_type, projection=projection, eta=eta)


def dpm(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """DPM-Solver and DPM-Solver++; the SDE variants add the reverse-time noise in full."""
    eta = 1.0 if str(scheduler.config.algorithm_type).startswith("sde") else 0.0
    return _reading(scheduler, arguments, floats, eta)


def deterministic(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """DEIS and UniPC."""
    return _reading(scheduler, arguments, floats, 0.0)


def sa(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """SA-Solver: its noise follows a function of time, tau, which is no share of the ancestral noise."""
    return _reading(scheduler, arguments, floats, None)
