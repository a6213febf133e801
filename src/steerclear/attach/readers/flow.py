r"""Flow-matching schedulers: :math:`x_t = (1-\sigma) x_0 + \sigma\epsilon`, output :math:`\epsilon - x_0`.

So :math:`\hat x = x_t - \sigma o`. Some count time the other way and predict :math:`x_0 - \epsilon`: then
:math:`\hat x = x_t + \sigma o`.
"""

from torch import Tensor

from steerclear.attach.readers.base import (
    Arguments,
    Field,
    Floats,
    Reading,
    Scheduler,
    per_token,
    reading,
    step_index,
    timestep_value,
)
from steerclear.attach.readers.ve import churned
from steerclear.noise import NoiseLevel


def _at(sigma: float, eta: float | None = 0.0, **more: Field) -> Reading:
    return reading(NoiseLevel(1.0 - sigma, sigma), 1.0, -sigma, eta=eta, **more)


def _reversed(sigma: float | Tensor, eta: float | None = 0.0) -> Reading:
    level = NoiseLevel(1.0 - sigma, sigma)
    if isinstance(sigma, Tensor):
        return Reading(level=level, k_x=1.0, k_o=sigma, eta=eta)
    return reading(level, 1.0, sigma, eta=eta)


def euler(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """Flow Euler; with time reversed (Mochi), a time per token (LTX), or sigmas above 1 (Cosmos Predict 2)."""
    config = scheduler.config
    eta = None if config.stochastic_sampling else 0.0
    tokens = arguments.get("per_token_timesteps")
    if tokens is not None:
        return _reversed(per_token(tokens / config.num_train_timesteps, arguments["sample"]), eta)
    sigmas = floats(scheduler.sigmas)
    sigma = sigmas[step_index(scheduler, arguments["timestep"])]
    if config.invert_sigmas:
        return _reversed(1.0 - sigma, eta)
    if max(sigmas) > 1.0 + 1e-3:
        return reading(NoiseLevel(1.0, sigma), 1.0, -sigma, eta=eta)
    return _at(sigma, eta)


def heun(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """Flow Heun: its list of sigmas is doubled, so both calls read their own position."""
    return _at(floats(scheduler.sigmas)[step_index(scheduler, arguments["timestep"])], churned(arguments))


def lcm(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """Flow consistency: every step noises afresh."""
    return _at(floats(scheduler.sigmas)[step_index(scheduler, arguments["timestep"])], None)


def ltx_ancestral(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """LTX's ancestral flow Euler; its ``eta`` scales a step down in sigma, not the ancestral noise."""
    eta = 0.0 if float(scheduler.config.eta) == 0.0 else None
    return _at(floats(scheduler.sigmas)[step_index(scheduler, arguments["timestep"])], eta)


def helios(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """Helios. With several stages the "clean" end is the stage's: for early stages a small, still noisy latent."""
    return _at(floats(scheduler.sigmas)[scheduler.step_index or 0])


def helios_dmd(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """Distilled Helios: the caller passes the tables, and the nearest timestep is taken."""
    # The scheduler truncates the timestep to an integer before its search.
    timestep = int(timestep_value(scheduler, arguments["timestep"], floats))
    timesteps = floats(arguments["dmd_timesteps"])
    nearest = min(range(len(timesteps)), key=lambda i: abs(timesteps[i] - timestep))
    return _at(floats(arguments["dmd_sigmas"])[nearest], None)


def flow_map(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """Flow map: the output is a mean velocity, so the estimate is an extrapolation and not a posterior mean."""
    return _at(timestep_value(scheduler, arguments["timestep"], floats) / scheduler.config.num_train_timesteps)


def piflow(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """Pi-Flow: the output holds a grid of velocities, all read at the segment's start."""
    index = scheduler._step_index_for(arguments["timestep"])
    return _at(floats(scheduler.sigmas)[index], grid=int(scheduler.n_grid))


def minimax(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """MiniMax H3: time runs towards the data, for all samples or one by one."""
    timestep = arguments["timestep"]
    if isinstance(timestep, Tensor) and timestep.numel() > 1:
        return _reversed(1.0 - per_token(timestep, arguments["sample"]))
    return _reversed(1.0 - timestep_value(scheduler, timestep, floats))


def proteina(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """RFD4-Proteina: time runs towards the data; its noise schedule is its own."""
    return _reversed(1.0 - timestep_value(scheduler, arguments["timestep"], floats), None)
