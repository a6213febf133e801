r"""Variance-exploding schedulers in k-diffusion's convention: :math:`\alpha = 1`, :math:`\sigma` from the schedule.

``scale_model_input`` divides what the network sees by :math:`\sqrt{1+\sigma^2}`; the sample that ``step`` gets is not
divided. With ``s_churn`` the network saw the sample before the extra noise, so the level is ``sigma``, not
``sigma_hat``.
"""

from steerclear.attach.readers.base import (
    Arguments,
    Floats,
    Reading,
    Scheduler,
    by_prediction,
    projection_of,
    step_index,
)
from steerclear.noise import NoiseLevel


def _reading(scheduler: Scheduler, sigma: float, eta: float | None) -> Reading:
    return by_prediction(NoiseLevel(1.0, sigma), scheduler.config.prediction_type, eta=eta)


def _sigma(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> float:
    return floats(scheduler.sigmas)[step_index(scheduler, arguments["timestep"])]


def churned(arguments: Arguments) -> float | None:
    """Deterministic without ``s_churn``; with it, noise of another kind than the ancestral."""
    return 0.0 if float(arguments.get("s_churn", 0.0)) == 0.0 else None


def euler(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """Euler, with or without churn."""
    return _reading(scheduler, _sigma(scheduler, arguments, floats), churned(arguments))


def euler_ancestral(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """Euler with ancestral noise."""
    return _reading(scheduler, _sigma(scheduler, arguments, floats), 1.0)


def lms(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """Linear multistep."""
    return _reading(scheduler, _sigma(scheduler, arguments, floats), 0.0)


def heun(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """Heun: its list of sigmas is doubled, so both calls read their own position."""
    level = NoiseLevel(1.0, _sigma(scheduler, arguments, floats))
    return by_prediction(level, scheduler.config.prediction_type, projection=projection_of(scheduler), eta=0.0)


def kdpm2(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """DPM2: the second call sits at the interpolated sigma of the same position."""
    index = step_index(scheduler, arguments["timestep"])
    table = scheduler.sigmas if scheduler.state_in_first_order else scheduler.sigmas_interpol
    return _reading(scheduler, floats(table)[index], 0.0)


def kdpm2_ancestral(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """Ancestral DPM2: the interpolated sigmas are listed one position earlier."""
    index = step_index(scheduler, arguments["timestep"])
    if scheduler.state_in_first_order:
        return _reading(scheduler, floats(scheduler.sigmas)[index], 1.0)
    return _reading(scheduler, floats(scheduler.sigmas_interpol)[index - 1], 1.0)


def dpm_sde(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """DPM++ SDE: the second call sits at the midpoint that the first one left behind."""
    index = step_index(scheduler, arguments["timestep"])
    first = scheduler.state_in_first_order
    sigma = floats(scheduler.sigmas)[index] if first else float(scheduler.mid_point_sigma)
    return _reading(scheduler, sigma, 1.0)
