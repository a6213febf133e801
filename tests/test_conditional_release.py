"""Conditional release against a labelled ring in which every quantity is known.

Modes 0 and 3 of eight are unsafe. Expected figures for the latch with exact weights (DDPM, 200 steps): a wholly unsafe
prompt 0.000 unsafe; a half unsafe one 0.000 unsafe, 0.045 off every mode, 0.467 of the safe samples on the prompt; a
benign one untouched. The safe denoiser on the conditional branch alone leaves the wholly unsafe prompt at 1.000.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput
from steerclear.guards import ConditionalRelease, SafeDenoiser, TwoSample, requirements
from steerclear.guards.weights import Weight
from steerclear.negation import NegationSet, Posterior, Space
from steerclear.noise import NoiseLevel
from steerclear.testing import Mixture
from steerclear.testing.sampling import Prompted, ancestral, variance_preserving

UNSAFE = (0, 3)


@dataclass(frozen=True, kw_only=True, eq=False)
class Known(Weight):
    """The true log-odds of a branch: P(unsafe | x_t, prompt) for the conditional one, P(unsafe | x_t) for the other."""

    ring: Mixture
    prompt: tuple[int, ...]

    def log_odds(self, unsafe: Posterior, denoised: torch.Tensor, state: DenoiseState, owner: object) -> torch.Tensor:
        inside = self.prompt if owner[1] == "conditional" else tuple(range(8))
        share = [
            self.ring.probability([k for k in inside if (k in UNSAFE) is wanted], state.x_t, state.level)
            if any((k in UNSAFE) is wanted for k in inside)
            else torch.zeros(len(denoised), dtype=torch.float64)
            for wanted in (True, False)
        ]
        return share[0].clamp_min(1e-300).log() - share[1].clamp_min(1e-300).log()


def release(ring: Mixture, prompt: tuple[int, ...], **more) -> ConditionalRelease:
    negation = ring.references(200, condition="unsafe", generator=torch.Generator().manual_seed(5))
    return ConditionalRelease(negation=negation, weight=Known(ring=ring, prompt=prompt), **more)


def drawn(prompt: tuple[int, ...], guard=None, *, n: int = 1500, steps: int = 100) -> tuple[torch.Tensor, Mixture]:
    ring = Mixture.ring()
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, dtype=torch.float64, generator=rng)
    levels = variance_preserving(steps)
    return ancestral(ring, levels, x, guard=guard, prompt=Prompted(condition=prompt), generator=rng), ring


def shares(x: torch.Tensor, ring: Mixture, prompt: tuple[int, ...]) -> tuple[float, float, float]:
    """Unsafe; off every mode (beyond five standard deviations); on the prompt among the safe."""
    mode, distance = ring.nearest(x)
    off = distance > 5.0
    unsafe = torch.isin(mode, torch.tensor(UNSAFE)) & ~off
    safe = ~unsafe & ~off
    on = torch.isin(mode, torch.tensor([k for k in prompt if k not in UNSAFE])) & safe
    return unsafe.double().mean().item(), off.double().mean().item(), (on.sum() / safe.sum().clamp(min=1)).item()


def test_a_wholly_unsafe_prompt_ends_in_something_safe_where_the_safe_denoiser_cannot():
    prompt = (0, 3)
    x, ring = drawn(prompt)
    assert shares(x, ring, prompt)[0] == 1.0
    negation = ring.references(200, condition="unsafe", generator=torch.Generator().manual_seed(5))
    capped = SafeDenoiser(negation=negation, weight=Known(ring=ring, prompt=prompt), max_beta=4.0)
    x, _ = drawn(prompt, lambda d, s: capped_conditional(capped, d, s))
    assert shares(x, ring, prompt)[0] >= 0.95
    x, _ = drawn(prompt, release(ring, prompt, strength=1.0, gate=0.0, max_beta=1e4))
    unsafe, off, _ = shares(x, ring, prompt)
    assert unsafe <= 0.002  # three of 1 500
    assert off <= 0.02


def capped_conditional(guard: SafeDenoiser, denoised: torch.Tensor, state: DenoiseState) -> torch.Tensor | None:
    """The safe denoiser with the branch's own weight and its own unsafe mean: at w = 1 both means coincide."""
    own = Mixture.ring()(state.x_t, state.level, [0, 3])
    beta = guard.beta(guard.weight.log_odds(Posterior(own, own[:, 0]), denoised, state, (guard, "conditional")))
    return denoised + beta[:, None] * (denoised - own)


def test_a_half_unsafe_prompt_ends_safe():
    prompt = (0, 1)
    x, ring = drawn(prompt)
    assert shares(x, ring, prompt)[0] == pytest.approx(0.5, abs=0.05)
    x, _ = drawn(prompt, release(ring, prompt, strength=1.0, gate=0.0, max_beta=1e4))
    unsafe, off, on = shares(x, ring, prompt)
    assert unsafe <= 0.002
    assert off <= 0.09
    assert on == pytest.approx(0.467, abs=0.1)


def test_a_benign_prompt_is_bit_identical():
    prompt = (5, 6)
    before, ring = drawn(prompt, n=200)
    after, _ = drawn(prompt, release(ring, prompt, strength=1.5, gate=0.3), n=200)
    assert torch.equal(before, after)


def state_with(conditional: torch.Tensor, unconditional: torch.Tensor, **more) -> DenoiseState:
    return DenoiseState(
        x_t=conditional,
        level=NoiseLevel(0.8, 0.6),
        step=0,
        num_steps=10,
        branches={"conditional": conditional, "unconditional": unconditional},
        guidance_scale=3.0,
        **more,
    )


@pytest.fixture
def guard() -> ConditionalRelease:
    space = Space(encoder="sha256:test", shape=(2,), name="plane")
    unsafe = NegationSet(latents=torch.tensor([[4.0, 0.0], [4.0, 1.0]]), space=space)
    safe = NegationSet(latents=torch.tensor([[-4.0, 0.0], [-4.0, 1.0]]), space=space)
    weight = TwoSample(safe=safe, bandwidth=1.0)
    return ConditionalRelease(negation=unsafe, weight=weight, strength=1.5, gate=0.3)


def test_the_release_is_the_equation_row_by_row(guard):
    conditional = torch.tensor([[3.0, 0.5], [-3.0, 0.5]])
    unconditional = torch.tensor([[0.5, -0.5], [0.25, 0.0]])
    guided = unconditional + 3.0 * (conditional - unconditional)
    out = guard(guided, state_with(conditional, unconditional))
    # The kernels are so far apart that w is 1 and 0 to the last bit of float32: r = 1 - 1.5 and r = 1.
    expected = unconditional[0] + 3.0 * (1 - 1.5) * (conditional[0] - unconditional[0])
    torch.testing.assert_close(out[0], expected)
    assert torch.equal(out[1], guided[1])


def test_the_weight_is_latched_at_its_maximum(guard):
    unsafe_there, unconditional = torch.tensor([[3.0, 0.5]]), torch.zeros(1, 2)
    safe_there = torch.tensor([[-3.0, 0.5]])
    memory = {}
    guard(3 * unsafe_there, state_with(unsafe_there, unconditional, memory=memory))
    later = guard(3 * safe_there, state_with(safe_there, unconditional, memory=memory))
    torch.testing.assert_close(later, 3.0 * (1 - 1.5) * safe_there)
    fresh = guard(3 * safe_there, state_with(safe_there, unconditional))
    assert torch.equal(fresh, 3 * safe_there)


def test_strength_zero_measures_and_changes_nothing(guard):
    notes = {}
    point = torch.tensor([[3.0, 0.5]])
    state = state_with(point, torch.zeros(1, 2), note=lambda name, value: notes.update({name: value}))
    assert replace(guard, strength=0.0)(point, state) is None
    assert notes["weight"].item() == pytest.approx(1.0)


def test_needs_branches_and_names_its_references(guard):
    needs = requirements(guard)
    assert needs.branches
    assert needs.negation == (guard.negation, guard.weight.safe)


@pytest.mark.parametrize("bad", [{"strength": -1.0}, {"gate": 1.0}, {"max_beta": float("inf")}])
def test_values_outside_their_range_are_refused(guard, bad):
    with pytest.raises(InvalidInput, match="ConditionalRelease: expected"):
        replace(guard, **bad)
