r"""Variance-preserving schedulers that look their level up by timestep.

:math:`\alpha = \sqrt{\bar\alpha_t}`, :math:`\sigma = \sqrt{1 - \bar\alpha_t}`, at the timestep *passed in*, which is
right for PNDM's half steps and its repeated first timestep as well.
"""

from steerclear.attach.readers.base import (
    Arguments,
    Floats,
    Reading,
    Scheduler,
    by_prediction,
    clip,
    projection_of,
    root,
    timestep_value,
)
from steerclear.noise import NoiseLevel


def vp_level(alpha_cumprod: float) -> NoiseLevel:
    """The level of a cumulative product of alphas."""
    return NoiseLevel(root(alpha_cumprod), root(1.0 - alpha_cumprod))


def _level(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> NoiseLevel:
    timestep = int(timestep_value(scheduler, arguments["timestep"], floats))
    return vp_level(floats(scheduler.alphas_cumprod)[timestep])


def ancestral(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """DDPM and its kin: the ancestral noise in full."""
    level = _level(scheduler, arguments, floats)
    prediction = scheduler.config.get("prediction_type", "epsilon")
    return by_prediction(level, prediction, projection=projection_of(scheduler), eta=1.0)


def ddim(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """DDIM: as much of the ancestral noise as the call's ``eta`` says."""
    level = _level(scheduler, arguments, floats)
    eta = float(arguments.get("eta", 0.0))
    return by_prediction(level, scheduler.config.prediction_type, projection=projection_of(scheduler), eta=eta)


def cogvideox_ddim(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """CogVideoX's DDIM has clipping in its config but does not use it; nor does it use ``eta``."""
    return by_prediction(_level(scheduler, arguments, floats), scheduler.config.prediction_type, eta=0.0)


def cogvideox_dpm(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """CogVideoX's DPM++ SDE: reverse-time noise at every step, never clipped."""
    return by_prediction(_level(scheduler, arguments, floats), scheduler.config.prediction_type, eta=1.0)


def lcm(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """Latent consistency: every step noises afresh, which is no share of the ancestral noise."""
    level = _level(scheduler, arguments, floats)
    return by_prediction(level, scheduler.config.prediction_type, projection=projection_of(scheduler), eta=None)


def tcd(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """Trajectory consistency: deterministic at ``eta=0``; otherwise noise of its own kind."""
    eta = 0.0 if float(arguments.get("eta", 0.3)) == 0.0 else None
    return by_prediction(_level(scheduler, arguments, floats), scheduler.config.prediction_type, eta=eta)


def pndm(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """PNDM, in its Runge-Kutta and in its linear multistep phase."""
    return by_prediction(_level(scheduler, arguments, floats), scheduler.config.prediction_type, eta=0.0)


def repaint(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """RePaint: epsilon only; its ``eta`` is set with the timesteps."""
    projection = clip(1.0) if scheduler.config.clip_sample else None
    return by_prediction(
        _level(scheduler, arguments, floats), "epsilon", projection=projection, eta=float(scheduler.eta)
    )


def ddim_inverse(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """DDIM run backwards: the sample passed in is one level cleaner than the timestep."""
    config = scheduler.config
    timestep = int(timestep_value(scheduler, arguments["timestep"], floats))
    before = min(timestep - config.num_train_timesteps // scheduler.num_inference_steps, config.num_train_timesteps - 1)
    products = floats(scheduler.alphas_cumprod)
    level = vp_level(products[before] if before >= 0 else float(scheduler.initial_alpha_cumprod))
    projection = clip(float(config.clip_sample_range)) if config.clip_sample else None
    return by_prediction(level, config.prediction_type, projection=projection, eta=0.0)
