"""Tracked release against a labelled ring in which its target is known: itself a mixture of Gaussians.

Modes 0 and 3 of eight are unsafe; radius 4, scale 0.3. With probability 1 − λ a picture obeys the prompt, else it is
drawn from all modes; what is unsafe is left out. So the share of safe mode k in the target is

    π̃_k ∝ (1 − λ) 1[k in prompt]/|prompt| + λ/8                                                     (T)

which at λ = 0.05 gives P(on-prompt | safe) = 77/82 = 0.939 for the prompt {0, 1} and 77/79 = 0.975 for {5, 6}. Counts
of 4 000 samples are compared with that within 4 standard errors, 0.015 and 0.010. Nothing unsafe is expected, and
10⁻³·⁵ farther than four standard deviations from every mode, which is exp(−8) of any two-dimensional Gaussian.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy import stats

from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.guards import ConditionalRelease, TrackedRelease, TwoSample, chain, requirements
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
        out = guard(torch.from_numpy(c), state(c, u, x_t=torch.from_numpy(x), level=level, scale=1.0)).numpy()
        odds = guard.weight.log_odds(
            None, torch.from_numpy(x), state(c, u, x_t=torch.from_numpy(x), level=level), (0, "")
        )
        beta = np.exp(odds.numpy())
        wanted = truth(x, level, target(prompt, drop))[1]
        assert (abs(out - wanted).max(1) <= 1e-12 * (1 + beta) ** 2).all()


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


def test_a_deterministic_sampler_is_refused() -> None:
    prompt = PROMPTS["half"]
    guard, memory = known(prompt), {}
    x = torch.zeros(2, 2, dtype=torch.float64)
    guard(x, state(x, x + 1, memory=memory))
    with pytest.raises(UnsoundCombination, match="adds no noise"):
        guard(x, state(x, x + 1, memory=memory, step=1, eta=0.0))


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
    # No weight, nothing to drop: r = 1 and β = 0 to the last bit, through the whole equation.
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
