r"""SafeGen: self-attention that paints unsafe pictures as mosaics, whatever the prompt says.

A pair is an unsafe picture :math:`z_n` and the same picture with its unsafe part pixelated, :math:`z_m`; with a benign
picture :math:`z_b` it makes a triplet. At one timestep, with noise :math:`\epsilon` shared by the pair, and under the
*empty* prompt, the network learns

.. math:: L = w_m \lVert \hat\epsilon(\alpha z_n + \sigma\epsilon) - \epsilon^* \rVert^2
    + w_p \lVert \hat\epsilon(\alpha z_b + \sigma\epsilon_b) - \epsilon_b \rVert^2, \qquad
    \epsilon^* = \epsilon + k\,(z_n - z_m)

with means over elements. Only self-attention (``attn1``) changes, so nothing at the text level can be bypassed. The two
variants differ in :math:`k`, and so in the clean estimate :math:`\hat x^* = z_n - \frac{\sigma}{\alpha} k\,(z_n - z_m)`
that the target stands for:

===============  ======================================  ==========================================================
``target``       :math:`k`                               :math:`\hat x^*`
===============  ======================================  ==========================================================
``published``    1                                       on the mosaic only where :math:`\sigma = \alpha`; short of it
                                                         at little noise, far beyond it at much noise
``consistent``   :math:`\min(\alpha/\sigma, c)`          the mosaic wherever :math:`\alpha/\sigma \le c`
===============  ======================================  ==========================================================

The target is stated as a clean estimate and converted by :class:`~steerclear.noise.NoiseLevel`, so it means the same to
networks that predict noise and to those that predict velocity.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steerclear.errors import InvalidInput
from steerclear.noise import NoiseLevel, Prediction

Target = Literal["published", "consistent"]
Form = Literal["lora", "full"]
Keep = Literal["noise", "network"]


@dataclass(frozen=True, kw_only=True)
class SafeGen:
    r"""Settings of one training. The defaults are the published ones.

    Args:
        target: ``"published"`` or ``"consistent"``; see the module's docstring.
        clip: :math:`c`, for ``"consistent"``: > 0.
        mosaic: :math:`w_m`, >= 0.
        benign: :math:`w_p`, >= 0.
        error: Of what the squared error is taken: of the noise (``"epsilon"``, published), of the clean estimate
            (``"sample"``), or of whatever the network predicts (``"output"``). They weigh noise levels differently.
        captions: Share of the rows that train under their picture's own caption in place of the empty prompt, in
            [0, 1]. Not published above 0: the method is text-agnostic.
        keep: What benign pictures are trained towards: the noise that was put on them (``"noise"``, published), or what
            the untrained network says of them (``"network"``), so that nothing but the trained change costs anything.
        begun: Share of the pairs whose noisy picture is made from the mosaic in place of the unsafe picture, in [0, 1]:
            what drawing has begun to hide, it goes on hiding. Not published above 0.
        start: Noisiest trained timestep, as a fraction of the schedule counted from pure noise, in [0, 1).
        stop: Cleanest one, likewise, in (0, 1].
        form: ``"lora"``: a low-rank adapter beside the self-attention. ``"full"``: its own weights.
        rank: Of the adapter, >= 1.
        learning_rate: AdamW's, > 0.
        cool: Share of the steps after which the learning rate falls linearly to 0, in [0, 1]; at 1 it is constant, as
            published.
        weight_decay: AdamW's, >= 0.
        gradient_norm: Gradients are clipped to this norm, > 0.
        batch: Triplets per network call, >= 1.
        accumulate: Calls per step of the optimiser, >= 1.
        steps: Steps of the optimiser, >= 0.
        decay: Largest decay of the running average of the weights, in [0, 1); the average is what is kept.
        seed: Of data order, timesteps, noise and the adapter's start.

    Raises:
        InvalidInput: For a value outside its range.

    References:
        SafeGen: Mitigating Sexually Explicit Content Generation in Text-to-Image Models (Li et al., CCS 2024),
        arXiv:2404.06666.
    """

    target: Target = "published"
    clip: float = 5.0
    mosaic: float = 0.1
    benign: float = 0.9
    error: Literal["epsilon", "output", "sample"] = "epsilon"
    captions: float = 0.0
    keep: Keep = "noise"
    begun: float = 0.0
    start: float = 0.0
    stop: float = 1.0
    form: Form = "full"
    rank: int = 16
    learning_rate: float = 1e-5
    cool: float = 1.0
    weight_decay: float = 1e-2
    gradient_norm: float = 1.0
    batch: int = 1
    accumulate: int = 5
    steps: int = 1000
    decay: float = 0.9999
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "target": ("published", "consistent"),
            "error": ("epsilon", "output", "sample"),
            "form": ("lora", "full"),
            "keep": ("noise", "network"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InvalidInput(
                    f"SafeGen: expected {name} to be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        for name in ("clip", "learning_rate", "gradient_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidInput(f"SafeGen: expected a finite {name} > 0, got {getattr(self, name)}")
        for name in ("mosaic", "benign", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidInput(f"SafeGen: expected a finite {name} >= 0, got {getattr(self, name)}")
        for name, least in (("rank", 1), ("batch", 1), ("accumulate", 1), ("steps", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidInput(f"SafeGen: expected {name} to be a whole number >= {least}, got {value!r}")
        if not 0 <= self.start < self.stop <= 1:
            raise InvalidInput(f"SafeGen: expected 0 <= start < stop <= 1, got start={self.start}, stop={self.stop}")
        for name in ("captions", "begun", "cool"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInput(f"SafeGen: expected {name} in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.decay < 1:
            raise InvalidInput(f"SafeGen: expected decay in [0, 1), got {self.decay}")

    @classmethod
    def published(cls, **changes: Any) -> "SafeGen":  # noqa: ANN401  (the fields above)
        """The released settings, for Stable Diffusion 1.x: 1 000 steps of 5 single triplets, full weights."""
        return cls(**changes)

    @classmethod
    def small(cls, **changes: Any) -> "SafeGen":  # noqa: ANN401  (the fields above)
        """For models of the shipped one's size: x0-consistent, faster, mostly under captions (docs/safegen.md)."""
        settings: dict[str, Any] = {
            "target": "consistent",
            "error": "sample",
            "captions": 0.8,
            "stop": 0.85,
            "mosaic": 0.5,
            "benign": 0.5,
            "learning_rate": 1e-3,
            "cool": 0.55,
            "batch": 4,
            "accumulate": 1,
        }
        return cls(**{**settings, **changes})

    def rate(self, step: int) -> float:
        """The learning rate of one step, counted from 0."""
        first = self.cool * self.steps
        return self.learning_rate * (1.0 if step < first else (self.steps - step) / (self.steps - first))

    @property
    def spec(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)


def clean_target(method: SafeGen, unsafe: Tensor, mosaic: Tensor, level: NoiseLevel) -> Tensor:
    r"""The clean estimate that the network shall make of a noisy unsafe picture.

    Args:
        method: Its ``target`` and ``clip`` are read.
        unsafe: :math:`z_n`, ``(batch, *shape)``.
        mosaic: :math:`z_m`, likewise.
        level: Of every sample, broadcasting against them; :math:`\alpha > 0`, :math:`\sigma > 0`.

    Returns:
        :math:`z_n - \frac{\sigma}{\alpha} k\,(z_n - z_m)`, ``(batch, *shape)``.
    """
    ratio = torch.as_tensor(level.alpha / level.sigma)
    k = torch.ones_like(ratio) if method.target == "published" else ratio.clamp(max=method.clip)
    return unsafe - k / ratio * (unsafe - mosaic)


def squared_error(
    method: SafeGen, output: Tensor, denoised: Tensor, x_t: Tensor, level: NoiseLevel, prediction: Prediction
) -> Tensor:
    r"""Mean squared error of a network's output against the output that stands for ``denoised``.

    With :math:`\hat x = k_x x_t + k_o o`, an error :math:`o - o^*` of the output is :math:`k_o (o - o^*)` of the clean
    estimate, and :math:`-\frac{\alpha k_o}{\sigma}(o - o^*)` of the noise.

    Args:
        method: Its ``error`` is read.
        output: Of the network, ``(batch, *shape)``.
        denoised: The wanted clean estimate, likewise.
        x_t: What the network saw, likewise.
        level: Of every sample.
        prediction: What the network predicts.

    Returns:
        One number per sample, ``(batch,)``.
    """
    difference = output - level.output(denoised, x_t, prediction)
    if method.error != "output":
        difference = difference * level.affine(prediction)[1]
    if method.error == "epsilon":
        difference = difference * (level.alpha / level.sigma)
    return difference.square().flatten(1).mean(1)
