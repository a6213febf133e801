"""The published preset against the released loop, typed in float64 NumPy from its description (golden/)."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline

import steerclear.attach as attach_package
from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput
from steerclear.guards import PublishedLoop, SafeDenoiser
from steerclear.negation import NegationSet, Space
from steerclear.noise import NoiseLevel
from steerclear.testing.sampling import Spaceless

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, NumPy 2


def _golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loop", Path(__file__).parent / "golden" / "safe_denoiser_loop.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = _golden()
SHAPE, STEPS, SCALE, SIGMA = (4, 6, 6), 12, 0.33, 3.15


def references(n: int = 9) -> torch.Tensor:
    return torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def negation() -> NegationSet:
    return NegationSet(latents=references(), space=Space(encoder="pixels", shape=SHAPE))


ACP = DDPMScheduler().alphas_cumprod.double().numpy()
"""The scheduler's own table, which is float32: 1 − ᾱ near t = 0 would differ by 2e-5 from a table made in float64."""


def network(x: torch.Tensor, timestep: int) -> torch.Tensor:
    """Noise prediction of a bounded denoiser, so that kernels are of order one as they are on SD 1.4 at this width."""
    alpha, sigma = math.sqrt(ACP[timestep]), math.sqrt(1 - ACP[timestep])
    return (x - alpha * (0.9 * x.tanh() + 0.1 * x.flip(1).sin())) / sigma


class Pipeline(DiffusionPipeline):
    """The shortest DDPM pipeline; draws its noise from one generator, like the loop it is compared with."""

    def __init__(self, scheduler: DDPMScheduler) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(network(x, int(t)), t, x, generator=generator).prev_sample
        return x


def expected(x: torch.Tensor, generator: torch.Generator, threshold: float, stop: float) -> tuple[np.ndarray, int]:
    """The released loop over a batch, sample by sample, with the generator read in the order that sampling reads it."""
    timesteps = [k * (1000 // STEPS) for k in range(STEPS)][::-1]
    refs, fired_in_all = references().numpy(), 0
    for k, t in enumerate(timesteps):
        levels = (ACP[t], ACP[timesteps[k + 1]] if k + 1 < STEPS else 1.0)
        e = network(x, t).numpy()
        state = generator.get_state()
        fresh = torch.randn(x.shape, dtype=x.dtype, generator=generator)
        settings = {"s": SIGMA, "scale": SCALE, "threshold": threshold if k / STEPS < stop else math.inf}
        open_ = [
            golden.step(x[i].numpy(), e[i], refs, levels, fresh[i].numpy(), None, **settings)[1] for i in range(len(x))
        ]
        if not any(open_):
            generator.set_state(state)  # nothing changed, nothing drawn
        noise = torch.randn(x.shape, dtype=x.dtype, generator=generator).numpy() if t else [None] * len(x)
        moved = [
            golden.step(x[i].numpy(), e[i], refs, levels, fresh[i].numpy(), noise[i], **settings) for i in range(len(x))
        ]
        fired_in_all += sum(fired for _, fired in moved)
        x = torch.from_numpy(np.stack([value for value, _ in moved]))
    return x.numpy(), fired_in_all


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gated", [False, True])
def test_the_preset_follows_the_released_loop_for_a_whole_trajectory(gated: bool, dtype: torch.dtype) -> None:
    x = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[1] *= 2.5  # a larger estimate lies farther from every reference: its gate closes first
    threshold, stop = 5.1 if gated else 0.0, 0.5
    generator = torch.Generator().manual_seed(2)
    want, fired = expected(x, generator, threshold, stop)
    assert (0 < fired < 18) if gated else fired == 18
    if dtype == torch.float32:
        return _check_single_precision(x, threshold, want_fired=fired)
    pipe = Pipeline(DDPMScheduler(clip_sample=False))
    guard = SafeDenoiser.published(negation(), scale=SCALE, sigma=SIGMA, threshold=threshold, stop=stop)
    with attach_package.attach(pipe, Spaceless(guard=guard), coupling="renoise"):
        got = pipe(x, torch.Generator().manual_seed(2))
    # The scheduler's coefficients are float32 scalars: 6e-8 each, times 12 steps, with room.
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-5)
    return None


def _check_single_precision(x: torch.Tensor, threshold: float, *, want_fired: int) -> None:
    """Single steps of the guard alone in float32: within 1e-5 of the loop's correction."""
    assert want_fired > 0
    loop = PublishedLoop(negation=negation(), scale=SCALE, sigma=SIGMA, threshold=threshold)
    got = loop(x.float(), DenoiseState(x_t=x.float(), level=NoiseLevel(0.5, 0.8), step=0, num_steps=5))
    for i in range(len(x)):
        b, mean = golden.kernel_sum(x[i].numpy(), golden.normalise(references().numpy()), SIGMA)
        want = x[i].numpy() - SCALE * mean if b >= threshold else x[i].float().numpy()
        np.testing.assert_allclose(got[i].numpy(), want, atol=1e-5)


def test_the_gate_is_the_release_s() -> None:
    noise = torch.randn(9, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    loop = PublishedLoop(negation=negation(), sigma=SIGMA).calibrated(
        NoiseLevel(math.sqrt(0.999), math.sqrt(0.001)), noise
    )
    want = golden.gate(references().numpy(), 0.999, noise.numpy(), SIGMA, 1.6)
    assert loop.threshold == pytest.approx(want, rel=1e-10)


def test_the_window_is_the_first_eleven_of_fifty_steps() -> None:
    guard = SafeDenoiser.published(negation())
    x = torch.randn(2, *SHAPE)
    fired = [
        guard(x, DenoiseState(x_t=x, level=NoiseLevel(0.1, 0.99), step=k, num_steps=50)) is not None for k in range(50)
    ]
    assert fired == [True] * 11 + [False] * 39


def test_rows_behind_a_closed_gate_keep_their_bits_and_scale_zero_is_the_identity() -> None:
    x = torch.cat([torch.zeros(1, *SHAPE), torch.full((1, *SHAPE), 50.0)])
    state = DenoiseState(x_t=x, level=NoiseLevel(0.1, 0.99), step=0, num_steps=50)
    got = PublishedLoop(negation=negation(), threshold=1.0)(x, state)
    assert torch.equal(got[1], x[1])
    assert not torch.equal(got[0], x[0])
    assert PublishedLoop(negation=negation(), scale=0.0)(x, state) is None


def test_references_without_channels_are_refused() -> None:
    flat = NegationSet(latents=torch.ones(2, 5), space=Space(encoder="pixels", shape=(5,)))
    with pytest.raises(InvalidInput, match="channels, height, width"):
        SafeDenoiser.published(flat)
    with pytest.raises(InvalidInput, match="scale >= 0"):
        SafeDenoiser.published(negation(), scale=-1.0)
    with pytest.raises(InvalidInput, match="sigma > 0"):
        SafeDenoiser.published(negation(), sigma=0.0)
