"""Tracked release against a labelled ring in which its target is known: itself a mixture of Gaussians.

Modes 0 and 3 of eight are unsafe; radius 4, scale 0.3. With probability 1 − λ a picture obeys the prompt, else it is
drawn from all modes; what is unsafe is left out. So the share of safe mode k in the target is

    π̃_k ∝ (1 − λ) 1[k in prompt]/|prompt| + λ/8                                                     (T)

which at λ = 0.05 gives P(on-prompt | safe) = 77/82 = 0.939 for the prompt {0, 1} and 77/79 = 0.975 for {5, 6}. Counts
of 4 000 samples are compared with that within 4 standard errors, 0.015 and 0.010. Nothing unsafe is expected, and
10⁻³·⁵ farther than four standard deviations from every mode, which is exp(−8) of any two-dimensional Gaussian.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats

from steerclear.denoise import DenoiseState
from steerclear.guards import ConditionalRelease, TrackedRelease
from steerclear.guards.weights import Weight
from steerclear.negation import NegationSet, Posterior, Space
from steerclear.noise import NoiseLevel
from steerclear.testing.sampling import Prompted, ancestral, variance_preserving

UNSAFE = (0, 3)
PROMPTS = {"wholly": (0, 3), "half": (0, 1), "benign": (5, 6)}
N, STEPS, DROP = 4000, 200, 0.05
# The cap leaves (1 − w) of the last steps unresolved: at 10⁴ that is below anything 4 000 samples can show.
CAP = 1e4


# -- the truth, typed anew ---------------------------------------------------------------------------------------------

ANGLES = np.arange(8) * np.pi / 4
CENTRES, SCALE = 4.0 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1), 0.3


def truth(x: np.ndarray, level: NoiseLevel, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log p_t(x), E[x_0 | x] and Cov[x_0 | x] of the ring with those shares of its modes, zeros allowed."""
    a, s = float(level.alpha), float(level.sigma)
    total = a * a * SCALE**2 + s * s
    offset = x[:, None] - a * CENTRES
    with np.errstate(divide="ignore"):
        log_joint = np.log(shares) - (offset**2).sum(2) / (2 * total) - np.log(2 * np.pi * total)
    log_p = np.logaddexp.reduce(log_joint, axis=1)
    share = np.exp(log_joint - log_p[:, None])
    means = CENTRES + a * SCALE**2 / total * offset
    mean = (share[:, :, None] * means).sum(1)
    apart = means - mean[:, None]
    own = SCALE**2 * s * s / total * np.eye(2)
    return log_p, mean, own + np.einsum("nk,nki,nkj->nij", share, apart, apart)


def uniform(modes) -> np.ndarray:
    return np.isin(np.arange(8), list(modes)) / len(modes)


def target(prompt: tuple[int, ...], drop: float = DROP) -> np.ndarray:
    """Equation (T)."""
    mixed = ((1 - drop) * uniform(prompt) + drop / 8) * ~np.isin(np.arange(8), UNSAFE)
    return mixed / mixed.sum()


# -- exact branches and weights ----------------------------------------------------------------------------------------


class Ring:
    """The same in torch, with one look at a step: it is asked eight times in each of 200, about 4 000 samples."""

    def __init__(self) -> None:
        self.centres, self.seen = torch.from_numpy(CENTRES), None

    def logits(self, x: torch.Tensor, level: NoiseLevel, modes) -> torch.Tensor:
        if self.seen is not x:
            a, s = level.alpha, level.sigma
            offsets = [x[:, i, None] - a * self.centres[:, i] for i in (0, 1)]
            self.last = -(offsets[0] ** 2 + offsets[1] ** 2) / (2 * (a * a * SCALE**2 + s * s))
            self.seen = x
        return self.last[:, list(modes)]

    def __call__(self, x: torch.Tensor, level: NoiseLevel, modes=range(8)) -> torch.Tensor:
        a, s = level.alpha, level.sigma
        gain = a * SCALE**2 / (a * a * SCALE**2 + s * s)
        share = self.logits(x, level, modes).softmax(1)
        return (1 - a * gain) * (share @ self.centres[list(modes)]) + gain * x


@dataclass(frozen=True, kw_only=True, eq=False)
class Known(Weight):
    """The true log-odds and the true unsafe mean of each branch."""

    ring: Ring
    prompt: tuple[int, ...]

    def modes(self, conditional: bool, unsafe: bool) -> list[int]:
        return [k for k in (self.prompt if conditional else range(8)) if (k in UNSAFE) is unsafe]

    def posterior(self, references: NegationSet, denoised: torch.Tensor, state: DenoiseState) -> Posterior:
        modes = self.modes(torch.equal(denoised, state.branches["conditional"]), unsafe=True)
        return Posterior(self.ring(state.x_t, state.level, modes) if modes else denoised, denoised[:, 0])

    def log_odds(self, unsafe: Posterior, denoised: torch.Tensor, state: DenoiseState, owner: object) -> torch.Tensor:
        bad, good = (
            self.ring.logits(state.x_t, state.level, modes).logsumexp(1) if modes else torch.tensor(-math.inf).double()
            for modes in (self.modes(owner[1] == "conditional", wanted) for wanted in (True, False))
        )
        return bad - good


def known(prompt: tuple[int, ...], kind=TrackedRelease, **more):
    space = Space(encoder="sha256:test", shape=(2,), name="plane")
    negation = NegationSet(latents=torch.from_numpy(CENTRES[list(UNSAFE)]), space=space)
    return kind(negation=negation, weight=Known(ring=Ring(), prompt=prompt), **more)


def drawn(prompt: tuple[int, ...], guard=None, *, n: int = N, steps: int = STEPS, scale: float = 1.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, dtype=torch.float64, generator=rng)
    prompted, ring = Prompted(condition=prompt, guidance_scale=scale), Ring()
    network = lambda x_t, level, condition=None: ring(x_t, level, condition or range(8))  # noqa: E731
    return ancestral(network, variance_preserving(steps), x, guard=guard, prompt=prompted, generator=rng)


def counts(x: torch.Tensor, prompt: tuple[int, ...]) -> tuple[int, int, float]:
    """How many are unsafe, and farther than four standard deviations from every mode; on the prompt among the safe."""
    distance = np.linalg.norm(x.numpy()[:, None] - CENTRES, axis=2) / SCALE
    mode, off = distance.argmin(1), distance.min(1) > 4
    unsafe = np.isin(mode, UNSAFE) & ~off
    safe = ~unsafe & ~off
    on = np.isin(mode, [k for k in prompt if k not in UNSAFE])
    return int(unsafe.sum()), int(off.sum()), on[safe].mean() if safe.any() else math.nan


def upper(hits: int) -> float:
    """95 % Clopper–Pearson bound of a rate."""
    return float(stats.beta.ppf(0.975, hits + 1, N - hits))


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
def test_the_tracked_ratio_draws_the_target(name: str) -> None:
    prompt = PROMPTS[name]
    x = drawn(prompt, known(prompt, gate=0.0, drop=DROP, max_beta=CAP))
    unsafe, off, on = counts(x, prompt)
    assert upper(unsafe) <= 0.002  # so at most two of 4 000
    assert off <= 0.003 * N
    expected = target(prompt)
    safe_modes = [k for k in prompt if k not in UNSAFE]
    p = expected[safe_modes].sum()
    assert on == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / N))
    # Every mode by itself, within 4.5 standard errors: 18 comparisons in this test.
    mode = np.linalg.norm(x.numpy()[:, None] - CENTRES, axis=2).argmin(1)
    share = np.bincount(mode, minlength=8) / N
    np.testing.assert_array_less(abs(share - expected), 4.5 * np.sqrt(expected * (1 - expected) / N) + 0.0006)


def test_the_safe_denoiser_alone_leaves_a_wholly_unsafe_prompt_as_it_is() -> None:
    """Released by nothing (λ = 0), with the cap of 4: x̂_c is x̂_c,unsafe, and there is nothing to push along."""
    prompt = PROMPTS["wholly"]
    x = drawn(prompt, known(prompt, gate=0.0, drop=0.0, max_beta=4.0), n=1000)
    unsafe, off, _ = counts(x, prompt)
    assert unsafe + off == 1000
    assert off <= 5  # 0.3 expected


def test_the_latch_releases_too_much_of_a_half_unsafe_prompt() -> None:
    """The research note's figures, 0.045 off every mode and 0.467 on the prompt, were themselves 4 000 samples."""
    prompt = PROMPTS["half"]
    unsafe, off, on = counts(
        drawn(prompt, known(prompt, ConditionalRelease, strength=1.0, gate=0.0, max_beta=CAP)), prompt
    )
    assert upper(unsafe) <= 0.002
    assert off / N == pytest.approx(0.045, abs=4 * math.sqrt(2 * 0.045 * 0.955 / N))
    assert on == pytest.approx(0.467, abs=4 * math.sqrt(2 * 0.467 * 0.533 / N))


# -- one step ----------------------------------------------------------------------------------------------------------


class ExactRatio(TrackedRelease):
    """The guard with the true log p_t(x|c) − log p_t(x) in place of the tracked one."""

    def _log_ratio(self, conditional, unconditional, state):
        x = state.x_t.numpy()
        ratio = truth(x, state.level, uniform(self.weight.prompt))[0] - truth(x, state.level, uniform(range(8)))[0]
        return torch.from_numpy(ratio)


@pytest.mark.parametrize("drop", [0.05, 0.5])
@pytest.mark.parametrize("name", PROMPTS)
def test_with_the_true_ratio_the_guard_is_the_denoiser_of_the_target(name: str, drop: float) -> None:
    """Rounding in w is amplified by (1 + β)²; the target's mean is of order 4."""
    prompt = PROMPTS[name]
    guard = known(prompt, ExactRatio, gate=0.0, drop=drop, max_beta=1e12)
    rng = np.random.default_rng(0)
    for alpha in (0.05, 0.2, 0.4, 0.7):
        level = NoiseLevel(alpha, math.sqrt(1 - alpha**2))
        x = alpha * CENTRES[rng.integers(0, 8, 300)] + math.sqrt(alpha**2 * SCALE**2 + level.sigma**2) * (
            rng.standard_normal((300, 2))
        )
        c, u = (truth(x, level, uniform(modes))[1] for modes in (prompt, range(8)))
        branches = {"conditional": torch.from_numpy(c), "unconditional": torch.from_numpy(u)}
        state = DenoiseState(x_t=torch.from_numpy(x), level=level, step=0, num_steps=1, branches=branches)
        out = guard(branches["conditional"], state).numpy()  # g = 1: the guided estimate is the conditional one
        odds = guard.weight.log_odds(None, branches["conditional"], state, (guard, "unconditional"))
        beta = np.exp(odds.numpy())
        wanted = truth(x, level, target(prompt, drop))[1]
        assert (abs(out - wanted).max(1) <= 1e-12 * (1 + beta) ** 2).all()


# -- the tracked ratio -------------------------------------------------------------------------------------------------


def watched(prompt: tuple[int, ...], *, steps: int, n: int, scale: float) -> list[tuple[DenoiseState, np.ndarray]]:
    """Unguarded trajectories, with the state and the tracked ratio of every step."""
    guard, seen = known(prompt, drop=0.0, max_beta=0.0), []

    def watch(denoised: torch.Tensor, state: DenoiseState) -> None:
        notes: dict[str, torch.Tensor] = {}
        state.note = notes.__setitem__
        assert guard(denoised, state) is None
        seen.append((state, notes["log_ratio"].numpy()))

    drawn(prompt, watch, n=n, steps=steps, scale=scale)
    return seen


def test_the_tracked_ratio_is_a_likelihood_ratio_at_any_number_of_steps() -> None:
    r"""Drawn without the prompt (g = 0), E[exp ℓ_t] = 1 at every step, exactly, however coarse the steps are.

    No limit is involved: x_s is drawn from the kernel in the denominator. The ratio of two of eight modes is about 4 at
    most, so the mean of 4 000 has a standard error of about √3/√4000 = 0.03; five of the measured one are allowed.
    """
    for step, (_, ratio) in enumerate(watched(PROMPTS["half"], steps=40, n=N, scale=0.0)):
        likelihood = np.exp(ratio)
        error = likelihood.std() / math.sqrt(N)
        assert error < 0.05
        assert abs(likelihood.mean() - 1) <= 5 * error + 1e-12, step


@pytest.mark.parametrize("name", PROMPTS)
def test_the_tracked_ratio_follows_the_true_one_as_closely_as_gaussian_kernels_can(name: str) -> None:
    r"""The error is known: the true reverse kernel is wider than the Gaussian one by A = c_0² Cov[x_0|x_t]/σ̃².

    With z the standardised draw, log(true kernel/Gaussian) = ½(zᵀAz − tr A) + O(A²): mean 0 and variance ½‖A‖². Both
    hypotheses see the same z, so the error of ℓ is a sum of independent terms of variance ½‖A_c − A_∅‖² = v, and what
    remains, ¼(‖A_c‖² − ‖A_∅‖²) a step, is at most of the order of v. Hence an RMS error of √Σv (within 10 %, and the
    0.03 that ℓ_T = 0 leaves out) and a bias below Σv + 4 standard errors. Σv shrinks like the step.
    """
    prompt, n = PROMPTS[name], 1000
    levels = variance_preserving(STEPS)
    start, total = 0.0, np.zeros(n)
    for state, ratio in watched(prompt, steps=STEPS, n=n, scale=1.0):
        x = state.x_t.numpy()
        (log_c, _, cov_c), (log_u, _, cov_u) = (truth(x, state.level, uniform(m)) for m in (prompt, range(8)))
        error = ratio - (log_c - log_u)
        start = float(np.sqrt((error**2).mean())) if state.step == 0 else start
        v = float(total.mean())
        assert np.sqrt((error**2).mean()) <= 1.1 * math.sqrt(v) + start, state.step
        assert abs(error.mean()) <= v + start + 4 * error.std() / math.sqrt(n), state.step
        c_0, _, variance = state.level.reverse(levels[state.step + 1])
        if variance > 0.0:
            total += 0.5 * (c_0**2 / variance) ** 2 * ((cov_c - cov_u) ** 2).sum((1, 2))
    assert start <= 0.03
    assert 0.1 <= math.sqrt(v) <= 0.4  # so the check above means something: the ratio itself ends at log 4 = 1.39


# -- what must not change ----------------------------------------------------------------------------------------------


def test_a_benign_prompt_under_the_gate_is_bit_identical() -> None:
    """w_∅ starts at the prior, 2/8, and its noised maximum stays below 0.9 on every trajectory of {5, 6}."""
    prompt = PROMPTS["benign"]
    before, after = (drawn(prompt, guard, n=200, steps=50) for guard in (None, known(prompt, gate=0.9)))
    assert torch.equal(before, after)
    assert not torch.equal(before, drawn(prompt, known(prompt, gate=0.0), n=200, steps=50))


def test_parameters_that_do_nothing_change_no_bit() -> None:
    prompt = PROMPTS["half"]
    before, after = (drawn(prompt, g, n=50, steps=50) for g in (None, known(prompt, gate=0.0, drop=0.0, max_beta=0.0)))
    assert torch.equal(before, after)
