r"""Dynamic Negative Guidance of Diffusion Models (Koulischer et al., ICLR 2025), arXiv:2410.14398.

Samples that are *not* of a class :math:`c` have the score

.. math:: \nabla\log p_t(x \mid \neg c) = \nabla\log p_t(x)
    - \frac{p}{1-p}\bigl(\nabla\log p_t(x \mid c) - \nabla\log p_t(x)\bigr), \qquad p = P(c \mid x_t)

a negative prompt whose strength is each sample's own odds of becoming what is not wanted. The odds are tracked along
the trajectory by Bayes' rule on two reverse kernels, with the text and without (guards/tracking.py). Where the text is
unrelated to what is drawn, :math:`p` decays and the guidance switches itself off.

With classifier-free guidance there is a choice of which predictions to track. Here they are the raw ones, without any
prompt and with the unwanted text: the rule is meaningful for two models of the data, and holds at whatever sample was
really drawn. The push is added to the guided estimate. What the authors did for Stable Diffusion is not known to us.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput
from steerclear.guards.base import Requires
from steerclear.guards.concepts import Text, alone, branch, checked_text, estimate
from steerclear.guards.tracking import Prediction, check_belief, log_odds, wide
from steerclear.noise import per_sample


@dataclass(frozen=True, kw_only=True, eq=False)
class DynamicNegativeGuidance:
    r"""Pushes away from a text as strongly as the sample is on its way to show it.

    .. math:: \hat x' = \hat x - \lambda_0 \frac{p}{1-p}\,(\hat x_n - \hat x_\varnothing), \qquad
        p \leftarrow \operatorname{clip}\Bigl(p \exp\frac{-\tau\,(\lVert x_s - \mu_n\rVert^2
        - \lVert x_s - \mu_\varnothing\rVert^2) + \delta}{2\tilde\sigma^2},\; p_{min}, p_{max}\Bigr)

    with :math:`\mu = c_0\hat x + c_t x_t` (:meth:`~steerclear.noise.NoiseLevel.reverse`) and :math:`x_s` the sample
    that was really drawn. In log space, per sample; a step whose kernel has no variance is not counted.

    Args:
        prompt: What is not wanted, or one text per sample.
        strength: :math:`\lambda_0 \ge 0`; 1 is Bayes' rule. At 0 the guard tracks and changes nothing.
        prior: :math:`p` at the first step: the share of what the model draws without a prompt that is not wanted.
        tau: :math:`\tau > 0`, tempering of the distances; 1 is Bayes' rule. Distances are sums over all elements, so
            they grow with the picture; published values for Stable Diffusion are 0.2 to 0.3.
        delta: :math:`\delta`, drift of every update, in squared latent units; 0 is Bayes' rule.
        bounds: :math:`(p_{min}, p_{max})`. The highest also bounds the push, at
            :math:`\lambda_0\, p_{max}/(1-p_{max})`: 99 at 0.99, 4 at 0.8.

    Call:
        denoised: The guided estimate, ``(batch, *shape)``. What an earlier guard changed in it is kept.
        state: The step, with branches. A negative prompt of the pipeline's call takes the place of :math:`\varnothing`.

    Returns:
        The guarded estimate in the shape, dtype and device of ``denoised``; ``None`` at strength 0.

    Notes in the trace:
        ``weight``: :math:`p`; ``beta``: :math:`\lambda_0\,p/(1-p)`.

    Raises:
        InvalidInput: For values outside these ranges.
        UnsoundCombination: From the pipeline's call: with a sampler that adds no noise, where the ratio of the kernels
            can only fall; without classifier-free guidance; together with SLD from the same concept.

    Cost:
        One network evaluation a step, also at strength 0; remembers three tensors like ``x_t``.

    Equal to:
        :class:`~steerclear.guards.NegativePrompt` of strength :math:`\lambda_0\,p/(1-p)` while :math:`p` is constant;
        exact on mixtures as steps become small (tests/test_dynamic_negative.py).

    References:
        Dynamic Negative Guidance of Diffusion Models (Koulischer et al., ICLR 2025), arXiv:2410.14398.

    Example::

        guard = DynamicNegativeGuidance.stable_diffusion("a dining table")
        with steerclear.attach(pipe, guard):  # pipe.scheduler is a DDPMScheduler
            image = pipe("a medieval feast").images[0]
    """

    prompt: Text
    strength: float = 1.0
    prior: float = 0.2
    tau: float = 1.0
    delta: float = 0.0
    bounds: tuple[float, float] = (1e-6, 0.99)

    def __post_init__(self) -> None:
        name = "DynamicNegativeGuidance"
        object.__setattr__(self, "prompt", checked_text(name, self.prompt))
        if not 0.0 <= self.strength < math.inf:
            raise InvalidInput(f"{name}: expected a finite strength >= 0, got {self.strength}")
        check_belief(name, self.prior, self.bounds, self.tau, self.delta)

    @classmethod
    def published(cls, prompt: Text) -> "DynamicNegativeGuidance":
        """The defaults of the authors' code, for classes of MNIST and CIFAR-10 in 1,000 DDPM steps: Bayes' rule."""
        return cls(prompt=prompt)

    @classmethod
    def readme(cls, prompt: Text) -> "DynamicNegativeGuidance":
        """The example command in the authors' repository, with its drift, which the released driver does not read."""
        return cls(prompt=prompt, strength=5.0, prior=0.01, tau=0.2, delta=2e-4, bounds=(1e-6, 0.8))

    @classmethod
    def stable_diffusion(
        cls, prompt: Text, *, strength: float = 21.0, tau: float = 0.2, delta: float = 0.004
    ) -> "DynamicNegativeGuidance":
        """Values for Stable Diffusion, DDPM, CFG 7.5, as a third party quotes them; they were tuned prompt by prompt.

        Strength 12 to 27, tau 0.2 to 0.3, delta 0.002 to 0.004 (docs/negative-prompts.md lists them).
        """
        return cls(prompt=prompt, strength=strength, prior=0.01, tau=tau, delta=delta)

    @property
    def requires(self) -> Requires:
        """The branches of guidance, the network, and one noisy step per evaluation."""
        return Requires(branches=True, stochastic=True, one_call=True)

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor | None:
        name = "DynamicNegativeGuidance"
        alone(self, self.prompt, state)
        unconditional = branch(name, "unconditional", state)
        negative = estimate(name, self.prompt, state)
        settings: dict[str, Any] = {"prior": self.prior, "tau": self.tau, "delta": self.delta, "bounds": self.bounds}
        odds = log_odds((self, "tracked"), Prediction.of(state, unconditional, negative), state, **settings)
        beta = self.strength * odds.exp()
        state.note("weight", odds.sigmoid())
        state.note("beta", beta)
        if self.strength == 0.0:
            return None
        x = wide(denoised)
        return (x - per_sample(beta, x).to(x.dtype) * (negative - unconditional)).to(denoised.dtype)
