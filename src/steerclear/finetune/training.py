"""The loop: the same weights for the same seed, whether or not it was interrupted.

Every random number of a step is made from the seed and the step's own number, so that nothing but the weights, their
running average and the optimiser's moments has to be kept to go on.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from steerclear.errors import InvalidInput
from steerclear.finetune import checkpoints
from steerclear.finetune.network import Network, trainable
from steerclear.finetune.safegen import SafeGen, clean_target, squared_error
from steerclear.finetune.triplets import Triplets
from steerclear.noise import NoiseLevel, per_sample

BETAS, EPSILON = (0.9, 0.999), 1e-8
EVERY = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a training leaves behind; the weights are in the pipeline.

    Args:
        method: Its settings.
        losses: ``(mosaic, benign)`` of every step, unweighted, means over the step's triplets.
        parameters: How many numbers were trained.
    """

    method: SafeGen
    losses: tuple[tuple[float, float], ...]
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draw:
    """What one network call trains on.

    Args:
        pairs: Rows of the pairs, ``(batch,)``.
        benign: Rows of the benign latents, ``(batch,)``.
        timesteps: ``(batch,)``, shared by pair and benign picture.
        epsilon: Noise of the pairs, ``(batch, *shape)``.
        epsilon_benign: Noise of the benign pictures.
        captioned: Whether to use the captions, ``(batch,)``.
        begun: Whether the mosaic is what gets noisy, ``(batch,)``.
    """

    pairs: Tensor
    benign: Tensor
    timesteps: Tensor
    epsilon: Tensor
    epsilon_benign: Tensor
    captioned: Tensor
    begun: Tensor


def train(
    pipe: Any,  # noqa: ANN401  (some diffusers pipeline)
    triplets: Triplets,
    method: SafeGen,
    *,
    checkpoint: str | Path | None = None,
    every: int = EVERY,
    until: int | None = None,
    progress: bool = True,
) -> Trained:
    """Trains the self-attention of ``pipe``, which afterwards holds the running average of the weights.

    Args:
        pipe: A text-to-image pipeline; changed: its network, and nothing else.
        triplets: In its space.
        method: Settings.
        checkpoint: File to go on from if it is there, and to write every ``every`` steps and at the end.
        every: Steps, >= 1.
        until: Stop after so many of the method's steps, >= 0; default: all. The learning rate is that of the whole
            schedule, and a checkpoint goes on from there.
        progress: Show a bar with the loss.

    Returns:
        The losses. With 0 steps the pipeline draws what it drew, bit for bit.

    Raises:
        UnsupportedPipeline: If the network, schedule or prompt cannot be trained this way.
        NegationMismatch: If the triplets come from another encoder.
        MissingExtra: If an adapter is wanted and PEFT is not installed.
        InvalidInput: If a checkpoint belongs to other settings, triplets or weights, or the loss is not finite.

    Cost:
        Per step ``accumulate`` forward and backward passes with ``2 * batch`` rows; ``keep="network"`` adds a forward
        pass with ``batch`` rows, and a copy of the trained weights.
    """
    from steerclear.negation import encoder_of

    encoder_of(pipe).space.require(triplets.space)
    captions = (*triplets.unsafe_captions, *triplets.benign_captions) if method.captions else ()
    network = Network.of(pipe, ("", *captions))
    if every < 1:
        raise InvalidInput(f"train: expected every >= 1, got {every}")
    if until is not None and until < 0:
        raise InvalidInput(f"train: expected until >= 0, got {until}")
    last = method.steps if until is None else min(until, method.steps)
    identity = checkpoints.identity(network.module, triplets, method)
    state = _State.start(network, method)
    losses: list[tuple[float, float]] = []
    if checkpoint is not None and Path(checkpoint).exists():
        losses = state.restore(checkpoints.read(Path(checkpoint), identity))
    with tqdm(total=last, initial=len(losses), desc="safegen", unit="step", disable=not progress) as bar:
        for step in range(len(losses), last):
            losses.append(_step(network, triplets, method, state, step))
            bar.set_postfix(mosaic=f"{losses[-1][0]:.3f}", benign=f"{losses[-1][1]:.3f}")
            bar.update()
            if checkpoint is not None and ((step + 1) % every == 0 or step + 1 == last):
                checkpoints.write(Path(checkpoint), identity, state.tensors(), losses)
    state.finish()
    return Trained(method=method, losses=tuple(losses), parameters=sum(p.numel() for p in state.parameters.values()))


def draw(method: SafeGen, triplets: Triplets, timesteps: int, call: int) -> Draw:
    """What network call ``call``, counted over all steps, trains on; a pass over the rows before any is repeated."""
    generator = _generator(method.seed, 0, call)
    first, last = round((1 - method.stop) * timesteps), round((1 - method.start) * timesteps)
    shape = (method.batch, *triplets.space.shape)
    presentations = range(call * method.batch, (call + 1) * method.batch)
    return Draw(
        pairs=_shuffled(method.seed, 1, len(triplets.unsafe), presentations),
        benign=_shuffled(method.seed, 2, len(triplets.benign), presentations),
        timesteps=torch.randint(first, max(first + 1, last), (method.batch,), generator=generator),
        epsilon=torch.randn(shape, generator=generator),
        epsilon_benign=torch.randn(shape, generator=generator),
        captioned=torch.rand(method.batch, generator=generator) < method.captions,
        begun=torch.rand(method.batch, generator=generator) < method.begun,
    )


def losses_of(
    network: Network, triplets: Triplets, method: SafeGen, draw: Draw, untrained: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Unweighted losses ``(batch,)`` of the mosaics and of the benign pictures, from one network call.

    ``untrained`` holds the weights before training, for ``method.keep == "network"``, which takes a second call.
    """
    place = network.device
    unsafe, mosaic = triplets.unsafe[draw.pairs].to(place), triplets.mosaic[draw.pairs].to(place)
    benign = triplets.benign[draw.benign].to(place)
    level = network.level(draw.timesteps, unsafe)
    unsafe = torch.where(per_sample(draw.begun.to(place), unsafe), mosaic, unsafe)
    noisy, kept = level.add(unsafe, draw.epsilon.to(place)), level.add(benign, draw.epsilon_benign.to(place))
    said = draw.captioned.tolist()
    texts, benign_texts = (
        [captions[row] if captioned else "" for row, captioned in zip(rows.tolist(), said, strict=True)]
        for rows, captions in ((draw.pairs, triplets.unsafe_captions), (draw.benign, triplets.benign_captions))
    )
    if method.keep == "network":
        with torch.no_grad():
            output = network(kept.to(network.module.dtype), draw.timesteps, benign_texts, untrained).float()
            benign = level.denoised(output, kept, network.prediction)
    x_t, wanted = torch.cat([noisy, kept]), torch.cat([clean_target(method, unsafe, mosaic, level), benign])
    both = NoiseLevel(*(torch.cat([each, each]) for each in (level.alpha, level.sigma)))  # pyright: ignore[reportArgumentType, reportCallIssue] - tensors here
    output = network(x_t.to(network.module.dtype), draw.timesteps.repeat(2), texts + benign_texts).float()
    error = squared_error(method, output, wanted, x_t, both, network.prediction)
    return error[: method.batch], error[method.batch :]


def _step(network: Network, triplets: Triplets, method: SafeGen, state: "_State", step: int) -> tuple[float, float]:
    sums = torch.zeros(2)
    for part in range(method.accumulate):
        call = draw(method, triplets, len(network.alphas_cumprod), step * method.accumulate + part)
        mosaic, benign = (loss.mean() for loss in losses_of(network, triplets, method, call, state.untrained))
        ((method.mosaic * mosaic + method.benign * benign) / method.accumulate).backward()
        sums += torch.stack([mosaic, benign]).detach().cpu() / method.accumulate
    if not bool(sums.isfinite().all()):
        raise InvalidInput(
            f"SafeGen: expected finite losses, got {sums.tolist()} in step {step + 1}; lower the learning rate, train "
            "in float32, or take target='consistent'"
        )
    torch.nn.utils.clip_grad_norm_(state.parameters.values(), method.gradient_norm)
    state.update(step)
    return float(sums[0]), float(sums[1])


class _State:
    """The trained weights, their running average and the optimiser."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], method: SafeGen) -> None:
        self.parameters, self.method = dict(parameters), method
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.untrained = (
            {name: value.clone() for name, value in self.average.items()} if method.keep == "network" else {}
        )
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(),
            lr=method.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=method.weight_decay,
        )

    @classmethod
    def start(cls, network: Network, method: SafeGen) -> "_State":
        return cls(trainable(network.module, method), method)

    def update(self, step: int) -> None:
        r"""One step of AdamW; then the average with decay :math:`\min(d, (1 + n)/(10 + n))` after ``n`` steps."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.method.rate(step)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        decay = min(self.method.decay, (1 + step) / (10 + step)) if step else 0.0
        for name, value in self.parameters.items():
            self.average[name].lerp_(value.detach(), 1 - decay)

    def finish(self) -> None:
        """Puts the average into the network."""
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(self.average[name])
                value.requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        kept: dict[str, Tensor] = {}
        for name, value in self.parameters.items():
            moments = self.optimiser.state[value]
            kept |= {f"weight/{name}": value.detach(), f"average/{name}": self.average[name]}
            kept |= {f"{moment}/{name}": moments[moment] for moment in ("exp_avg", "exp_avg_sq", "step")}
        return kept

    def restore(self, stored: tuple[dict[str, Tensor], list[tuple[float, float]]]) -> list[tuple[float, float]]:
        """The reverse of :meth:`tensors`; returns the losses so far."""
        tensors, losses = stored
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(tensors[f"weight/{name}"])
                self.average[name].copy_(tensors[f"average/{name}"])
                moments = {moment: tensors[f"{moment}/{name}"].clone() for moment in ("exp_avg", "exp_avg_sq", "step")}
                self.optimiser.state[value] = {
                    key: moment if key == "step" else moment.to(value) for key, moment in moments.items()
                }
        return losses


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    """A generator for one purpose: hashed, because neighbouring seeds are nearly the same to some generators."""
    import hashlib

    digest = hashlib.sha256(json.dumps([seed, stream, number]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _shuffled(seed: int, stream: int, rows: int, presentations: range) -> Tensor:
    """Which row is presented when: every pass over the rows in an order of its own."""
    passes = {number // rows for number in presentations}
    orders = {each: torch.randperm(rows, generator=_generator(seed, stream, each)) for each in passes}
    return torch.stack([orders[number // rows][number % rows] for number in presentations])
