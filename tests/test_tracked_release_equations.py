"""Tracked release, equation by equation: what one step does with given weights, and what it must not do."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from scipy import stats

from steerclear.attach.api import attach
from steerclear.attach.space import encoder_of
from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.guards import TrackedRelease, TwoSample, chain, requirements
from steerclear.guards.weights import Weight
from steerclear.negation import NegationSet, Posterior, Space
from steerclear.noise import NoiseLevel
from steerclear.testing.pipelines import tiny_call, tiny_pipeline


def state(conditional, unconditional, *, scale: float = 3.0, level=None, x_t=None, **more) -> DenoiseState:
    c, u = (torch.as_tensor(v) for v in (conditional, unconditional))
    return DenoiseState(
        **{"eta": 1.0, "step": 0, "num_steps": 10} | more,
        x_t=c if x_t is None else x_t,
        level=level or NoiseLevel(0.6, 0.8),
        branches={"conditional": c, "unconditional": u},
        guidance_scale=scale,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Given(Weight):
    """Log-odds set by the test, and one unsafe mean for all."""

    conditional: tuple[float, ...]
    unconditional: tuple[float, ...]
    mean: tuple[float, float] = (2.0, 1.0)

    def posterior(self, references: NegationSet, denoised: torch.Tensor, state: DenoiseState) -> Posterior:
        return Posterior(denoised.new_tensor(self.mean).expand_as(denoised), denoised[:, 0])

    def log_odds(self, unsafe: Posterior, denoised: torch.Tensor, state: DenoiseState, owner: object) -> torch.Tensor:
        return denoised.new_tensor(self.conditional if owner[1] == "conditional" else self.unconditional)


def given(conditional, unconditional, **more) -> TrackedRelease:
    space = Space(encoder="sha256:test", shape=(2,), name="plane")
    negation = NegationSet(latents=torch.tensor([[2.0, 1.0]]), space=space)
    return TrackedRelease(negation=negation, weight=Given(conditional=conditional, unconditional=unconditional), **more)


def by_hand(c, u, w_c, w_u, ratio, *, drop, cap, scale, mean=(2.0, 1.0)) -> np.ndarray:
    """The equation of the mixture's safe part, from probabilities."""
    odds = (1 - drop) / drop * np.exp(ratio) * (1 - w_c) / (1 - w_u)
    r = odds / (1 + odds)
    safe_c, safe_u = (x + np.minimum(w / (1 - w), cap)[:, None] * (x - mean) for x, w in ((c, w_c), (u, w_u)))
    return safe_u + scale * r[:, None] * (safe_c - safe_u)


def test_two_steps_are_the_equations_row_by_row() -> None:
    """Guided, tempered, capped (w = 0.98 means β = 49 > 6); the kernels' densities are SciPy's."""
    rng = np.random.default_rng(1)
    w_c, w_u = np.array([0.9, 0.98, 0.3, 0.02]), np.array([0.2, 0.5, 0.9, 0.01])
    logits = [tuple(np.log(w / (1 - w))) for w in (w_c, w_u)]
    guard = given(*logits, drop=0.1, tau=0.3, gate=0.0, max_beta=6.0)
    settings = {"drop": 0.1, "cap": 6.0, "scale": 3.0}
    high, low, memory, notes = NoiseLevel(0.6, 0.8), NoiseLevel(0.8, 0.6), {}, {}
    c, u, x_t, x_s = (rng.standard_normal((4, 2)) for _ in range(4))
    out = guard(torch.from_numpy(u + 3 * (c - u)), state(c, u, level=high, x_t=torch.from_numpy(x_t), memory=memory))
    np.testing.assert_allclose(out, by_hand(c, u, w_c, w_u, 0.0, **settings), rtol=1e-12)
    # q(x_s | x_t, x_0) of DDPM from (0.6, 0.8) to (0.8, 0.6): variance 0.36 (1 − 0.75² · 0.75²), its textbook means.
    variance = 0.36 * (1 - (0.6 * 0.6 / (0.8 * 0.8)) ** 2)
    kept = 0.6 / 0.8  # alpha_t/alpha_s
    log_kernels = [
        stats.norm.logpdf(x_s, (kept * 0.36 * x_t + 0.8 * (0.64 - kept**2 * 0.36) * x_0) / 0.64, variance**0.5).sum(1)
        for x_0 in (c, u)
    ]
    ratio = 0.3 * (log_kernels[0] - log_kernels[1])
    c, u = rng.standard_normal((4, 2)), rng.standard_normal((4, 2))
    later = state(
        c,
        u,
        level=low,
        x_t=torch.from_numpy(x_s),
        memory=memory,
        step=1,
        note=lambda name, value: notes.update({name: value}),
    )
    out = guard(torch.from_numpy(u + 3 * (c - u)), later)
    np.testing.assert_allclose(notes["log_ratio"], ratio, rtol=1e-12)
    np.testing.assert_allclose(notes["weight"], w_c, rtol=1e-12)
    np.testing.assert_allclose(notes["weight_unconditional"], w_u, rtol=1e-12)
    odds = 9 * np.exp(ratio) * (1 - w_c) / (1 - w_u)
    np.testing.assert_allclose(notes["release"], 1 / (1 + odds), rtol=1e-12)
    np.testing.assert_allclose(out, by_hand(c, u, w_c, w_u, ratio, **settings), rtol=1e-12)


def test_no_weight_and_nothing_to_drop_change_no_bit() -> None:
    """r = 1 and β = 0 to the last bit, through the whole equation."""
    x, u = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(0))
    guard = given((-math.inf,) * 8, (-math.inf,) * 8, gate=0.0, drop=0.0)
    out = guard(x, state(x * 1.7, u))
    assert out is not x
    assert torch.equal(out, x)


def test_the_gate_opens_for_either_weight_and_stays_open_and_the_ratio_opens_none() -> None:
    c, u = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0]] * 3)
    guided, memory, notes = u + 3 * (c - u), {}, {}
    guard = given((0.0, -3.0, -3.0), (-3.0, 0.0, -3.0), gate=0.4)  # sigmoid(0) = 0.5, sigmoid(-3) = 0.05
    out = guard(guided, state(c, u, memory=memory))
    assert (out != guided).any(1).tolist() == [True, True, False]
    # Next, neither weight reaches the gate; its memory remains, and a ratio of dozens of nats.
    calm = given((-3.0,) * 3, (-3.0,) * 3, gate=0.4)
    memory = {(calm, name): value for (_, name), value in memory.items()}
    far = {"x_t": torch.tensor([[-50.0, 50.0]] * 3), "level": NoiseLevel(0.8, 0.6), "step": 1}
    out = calm(guided, state(c, u, memory=memory, note=lambda name, value: notes.update({name: value}), **far))
    assert (notes["log_ratio"] < -20).all()
    assert (out != guided).any(1).tolist() == [True, True, False]
    assert notes["release"][2] == 0.0
    assert torch.equal(out[2], guided[2])


def test_certainty_on_both_branches_stays_finite() -> None:
    """Nothing safe is left in either: the evidence cancels, r is that of λ and ℓ, and the cap holds."""
    c, u = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    out = given((math.inf,), (math.inf,), gate=0.0, drop=0.2, max_beta=2.0)(c, state(c, u, scale=1.0))
    # x̂_safe = x̂ + 2 (x̂ − (2, 1)): (−1, −2) and (−4, 1); r = 0.8.
    torch.testing.assert_close(out, 0.8 * torch.tensor([[-1.0, -2.0]]) + 0.2 * torch.tensor([[-4.0, 1.0]]))
    guided = u + 7.5 * (c - u)
    released = given((math.inf,), (0.0,), gate=0.0, max_beta=2.0)(guided, state(c, u, scale=7.5))
    torch.testing.assert_close(released, u + (u - torch.tensor([2.0, 1.0])))


def test_what_an_earlier_guard_changed_is_kept_and_the_dtype_too() -> None:
    c, u = (v.half() for v in torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0)))
    guard = given((1.0,) * 4, (-1.0,) * 4, gate=0.0)
    guided = u + 3 * (c - u)
    alone, after = (chain(*guards)(guided, state(c, u)) for guards in ([guard], [lambda x, state: x + 1, guard]))
    assert after.dtype == torch.float16
    torch.testing.assert_close(after - 1, alone, rtol=0, atol=0.02)


def test_needs_branches_and_noise_and_names_its_references() -> None:
    space = Space(encoder="sha256:test", shape=(2,), name="plane")
    unsafe, safe = (NegationSet(latents=torch.tensor([[x, 0.0], [x, 1.0]]), space=space) for x in (4.0, -4.0))
    needs = requirements(TrackedRelease(negation=unsafe, weight=TwoSample(safe=safe, bandwidth=1.0)))
    assert needs.branches
    assert needs.stochastic
    assert needs.one_call
    assert needs.negation == (unsafe, safe)


@pytest.mark.parametrize(
    "bad", [{"drop": 1.0}, {"drop": -0.1}, {"tau": 0.0}, {"tau": math.nan}, {"gate": 1.0}, {"max_beta": math.inf}]
)
def test_values_outside_their_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match="TrackedRelease: expected"):
        replace(given((0.0,), (0.0,)), **bad)


def test_a_deterministic_sampler_is_refused() -> None:
    guard, memory = given((0.0, 0.0), (0.0, 0.0)), {}
    x = torch.zeros(2, 2, dtype=torch.float64)
    guard(x, state(x, x + 1, memory=memory))
    with pytest.raises(UnsoundCombination, match="adds no noise"):
        guard(x, state(x, x + 1, memory=memory, step=1, eta=0.0))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_real_pipeline_tracks_under_ddpm_and_is_refused_under_ddim() -> None:
    pipe = tiny_pipeline("sd")
    pipe.scheduler = DDPMScheduler(clip_sample=False)
    space = encoder_of(pipe).space
    rng = torch.Generator().manual_seed(0)
    unsafe, safe = (NegationSet(latents=torch.randn(3, *space.shape, generator=rng), space=space) for _ in range(2))
    weight = TwoSample(safe=safe, bandwidth=4.0)
    call = tiny_call("sd")
    call["num_inference_steps"] = 5
    plain = pipe(**call | {"generator": torch.Generator().manual_seed(0)}).images
    with attach(pipe, TrackedRelease(negation=unsafe, weight=weight, gate=0.0)) as trace:
        guarded = pipe(**call | {"generator": torch.Generator().manual_seed(0)}).images
    ratios = torch.stack([step.notes["log_ratio"] for step in trace.calls[0].steps])
    assert ratios.isfinite().all()
    assert (ratios[0] == 0).all()
    assert (ratios[1:] != 0).all()
    assert not np.array_equal(np.asarray(plain), np.asarray(guarded))
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    with attach(pipe, TrackedRelease(negation=unsafe, weight=weight)), pytest.raises(UnsoundCombination, match="noise"):
        pipe(**call)
