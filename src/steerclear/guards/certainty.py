r"""Conditions for :func:`~steerclear.guards.when`: is the denoised estimate to be trusted yet?

A guard that reads the estimate as if it were the picture (a classifier, an image-text score) may be wrong while the
estimate is still a blur. A denoiser says by itself how wrong it expects to be: its Jacobian is the posterior covariance
(Tweedie's second formula),

.. math:: \operatorname{Cov}[x_0 \mid x_t] = \frac{\sigma^2}{\alpha} \frac{\partial \hat x}{\partial x_t}, \qquad
    \operatorname{tr} \frac{\partial \hat x}{\partial x_t} \approx \frac1\sigma\, E_i\bigl\langle \epsilon_i,\,
    \hat x(\alpha\hat x + \sigma\epsilon_i) - \hat x \bigr\rangle

(Stein's identity over copies of the estimate that are noised again). :class:`Certain` uses the root of the mean,

.. math:: \varrho = \sqrt{\frac{\sigma}{\alpha D}\, E_i \bigl\langle \epsilon_i, \hat x_i - \hat x \bigr\rangle_+}
    \;\approx\; \sqrt{E\,\lVert x_0 - \hat x\rVert^2 / D}

which is the expected root-mean-square error of the estimate, in the sampler's units: exact for Gaussian data, 0 for a
Dirac. :class:`Settled` costs no evaluation and asks how far the estimate moved since the last call.

Both are about the estimate before any guard. A sample that is not certain is left *unguarded* at that step, so an
abstention is a risk, and it must be bought back by fewer false alarms: docs/aleatoric-uncertainty.md says what was
measured.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.guards.aleatoric import no_signal, renoised, seeds
from steerclear.guards.base import Requires
from steerclear.guards.tracking import wide
from steerclear.noise import squared_norm


@dataclass(frozen=True, kw_only=True, eq=False)
class Certain:
    r"""Whether the expected error of the estimate is at most ``threshold``, per sample.

    Args:
        threshold: Largest root-mean-square error per element, >= 0, in the sampler's units.
        samples: :math:`M \ge 1` re-noised copies.
        seed: Of the noise, together with the sample itself.

    Call:
        state: The step, with evaluations.

    Returns:
        ``(batch,)`` bool; true where the error is NaN, so that a guard passes NaN on and the layer refuses it.

    Notes in the trace:
        ``expected_error``: :math:`\varrho`, ``(batch,)``.

    Raises:
        InvalidInput: For values outside these ranges.
        UnsoundCombination: If the sampler lends no evaluations or no estimate.

    Cost:
        ``samples`` evaluations of the sampler's own estimate at every step where the guard wants a change; one wait for
        the device per trajectory.

    Equal to:
        The posterior standard deviation for Gaussian data, in expectation. Under guidance the estimate is no posterior
        mean, and the number is a stability, not an error.
    """

    threshold: float
    samples: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold < math.inf:
            raise InvalidInput(f"Certain: expected a finite threshold >= 0, got {self.threshold}")
        if self.samples < 1:
            raise InvalidInput(f"Certain: expected samples >= 1, got {self.samples}")

    @property
    def requires(self) -> Requires:
        """Evaluations at other noisy samples."""
        return Requires(evaluations=True)

    def observe(self, state: DenoiseState) -> None:
        """Seed the noise at the first step, whoever asks for it later."""
        seeds(state, self.seed, self)

    def __call__(self, state: DenoiseState) -> Tensor:
        error = expected_error(state, samples=self.samples, seed=self.seed, owner=self)
        state.note("expected_error", error)
        return ~(error > self.threshold)


@dataclass(frozen=True, kw_only=True, eq=False)
class Settled:
    r"""Whether the estimate moved by at most ``threshold`` (root mean square) since the sampler's last call.

    Args:
        threshold: Largest move, >= 0, in the sampler's units. How far an estimate moves depends on the number of steps:
            half as many steps, about twice the move.

    Call:
        state: Any step.

    Returns:
        ``(batch,)`` bool; false at the first step, and where the last call was not observed, as inside ``during``; true
        where the move is NaN.

    Notes in the trace:
        ``move``: the move, ``(batch,)``; infinite where it is not known.

    Raises:
        InvalidInput: For a threshold outside this range.
        UnsoundCombination: If the sampler lends no estimate.

    Cost:
        No network evaluation; one estimate kept.
    """

    threshold: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold < math.inf:
            raise InvalidInput(f"Settled: expected a finite threshold >= 0, got {self.threshold}")

    def observe(self, state: DenoiseState) -> None:
        """Compare with the last call; :func:`~steerclear.guards.when` does so at every step."""
        last = state.memory.get(self)
        if last is not None and last[0] is state:
            return
        x = _estimate(state)
        move = x.new_full((len(x),), math.inf)
        if last is not None and 0 <= state.step - last[1] <= 1 and last[2].shape == x.shape:
            move = (squared_norm(x - last[2]) / x[0].numel()).sqrt()
        state.memory[self] = (state, state.step, x, move)

    def __call__(self, state: DenoiseState) -> Tensor:
        self.observe(state)
        move = state.memory[self][3]
        state.note("move", move)
        return ~(move > self.threshold)


def expected_error(state: DenoiseState, *, samples: int, seed: int, owner: object) -> Tensor:
    r""":math:`\varrho` of the module's docstring, ``(batch,)``; infinite at a level without signal."""
    x, level = _estimate(state), state.level
    if no_signal(level):  # the posterior is the prior, whose variance the Jacobian does not tell
        return x.new_full((len(x),), math.inf)
    total = torch.zeros_like(x)
    for epsilon, _, again in renoised(x, state, samples=samples, seed=seed, owner=owner):
        total = total + epsilon * (again - x)
    return (level.sigma / level.alpha * total / samples).flatten(1).mean(1).clamp_min(0.0).sqrt()


def _estimate(state: DenoiseState) -> Tensor:
    if state.denoised is None:
        raise UnsoundCombination(
            "a condition on the estimate: expected state.denoised, got none; attach the guard to a pipeline"
        )
    return wide(state.denoised)
