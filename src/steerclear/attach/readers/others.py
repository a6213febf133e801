r"""Schedulers with a parametrisation of their own: consistency models, TrigFlow, iPNDM, Würstchen, score SDEs."""

import math

import torch

from steerclear.attach.readers.base import (
    Arguments,
    Floats,
    Reading,
    Scheduler,
    by_prediction,
    clip,
    reading,
    step_index,
    timestep_value,
)
from steerclear.attach.readers.vp import vp_level
from steerclear.noise import NoiseLevel


def consistency(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    r"""Consistency models: the boundary condition's :math:`c_{skip}`, :math:`c_{out}` (arXiv:2303.01469, eq. 5)."""
    sigma = floats(scheduler.sigmas)[step_index(scheduler, arguments["timestep"])]
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition(sigma)
    projection = clip(1.0) if scheduler.config.clip_denoised else None
    return reading(NoiseLevel(1.0, sigma), float(c_skip), float(c_out), projection=projection, eta=None)


def consistency_decoder(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """The consistency decoder: everything is a table over timesteps."""
    timestep = int(timestep_value(scheduler, arguments["timestep"], floats))
    alpha, sigma, c_skip, c_out = (
        floats(table)[timestep]
        for table in (
            scheduler.sqrt_alphas_cumprod,
            scheduler.sqrt_one_minus_alphas_cumprod,
            scheduler.c_skip,
            scheduler.c_out,
        )
    )
    return reading(NoiseLevel(alpha, sigma), c_skip, c_out, eta=None)


def ipndm(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """iPNDM: v-prediction on tables of alphas and betas."""
    index = step_index(scheduler, arguments["timestep"])
    level = NoiseLevel(floats(scheduler.alphas)[index], floats(scheduler.betas)[index])
    return reading(level, float(level.alpha), -float(level.sigma), eta=0.0)


def trigflow(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    r"""TrigFlow: :math:`x_t = \cos t\, x_0 + \sin t\, s_d \epsilon`; the sample and the output carry :math:`s_d`."""
    angle = floats(scheduler.timesteps)[step_index(scheduler, arguments["timestep"])]
    level = NoiseLevel(max(0.0, math.cos(angle)), math.sin(angle) * float(scheduler.config.sigma_data))
    return reading(level, math.cos(angle), -math.sin(angle), eta=None)


def wuerstchen(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """Würstchen: a continuous cosine schedule; all samples share the first one's time, as in its own step."""
    time = timestep_value(scheduler, arguments["timestep"], floats)
    product = float(scheduler._alpha_cumprod(torch.tensor([time]), torch.device("cpu")))
    return by_prediction(vp_level(product), "epsilon", eta=1.0)


def score_ve(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    r"""Variance-exploding score SDE, predictor: the output is the score, :math:`\hat x = x_t + \sigma^2 o`."""
    time = timestep_value(scheduler, arguments["timestep"], floats)
    # The product is taken in float32 before it is truncated, because the scheduler does so.
    index = int(torch.tensor(time, dtype=torch.float32) * (len(scheduler.timesteps) - 1))
    sigma = floats(scheduler.discrete_sigmas)[index]
    # Its sigmas are legitimately in the thousands, so the gain is no sign of a lost signal here.
    return Reading(level=NoiseLevel(1.0, sigma), k_x=1.0, k_o=sigma * sigma, eta=None)
