r"""Evidence against references as the model itself denoises them.

Early in a trajectory the conditional branch's estimate is a blur: the mean of everything that the prompt may become.
Compared with clean references it resembles the blandest of them. The fair comparison is with what the *same* model
makes of a noised reference at the same noise level, under the reference's own label:

.. math:: y_n^t = \hat x(\alpha_t y_n + \sigma_t \epsilon,\; t,\; c_n), \qquad
    \rho_t = \log \hat q^t_{unsafe}(\hat x_c) - \log \hat q^t_{safe}(\hat x_c), \qquad
    \hat q^t(x) = \frac1N \sum_n \exp\Bigl(-\frac{\lVert \phi(x) - \phi(y_n^t) \rVert^2}{2 (q h_t)^2}\Bigr)

with :math:`\phi` the leading principal components of all :math:`y_n^t`, :math:`h_t` the median distance of a reference
to the nearest one with another label, and :math:`q` the width. How large :math:`\rho_t` is for a harmless estimate
depends on the level, so it is measured against the safe references themselves, each left out in turn:

.. math:: \log\frac{w_c}{1-w_c} = a \Bigl(\frac{\rho_t - m_t}{s_t} - z\Bigr) + \log\frac{\pi}{1-\pi}

with :math:`m_t` their 90 % quantile, :math:`s_t` the distance from their median to their 98 % quantile, and :math:`z`
such that a stated share of their trajectories ever reaches it (:meth:`Seen.calibrated`). Late in a trajectory, when
little can be changed any more, most alarms are false: only the first part is read. At the first step
:math:`y_n^t` is what the model expects of the label alone; towards the end it is the reference. ``steerclear.see``
makes the references.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.guards.seen_references import SeenReferences
from steerclear.guards.weights import Weight, logit, require_fixed
from steerclear.negation import Posterior, References
from steerclear.noise import NoiseLevel


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenWeight(Weight):
    """A weight from kernels around :class:`SeenReferences` at the step's level; what its kinds have in common."""

    references: SeenReferences
    width: float
    slope: float = 1.0
    until: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not 0.0 < self.width < math.inf or not 0.0 < self.slope < math.inf:
            raise InvalidInput(f"{name}: expected a width > 0 and a finite slope > 0, got {self.width}, {self.slope}")
        if not 0.0 < self.until <= 1.0:
            raise InvalidInput(f"{name}: expected 0 < until <= 1, got {self.until}")

    def check(self, negation: References) -> None:
        name = type(self).__name__
        require_fixed(name, negation)
        negation.space.require(self.references.space)
        named = frozenset(negation.labels) - {""}
        if named and named != self.references.unsafe:
            raise UnsoundCombination(
                f"{name}: expected references of the negation set's labels, got others "
                f"({', '.join(sorted(named ^ self.references.unsafe)[:3])} in one of the two only); pick them: "
                "SeenReferences.only(frozenset(negation.labels))"
            )

    @property
    def read(self) -> int:
        """Number of levels that are read."""
        return math.ceil(self.until * len(self.references.log_snr))

    def kernels(self, own: Tensor, index: int) -> Tensor:
        """Log-kernels of components ``(batch, k)`` to every reference at a level, ``(batch, n)``."""
        distance = torch.cdist(own, self.references.points[index].to(own))
        return -distance.square() / (2.0 * (self.width * self.references.spacing[index]) ** 2)

    def started(self, state: DenoiseState, owner: object) -> None:
        """Refuses a trajectory that begins where nothing is read any more: it would pass unguarded."""
        key = (owner, type(self))
        if key in state.memory:
            return
        if self.references.level(state.level) >= self.read:
            raise UnsoundCombination(
                f"{type(self).__name__} reads the noisiest {self.until:.0%} of the levels, but this trajectory begins "
                "after them (image to image, a refiner, other timesteps). Start from more noise, or use until=1.0"
            )
        state.memory[key] = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen(SeenWeight):
    """Log-odds against :class:`SeenReferences`; the equations are in the module's docstring.

    Args:
        references: What to compare with, made with the model that is guarded.
        width: :math:`q` > 0, kernel width as a multiple of the spacing of the references at the level.
        prior: Unsafe share of what the model would draw, inside (0, 1).
        slope: :math:`a` > 0.
        threshold: :math:`z`.
        until: Share of the levels, from the noisiest, that is read, in (0, 1]; at later ones the weight is 0.
        centre: :math:`m_t` of every level; zeros if left out.
        scale: :math:`s_t` > 0 of every level; ones if left out.

    Raises:
        InvalidInput: For values outside these ranges.
        NegationMismatch, UnsoundCombination: If the guard's negation set lives in another space, has other labels, or
            follows a store (when the guard is built); from the pipeline's call, if a trajectory begins after the levels
            that are read.

    Cost:
        No network evaluation; a projection of ``D × k`` and a ``(batch, n)`` distance matrix in ``k`` dimensions.

    Example::

        seen = steerclear.see(pipe, negation, safe, "a {}".format, num_inference_steps=25, guidance_scale=3.0)
        weight = Seen.calibrated(seen, false_positives=0.03)
        guard = ConditionalRelease(negation=negation, weight=weight, strength=1.0, fallback=weight.substitute)
    """

    width: float = 0.3
    prior: float = 0.5
    threshold: float = 0.0
    centre: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.references.log_snr)
        object.__setattr__(self, "centre", self.centre or (0.0,) * levels)
        object.__setattr__(self, "scale", self.scale or (1.0,) * levels)
        if not 0.0 < self.prior < 1.0:
            raise InvalidInput(f"Seen: expected 0 < prior < 1, got {self.prior}; strength=0 is how to switch off")
        if not math.isfinite(self.threshold):
            raise InvalidInput(f"Seen: expected a finite threshold, got {self.threshold}")
        if (len(self.centre), len(self.scale)) != (levels, levels) or min(self.scale) <= 0.0:
            raise InvalidInput(f"Seen: expected a centre and a scale > 0 for each of {levels} levels, got others")

    @classmethod
    def calibrated(
        cls,
        references: SeenReferences,
        *,
        false_positives: float,
        width: float = 0.4,
        slope: float = 20.0,
        until: float = 0.7,
    ) -> "Seen":
        """The weight that reaches 1/2 somewhere along the trajectory of a stated share of safe references.

        Every safe reference is scored against all the others, at every level: held-out noised references.

        Args:
            references: At least two of them safe.
            false_positives: That share, inside (0, 1).
            width: :math:`q`.
            slope: How sharply the weight rises there.
            until: Share of the levels that is read.

        Raises:
            InvalidInput: For a share outside (0, 1), or a single safe reference.

        Cost:
            One ``(n, n)`` distance matrix per level.
        """
        safe = ~references.flagged
        if not 0.0 < false_positives < 1.0 or int(safe.sum()) < 2:
            raise InvalidInput(
                f"Seen: expected false_positives inside (0, 1) and two safe references, got {false_positives} and "
                f"{int(safe.sum())}"
            )
        plain = cls(references=references, width=width, until=until)
        levels = range(len(references.log_snr))
        null = torch.stack([_log_ratio(plain.left_out(index)[safe], ~safe) for index in levels], 1).double()
        centre = null.quantile(0.9, 0)
        scale = (null.quantile(0.98, 0) - null.quantile(0.5, 0)).clamp_min(1e-6)
        highest = ((null - centre) / scale)[:, : plain.read].max(1).values
        return cls(
            references=references,
            width=width,
            slope=slope,
            until=until,
            threshold=float(highest.quantile(1.0 - false_positives)),
            centre=tuple(centre.tolist()),
            scale=tuple(scale.tolist()),
        )

    def evidence(self, negation: References, estimate: Tensor, state: DenoiseState, owner: object) -> Tensor:
        self.started(state, owner)
        return self.odds(estimate, state.level)

    def log_odds(self, unsafe: Posterior, denoised: Tensor, state: DenoiseState, owner: object) -> Tensor:
        self.started(state, owner)
        return self.odds(denoised, state.level)

    def odds(self, estimate: Tensor, level: NoiseLevel) -> Tensor:
        """Log-odds of an estimate at a noise level, ``(batch,)``."""
        index = self.references.level(level)
        if index >= self.read:
            return torch.full((len(estimate),), -math.inf, device=estimate.device)
        flagged = self.references.flagged.to(estimate.device)
        ratio = _log_ratio(self.kernels(self.references.project(estimate), index), flagged)
        score = (ratio - self.centre[index]) / self.scale[index] - self.threshold
        return self.slope * score + logit(self.prior)

    def substitute(self, estimate: Tensor, state: DenoiseState) -> list[str]:
        """The caption of the safe reference that each estimate is most like; waits for the device."""
        kernels = self.kernels(self.references.project(estimate), self.references.level(state.level))
        flagged = self.references.flagged.to(kernels.device)
        nearest: list[int] = kernels.masked_fill(flagged, -math.inf).argmax(1).tolist()
        return [self.references.captions[index] for index in nearest]

    def left_out(self, index: int) -> Tensor:
        """Log-kernels among the references at a level, each blind to itself, ``(n, n)``."""
        return self.kernels(self.references.points[index], index).fill_diagonal_(-math.inf)


def _log_ratio(kernels: Tensor, flagged: Tensor) -> Tensor:
    """Mean unsafe over mean safe kernel, in logarithms, ``(batch,)``."""
    sizes = flagged.sum().log() - (~flagged).sum().log()
    unsafe = kernels.masked_fill(~flagged, -math.inf).logsumexp(1)
    return unsafe - kernels.masked_fill(flagged, -math.inf).logsumexp(1) - sizes
