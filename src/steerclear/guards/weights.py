r"""How a guard comes to know :math:`w = P(\text{unsafe} \mid x_t)`: three estimators, one interface.

Every estimator returns the log-odds :math:`\log\frac{w}{1-w}`, because the safe denoiser's factor is
:math:`\beta = w/(1-w)`, which log-odds give without cancellation as :math:`w \to 1`.

================  =====================================================  ==============================================
estimator         knows                                                  sound
================  =====================================================  ==============================================
:class:`TwoSample`  a safe reference set beside the negation set           with any sampler
:class:`Dynamic`    the two reverse kernels along the trajectory           with samplers that add noise between steps
:class:`Gate`       nothing: a threshold on the unsafe evidence            never exact; kept for comparison
================  =====================================================  ==============================================

See docs/safe-denoiser.md for when each is sound, with measurements.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.guards.base import Requires
from steerclear.guards.subspace import Subspace
from steerclear.guards.tracking import Prediction, check_belief, log_odds
from steerclear.negation import Posterior, References
from steerclear.negation.references import at_present
from steerclear.noise import NoiseLevel


@dataclass(frozen=True, kw_only=True, eq=False)
class Weight(ABC):
    r"""How images are compared, and how likely the sample is to become an unsafe one.

    Args:
        bandwidth: ``None`` compares :math:`x_t` with the noised references at the step's own level: the theorem. A
            number compares the denoised estimate with the clean references through a Gaussian of that standard
            deviation, in scaled-latent units: a documented departure for high dimensions, where the exact kernel
            collapses to one neighbour.
        temperature: Multiplies the kernel's variance, > 0; 1 is the theorem, more lets more references count.
    """

    bandwidth: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.bandwidth is not None and not 0.0 < self.bandwidth < math.inf:
            raise InvalidInput(
                f"bandwidth: expected a positive number of latent units, or None for the step's own noise level, "
                f"got {self.bandwidth}"
            )
        if not 0.0 < self.temperature < math.inf:
            raise InvalidInput(f"temperature: expected a number > 0, got {self.temperature}")

    @property
    def requires(self) -> Requires:
        """What the estimator needs from the sampler."""
        return Requires()

    def check(self, negation: References) -> None:
        """Raises if this weight cannot be estimated for that negation set; any will do unless overridden."""
        return

    def at(self, negation: References, state: DenoiseState, owner: object) -> "tuple[References, Weight]":
        """The negation set and this weight as one trajectory of ``owner`` goes by them, first step to last.

        Where either follows a store, what was checked when the guard was built is checked again of what the trajectory
        begins with. An empty negation set passes: its guard has nothing to do.

        Raises:
            NegationMismatch, UnsoundCombination: As :meth:`check`.
        """
        known: tuple[References, Weight] | None = state.memory.get((owner, Weight))
        if known is not None:
            return known
        now, weight = negation.at(state), self._at(state)
        if now is not negation or weight is not self:
            if len(now):
                weight.check(now)
            state.memory[(owner, Weight)] = (now, weight)
        return now, weight

    def _at(self, state: DenoiseState) -> "Weight":
        """This weight with its own references as they are when the trajectory begins."""
        return self

    def posterior(self, references: References, denoised: Tensor, state: DenoiseState) -> Posterior:
        """Mean and log-evidence of ``references`` as seen from this step, through this weight's kernel."""
        width = math.sqrt(self.temperature)
        if self.bandwidth is None:
            level = NoiseLevel(state.level.alpha, state.level.sigma * width)
            return references.posterior(state.x_t, level)
        return references.posterior(denoised, NoiseLevel(1.0, self.bandwidth * width))

    def evidence(self, negation: References, estimate: Tensor, state: DenoiseState, owner: object) -> Tensor:
        """Log-odds of an estimate for guards that need no posterior mean; estimators that can skip it do."""
        return self.log_odds(self.posterior(negation, estimate, state), estimate, state, owner)

    @abstractmethod
    def log_odds(self, unsafe: Posterior, denoised: Tensor, state: DenoiseState, owner: object) -> Tensor:
        r""":math:`\log\frac{w}{1-w}` of every sample, shape ``(batch,)``, float32 at least.

        Args:
            unsafe: The negation set's :meth:`posterior` at this step.
            denoised: The unguided estimate, ``(batch, *shape)``.
            state: The step.
            owner: The guard that asks; keys what the estimator remembers along a trajectory.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class TwoSample(Weight):
    r"""Evidence of the negation set against the evidence of a safe reference set.

    .. math:: \log\frac{w}{1-w} = \log\frac{\pi}{1-\pi}
        + a \bigl(\log \hat q_{unsafe} - \log \hat q_{safe}\bigr) + b, \qquad
        \hat q = \sum_n \frac{w_n}{\sum_m w_m} k(\cdot, y_n)

    Evidences are means over each set, so the sizes of the sets drop out and only the prior :math:`\pi` speaks about how
    common unsafe data is. With Dirac data, ``bandwidth=None`` and :math:`a = 1, b = 0` this is the exact posterior.

    Args:
        safe: What the model should go on drawing, in the same space as the negation set. It may follow a store, too.
        prior: :math:`\pi`, the unsafe share of what the model would draw, inside (0, 1).
        slope: :math:`a` > 0, an inverse temperature outside the kernel; see :func:`~steerclear.guards.calibrate`.
        offset: :math:`b`, in log-odds, fitted together with the slope.
        subspace: Compare there instead of in the sampler's space; needs a bandwidth. Made from the same two sets; the
            guard may hold them in another form, such as an :class:`~steerclear.negation.IndexedSet`.

    Raises:
        InvalidInput: For values outside these ranges.
        NegationMismatch: If the two sets live in different spaces (when the guard is built).
        UnsoundCombination: If a picture is in both sets (when the guard is built).

    Cost:
        No network evaluation; one ``(batch, n)`` distance matrix per set and step.
    """

    safe: References
    prior: float = 0.5
    slope: float = 1.0
    offset: float = 0.0
    subspace: Subspace | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subspace is not None and (self.bandwidth is None or len(self.subspace.safe) != len(self.safe)):
            raise InvalidInput(
                "TwoSample: expected a subspace of its own safe set, and a bandwidth beside it, got "
                f"{len(self.subspace.safe)} items for {len(self.safe)} and bandwidth={self.bandwidth}; "
                "make one with Subspace.principal(negation, safe, components)"
            )
        if not 0.0 < self.prior < 1.0:
            raise InvalidInput(f"TwoSample: expected 0 < prior < 1, got {self.prior}; strength=0 is how to switch off")
        if not 0.0 < self.slope < math.inf or not math.isfinite(self.offset):
            raise InvalidInput(
                f"TwoSample: expected a finite slope > 0 and a finite offset, got slope={self.slope}, "
                f"offset={self.offset}; a slope <= 0 would call safe what resembles the negation set"
            )

    @property
    def requires(self) -> Requires:
        return Requires(negation=(self.safe,))

    def _at(self, state: DenoiseState) -> "TwoSample":
        now = self.safe.at(state)
        return self if now is self.safe else replace(self, safe=now)

    def check(self, negation: References) -> None:
        negation.space.require(self.safe.space)
        if not len(self.safe):
            raise UnsoundCombination(
                "TwoSample: expected a safe reference set with at least one item, got an empty one, against which "
                "everything is unsafe; add what the model should go on drawing"
            )
        made = () if self.subspace is None else ((self.subspace.unsafe, negation), (self.subspace.safe, self.safe))
        if not all(_same(then, now) for then, now in made):
            raise UnsoundCombination(
                "TwoSample: the subspace was made from another negation set or safe set than the guard's; make it from "
                "these: Subspace.principal(negation, safe, components)"
            )
        shared = sorted((set(self.safe.digests) - {""}).intersection(negation.digests))
        if shared:
            raise UnsoundCombination(
                f"TwoSample: {len(shared)} pictures are in the negation set and in the safe set ({shared[0][:23]}…); "
                f"their evidences cancel there. Remove them from one of the two"
            )

    def evidence(self, negation: References, estimate: Tensor, state: DenoiseState, owner: object) -> Tensor:
        if self.subspace is None or self.bandwidth is None:
            return super().evidence(negation, estimate, state, owner)
        return self.odds(self.subspace.log_ratio(estimate, self.bandwidth * math.sqrt(self.temperature)))

    def log_odds(self, unsafe: Posterior, denoised: Tensor, state: DenoiseState, owner: object) -> Tensor:
        if self.subspace is not None and self.bandwidth is not None:
            return self.odds(self.subspace.log_ratio(denoised, self.bandwidth * math.sqrt(self.temperature)))
        safe = self.posterior(self.safe, denoised, state)
        return self.odds(unsafe.log_evidence - safe.log_evidence)

    def odds(self, ratio: Tensor) -> Tensor:
        r"""Log-odds from the log-ratio of the evidences, whatever their space."""
        return self.slope * ratio + (self.offset + logit(self.prior))


@dataclass(frozen=True, kw_only=True, eq=False)
class Dynamic(Weight):
    r"""The posterior tracked along the trajectory by Bayes' rule on the two reverse kernels.

    .. math::
        p \leftarrow \operatorname{clip}\Bigl(p \exp\frac{-\tau\,(\lVert x_s - \mu_{unsafe}\rVert^2
        - \lVert x_s - \mu\rVert^2) + \delta}{2 \tilde\sigma^2},\; p_{min}, p_{max}\Bigr), \qquad
        \mu = c_0 \hat x + c_t x_t

    where :math:`x_s` is the sample that was really drawn, :math:`\hat x` the unguided estimate and
    :math:`\mu_{unsafe}` the same with the negation set's posterior mean in place of a negative prompt's prediction.
    Both kernels and :math:`\tilde\sigma^2` are :meth:`~steerclear.noise.NoiseLevel.reverse`. In log space, per sample;
    a step whose kernel has no variance is not counted.

    Args:
        prior: Unsafe share of what the model would draw; where the tracking starts.
        tau: Tempering of the distances, > 0; 1 is Bayes' rule, less compensates high dimensions.
        delta: Drift added to every update, in squared latent units; 0 is Bayes' rule.
        bounds: Lowest and highest tracked probability. The highest also bounds beta at ``p/(1-p)``.

    Raises:
        InvalidInput: For values outside these ranges.
        UnsoundCombination: With a sampler known to add no noise: there the log-ratio can only fall.

    Cost:
        No network evaluation; remembers three tensors like ``x_t``.

    References:
        Dynamic Negative Guidance of Diffusion Models (Koulischer et al., ICLR 2025), arXiv:2410.14398.
    """

    prior: float
    tau: float = 1.0
    delta: float = 0.0
    bounds: tuple[float, float] = (1e-6, 0.99)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_belief("Dynamic", self.prior, self.bounds, self.tau, self.delta)

    @property
    def requires(self) -> Requires:
        return Requires(stochastic=True, one_call=True)

    def log_odds(self, unsafe: Posterior, denoised: Tensor, state: DenoiseState, owner: object) -> Tensor:
        now = Prediction.of(state, denoised, unsafe.mean)
        settings = {"prior": self.prior, "tau": self.tau, "delta": self.delta}
        return log_odds((owner, Dynamic), now, state, **settings, bounds=self.bounds)


@dataclass(frozen=True, kw_only=True, eq=False)
class Gate(Weight):
    r"""The paper's constant strength behind a gate: :math:`\beta = 1` where the unsafe evidence is high enough, else 0.

    .. math:: \beta = \mathbf 1\bigl[\log \hat q_{unsafe} \ge \text{threshold}\bigr]

    so ``strength`` is the whole size of the correction. Not a posterior weight: it does not know what else the sample
    could become. Use it inside :func:`~steerclear.guards.during`, early, as the paper does.

    Args:
        threshold: Log-evidence from which the gate is open; ``-inf`` is always open. Depends on the noise level and the
            dimension: read typical values from the trace's note "evidence" with ``strength=0``.
    """

    threshold: float = -math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.isnan(self.threshold) or self.threshold == math.inf:
            raise InvalidInput(f"Gate: expected a threshold below infinity, got {self.threshold}; it would never open")

    def log_odds(self, unsafe: Posterior, denoised: Tensor, state: DenoiseState, owner: object) -> Tensor:
        evidence = unsafe.log_evidence
        return torch.where(evidence >= self.threshold, torch.zeros_like(evidence), -math.inf)


def require_fixed(name: str, negation: References) -> None:
    """Refuse a set that follows its store, for weights whose references were made once.

    Raises:
        UnsoundCombination: For one.
    """
    if at_present(negation) is not negation:
        raise UnsoundCombination(
            f"{name}: expected a negation set that stays as it is, got one that follows its store: the references that "
            "the model has seen were made once, and would know nothing of an item added later. Give store.snapshot() "
            "and build the guard again after a change, or use TwoSample, Dynamic or SPELL, which follow"
        )


def _same(then: References, now: References) -> bool:
    """Whether two forms hold the same pictures in the same order: by digest, for an id may come to name another one,
    and by id; an index and statistics have none, there by label."""
    name = "ids" if hasattr(then, "ids") and hasattr(now, "ids") else "labels"
    return then.digests == now.digests and getattr(then, name) == getattr(now, name)


def logit(p: float) -> float:
    """``log(p / (1 - p))``."""
    return math.log(p) - math.log1p(-p)
