r"""Leads a pipeline along noised references, and records what the model makes of them.

A guard that returns a reference :math:`y` as the denoised estimate of every step makes the sampler walk along
:math:`x_t = \alpha_t y + \sigma_t \epsilon` (from pure noise, the noise that the sampler then believes in is the noise
that was there), whatever the scheduler and the prediction type. At every step the network is evaluated there under the
prompt: its estimate, conditional or guided, is the reference as the model denoises it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerclear.attach.api import attach
from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput
from steerclear.guards.base import Requires
from steerclear.guards.seen_references import SeenReferences, log_snr_of
from steerclear.negation import NegationSet


@dataclass(frozen=True, eq=False)
class Walk:
    """Holds the sampler on ``references``; remembers level and estimate of every step, conditional or ``guided``."""

    references: Tensor
    guided: bool = False
    log_snr: list[float] = field(default_factory=list[float])
    estimates: list[Tensor] = field(default_factory=list[Tensor])

    @property
    def requires(self) -> Requires:
        """The branches, unless ``guided``."""
        return Requires(branches=not self.guided, one_call=True)

    def __call__(self, denoised: Tensor, state: DenoiseState) -> Tensor:
        self.log_snr.append(log_snr_of(state.level))
        estimate = denoised if self.guided else state.branches["conditional"]
        self.estimates.append(estimate.detach().cpu().half())
        return self.references.to(denoised)


def walk_along(
    pipe: Any,  # noqa: ANN401 - any diffusers pipeline
    references: Tensor,
    prompts: Sequence[Any],
    *,
    guided: bool = False,
    seed: int = 0,
    batch: int = 16,
    progress: Callable[[int], object] = lambda done: None,
    **call: Any,  # noqa: ANN401 - for the pipeline
) -> tuple[list[float], Tensor]:
    """What the model makes of every noised row of ``references`` under its prompt, or its class.

    Returns:
        Log-SNR of every level, and estimates ``(levels, n, *shape)`` in half precision.
    """
    log_snr: list[float] = []
    parts: list[Tensor] = []
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        guard, said = Walk(references[rows], guided), list(prompts[rows])
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(said))]
        with attach(pipe, guard):
            pipe(said, generator=generators, output_type="latent", **call)
        log_snr = guard.log_snr
        parts.append(torch.stack(guard.estimates))
        progress(len(said))
    return log_snr, torch.cat(parts, 1)


def walk(
    pipe: Any,  # noqa: ANN401 - any diffusers pipeline
    references: NegationSet,
    caption: Callable[[str], str] = str,
    **settings: Any,  # noqa: ANN401 - of walk_along
) -> tuple[list[float], Tensor]:
    """:func:`walk_along` every reference under ``caption(label)``.

    Raises:
        InvalidInput: If a reference has no label: at high noise only the label says what it shows.
    """
    if not all(references.labels):
        raise InvalidInput(
            "see: expected a label on every reference, because at high noise only the label says what it shows; "
            "NegationSet.encode(..., labels=...)"
        )
    return walk_along(pipe, references.latents, [caption(label) for label in references.labels], **settings)


def see(
    pipe: Any,  # noqa: ANN401 - any diffusers pipeline
    negation: NegationSet,
    safe: NegationSet,
    caption: Callable[[str], str] = str,
    *,
    components: int = 128,
    **settings: Any,  # noqa: ANN401 - of walk_along
) -> SeenReferences:
    """Both reference sets as the model denoises them at every noise level of its schedule.

    Args:
        pipe: The pipeline that will be guarded, with classifier-free guidance.
        negation: What to steer away from, every item labelled.
        safe: What to go on drawing, every item labelled; no label in both.
        caption: Label to prompt.
        components: Principal components to keep.
        settings: ``seed``, ``batch``, ``progress``, and arguments of the pipeline's call such as
            ``num_inference_steps`` (the number of noise levels).

    Raises:
        InvalidInput: If an item has no label, or a label is in both sets.

    Cost:
        One guided generation, without decoding, per reference; once per model, kept with :meth:`SeenReferences.save`.
    """
    shared = sorted(set(negation.labels) & set(safe.labels))
    if shared:
        raise InvalidInput(f"see: expected labels that are unsafe or safe, got both for {', '.join(shared[:5])}")
    log_snr, unsafe = walk(pipe, negation, caption, **settings)
    _, others = walk(pipe, safe, caption, **settings)
    estimates = torch.cat([unsafe, others], 1)
    labels = (*negation.labels, *safe.labels)
    return SeenReferences.of(
        log_snr,
        estimates,
        labels=labels,
        captions=[caption(label) for label in labels],
        unsafe=frozenset(negation.labels),
        space=negation.space,
        components=components,
    )
