"""The Safe Denoiser against its referee: a labelled Dirac mixture, whose safe denoiser is known in closed form.

A finite negation set is a Dirac mixture, so the production path is what is judged. The referee itself is judged by
brute-force quadrature. Rounding in w is amplified by dβ/dw = (1+β)², so every tolerance carries that factor.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from steerclear.denoise import DenoiseState, GuardedDenoiser
from steerclear.errors import InvalidInput, NegationMismatch, UnsoundCombination
from steerclear.guards import Dynamic, Gate, SafeDenoiser, TwoSample, calibrate, requirements
from steerclear.guards.calibration import auroc, fit_logistic, score
from steerclear.negation import NegationSet, Space
from steerclear.noise import NoiseLevel
from steerclear.testing import Mixture

LEVELS = [NoiseLevel(0.6, 0.8), NoiseLevel(1.0, 1.7), NoiseLevel(0.7, 0.3), NoiseLevel(0.05, 1.0)]
SHARE = 8 / 18
"""Unsafe share of :func:`data`: weights 2 + 1 + 2 + 3 of 18."""


def data(dtype: torch.dtype = torch.float64) -> Mixture:
    """Nine points in 2×3 dimensions, four of them unsafe, weights 1..3 so that no two readings of them agree."""
    points = torch.randn(9, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weights = torch.tensor([1.0, 2, 3, 1, 2, 3, 1, 2, 3], dtype=torch.float64)
    labels = ["safe", "unsafe", "safe", "unsafe", "safe", "safe", "safe", "unsafe", "unsafe"]
    return Mixture.diracs(points.to(dtype), labels, weights.to(dtype))


def exact_guard(mixture: Mixture, **settings: float) -> SafeDenoiser:
    weight = TwoSample(safe=mixture.references(condition="safe"), prior=SHARE)
    return SafeDenoiser(
        negation=mixture.references(condition="unsafe"), weight=weight, **({"max_beta": 1e300} | settings)
    )


def noisy(mixture: Mixture, level: NoiseLevel, n: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_0, _ = mixture.sample(n, generator=generator)
    return level.add(x_0, torch.randn(x_0.shape, dtype=x_0.dtype, generator=generator))


def at(x_t: torch.Tensor, level: NoiseLevel, notes: dict | None = None, **more) -> DenoiseState:
    keep = {} if notes is None else {"note": notes.__setitem__}
    return DenoiseState(x_t=x_t, level=level, **({"step": 0, "num_steps": 10} | keep | more))


# -- the referee ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_the_mixture_agrees_with_quadrature(level: NoiseLevel) -> None:
    means, scales, weights = [-2.0, 0.5, 3.0], [0.5, 0.2, 0.9], [0.2, 0.5, 0.3]
    mixture = Mixture(
        means=torch.tensor(means, dtype=torch.float64)[:, None],
        scales=torch.tensor(scales, dtype=torch.float64),
        weights=torch.tensor(weights, dtype=torch.float64) * 7,
        labels=("safe", "unsafe", "safe"),
    )
    for x in (-1.5, 0.2, 2.4):

        def moment(power: int, chosen: tuple[int, ...], x: float = x) -> float:
            def integrand(x_0: float) -> float:
                prior = sum(weights[k] * stats.norm.pdf(x_0, means[k], scales[k]) for k in chosen)
                return x_0**power * prior * stats.norm.pdf(x, level.alpha * x_0, level.sigma)

            return integrate.quad(integrand, -9, 9, points=means, limit=400, epsabs=1e-13, epsrel=1e-12)[0]

        x_t = torch.tensor([[x]], dtype=torch.float64)
        whole, unsafe = (0, 1, 2), (1,)
        assert mixture(x_t, level).item() == pytest.approx(moment(1, whole) / moment(0, whole), rel=1e-8)
        assert mixture(x_t, level, "unsafe").item() == pytest.approx(moment(1, unsafe) / moment(0, unsafe), rel=1e-8)
        w = moment(0, unsafe) / moment(0, whole)
        assert mixture.probability("unsafe", x_t, level).item() == pytest.approx(w, rel=1e-8)
        assert mixture.log_odds("unsafe", x_t, level).item() == pytest.approx(math.log(w / (1 - w)), abs=1e-7)
        assert mixture.log_density(x_t, level).item() == pytest.approx(math.log(moment(0, whole)), abs=1e-8)


def test_samples_of_the_mixture_have_its_shares_and_widths() -> None:
    ring = Mixture.ring()
    x_0, component = ring.sample(20_000, generator=torch.Generator().manual_seed(0))
    # Eight equal shares: standard error of one is sqrt(.125·.875/20000) = 0.0023.
    shares = torch.bincount(component, minlength=8) / 20_000
    assert (shares - 0.125).abs().max() < 4 * 0.0023
    assert (x_0 - ring.means[component]).std().item() == pytest.approx(0.3, rel=0.02)
    only, component = ring.sample(100, condition="unsafe", generator=torch.Generator().manual_seed(0))
    assert set(component.tolist()) == {0, 3}
    nearest, distance = ring.nearest(only)
    assert torch.equal(nearest, component)
    assert distance.max() < 5


def test_a_mixture_refuses_nonsense() -> None:
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(InvalidInput, match="as many means"):
        Mixture(means=one[:, None], scales=one, weights=one, labels=("a", "b"))
    with pytest.raises(InvalidInput, match="weights > 0"):
        Mixture(means=one[:, None], scales=one, weights=0 * one, labels=("a",))
    with pytest.raises(InvalidInput, match="no component meets 'c'"):
        data().components("c")


# -- the theorem ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float64, 1e-13), (torch.float32, 2e-5)])
def test_the_guarded_denoiser_is_the_safe_denoiser(level: NoiseLevel, dtype: torch.dtype, eps: float) -> None:
    mixture, referee = data(dtype), data()
    x_t = noisy(mixture, level)
    guarded = GuardedDenoiser(denoiser=mixture, guard=exact_guard(mixture))(x_t, level)
    expected = referee(x_t.double(), level, "safe")
    beta = referee.log_odds("unsafe", x_t.double(), level).exp()
    tolerance = eps * (1 + beta) ** 2
    error = (guarded.double() - expected).flatten(1).abs().amax(1)
    assert guarded.dtype == dtype
    assert bool((error <= tolerance).all())
    # The test has teeth: the guard had something to do, and not everywhere the same.
    assert beta.max() > 1.2 * beta.min()
    moved = (referee(x_t.double(), level) - expected).flatten(1).abs().amax(1)
    assert (moved > 10 * tolerance).sum() >= 16


def test_the_notes_are_the_posterior_weight_and_its_odds() -> None:
    mixture, level, notes = data(), LEVELS[0], {}
    x_t = noisy(mixture, level)
    exact_guard(mixture)(mixture(x_t, level), at(x_t, level, notes))
    w = mixture.probability("unsafe", x_t, level)
    torch.testing.assert_close(notes["weight"], w, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(notes["beta"], w / (1 - w), rtol=1e-9, atol=1e-13)
    unsafe = mixture.log_density(x_t, level, "unsafe") - math.log(SHARE)
    torch.testing.assert_close(notes["evidence"], unsafe, rtol=1e-11, atol=1e-11)
    assert all(value.shape == (64,) for value in notes.values())


def test_a_v_predicting_network_leads_to_the_same_estimate() -> None:
    """E[v | x_t] from E[ε] and E[x_0], on a schedule where α² + σ² is not 1, so that a lost normaliser shows."""
    mixture, level = data(), NoiseLevel(1.0, 1.7)
    x_t = noisy(mixture, level)
    x_0, epsilon = mixture(x_t, level), (x_t - mixture(x_t, level)) / 1.7
    v = (epsilon - 1.7 * x_0) / math.sqrt(1 + 1.7**2)
    denoised = level.denoised(v, x_t, "v_prediction")
    guarded = exact_guard(mixture)(denoised, at(x_t, level))
    beta = mixture.log_odds("unsafe", x_t, level).exp()[:, None, None]
    assert bool(((guarded - mixture(x_t, level, "safe")).abs() <= 1e-12 * (1 + beta) ** 2).all())


def test_strength_and_cap_scale_the_correction() -> None:
    mixture, level = data(), LEVELS[0]
    x_t = noisy(mixture, level)
    denoised, unsafe = mixture(x_t, level), mixture(x_t, level, "unsafe")
    w = mixture.probability("unsafe", x_t, level)
    cap = (w / (1 - w)).median().item()
    beta = 0.5 * np.minimum((w / (1 - w)).numpy(), cap)
    guarded = exact_guard(mixture, strength=0.5, max_beta=cap)(denoised, at(x_t, level))
    expected = denoised.numpy() + beta[:, None, None] * (denoised - unsafe).numpy()
    np.testing.assert_allclose(guarded.numpy(), expected, rtol=1e-9, atol=1e-11)


def test_a_bandwidth_reads_the_denoised_estimate_and_not_the_sample() -> None:
    mixture, level, h = data(), LEVELS[0], 0.9
    x_t = noisy(mixture, level)
    denoised = mixture(x_t, level)
    unsafe, safe = mixture.references(condition="unsafe"), mixture.references(condition="safe")
    guard = SafeDenoiser(negation=unsafe, weight=TwoSample(safe=safe, prior=0.2, bandwidth=h), max_beta=1e9)
    notes: dict = {}
    guarded = guard(denoised, at(x_t, level, notes))
    assert torch.equal(guarded, guard(denoised, at(x_t + 5, NoiseLevel(0.1, 3.0))))
    # By hand, in NumPy: Gaussian kernels of width h around clean references, weights normalised within each set.
    for row in (0, 7, 40):
        kernel = {}
        for name, references in (("unsafe", unsafe), ("safe", safe)):
            d2 = ((denoised[row].numpy() - references.latents.numpy()) ** 2).sum((1, 2))
            kernel[name] = references.weights.numpy() / references.weights.sum().item() * np.exp(-d2 / (2 * h * h))
        odds = 0.2 / 0.8 * kernel["unsafe"].sum() / kernel["safe"].sum()
        mean = np.einsum("n,nij->ij", kernel["unsafe"] / kernel["unsafe"].sum(), unsafe.latents.numpy())
        np.testing.assert_allclose(notes["beta"][row].item(), odds, rtol=1e-9)
        expected = denoised[row].numpy() + odds * (denoised[row].numpy() - mean)
        np.testing.assert_allclose(guarded[row].numpy(), expected, rtol=1e-8, atol=1e-9)


def test_temperature_widens_the_kernel_and_keeps_set_sizes_out() -> None:
    """T is the kernel's variance; a set in which every picture stands twice is the same set at every T."""
    mixture, level = data(), LEVELS[0]
    x_t = noisy(mixture, level)
    safe, unsafe = mixture.references(condition="safe"), mixture.references(condition="unsafe")
    twice = NegationSet(
        latents=safe.latents.repeat(2, 1, 1),
        weights=safe.weights.repeat(2),
        digests=("d",) * (2 * len(safe)),
        space=safe.space,
    )
    wider = NoiseLevel(level.alpha, level.sigma * math.sqrt(3.0))
    notes: list[dict] = [{}, {}]
    for each, references in zip(notes, (safe, twice), strict=True):
        weight = TwoSample(safe=references, prior=SHARE, temperature=3.0)
        SafeDenoiser(negation=unsafe, weight=weight)(mixture(x_t, level), at(x_t, level, each))
    torch.testing.assert_close(notes[0]["weight"], mixture.probability("unsafe", x_t, wider), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(notes[1]["weight"], notes[0]["weight"], rtol=1e-10, atol=1e-13)


# -- properties that hold for every weight -------------------------------------------------------------------------


def weights_of(mixture: Mixture) -> list:
    safe = mixture.references(condition="safe")
    return [
        TwoSample(safe=safe, prior=SHARE),
        TwoSample(safe=safe, bandwidth=1.0),
        Dynamic(prior=0.3),
        Gate(),
        Gate(threshold=-6.0),
    ]


@given(which=st.integers(0, 4), seed=st.integers(0, 99), level=st.sampled_from(LEVELS), split=st.integers(1, 7))
def test_every_sample_is_guarded_for_itself(which: int, seed: int, level: NoiseLevel, split: int) -> None:
    mixture = data(torch.float32)
    guard = SafeDenoiser(negation=mixture.references(condition="unsafe"), weight=weights_of(mixture)[which])
    x_t = noisy(mixture, level, n=8, seed=seed)
    denoised = mixture(x_t, level)
    before = (x_t.clone(), denoised.clone())
    whole = guard(denoised, at(x_t, level))
    parts = [
        guard(d, at(x, level))
        for x, d in zip(x_t.split([split, 8 - split]), denoised.split([split, 8 - split]), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(before[0], x_t)
    assert torch.equal(before[1], denoised)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("which", range(5))
def test_dtype_is_kept_and_strength_zero_changes_nothing(which: int, dtype: torch.dtype) -> None:
    mixture, notes = data(), {}
    negation, weight = mixture.references(condition="unsafe"), weights_of(mixture)[which]
    x_t = noisy(mixture, LEVELS[0]).to(dtype)
    denoised = mixture(x_t, LEVELS[0])
    guarded = SafeDenoiser(negation=negation, weight=weight)(denoised, at(x_t, LEVELS[0]))
    assert guarded.dtype == dtype
    assert bool(guarded.isfinite().all())
    assert SafeDenoiser(negation=negation, weight=weight, strength=0.0)(denoised, at(x_t, LEVELS[0], notes)) is None
    assert set(notes) == {"weight", "beta", "evidence"}
    assert not notes["beta"].any()


def test_rows_below_the_gate_or_without_weight_keep_their_bits() -> None:
    mixture, level = data(torch.float32), LEVELS[0]
    x_t = noisy(mixture, level)
    denoised = mixture(x_t, level)
    denoised[5] = -0.0
    w = data().probability("unsafe", x_t.double(), level)
    gate = w.median().item()
    guarded = exact_guard(mixture, gate=gate)(denoised, at(x_t, level))
    same = (guarded.view(torch.int32) == denoised.view(torch.int32)).flatten(1).all(1)
    assert torch.equal(same[(w - gate).abs() > 1e-6], (w < gate)[(w - gate).abs() > 1e-6])
    # A thousand standard deviations nearer to the safe data: w underflows to 0, and 0 is exact.
    safe, unsafe = torch.zeros(1, 2), torch.full((1, 2), 2000.0)
    space = Space(encoder="pixels", shape=(2,))
    far = SafeDenoiser(
        negation=NegationSet(latents=unsafe, space=space), weight=TwoSample(safe=NegationSet(latents=safe, space=space))
    )
    x = torch.tensor([[0.1, -0.0]])
    assert torch.equal(far(x, at(x, NoiseLevel(1.0, 1.0))).view(torch.int32), x.view(torch.int32))


def test_the_gate_opens_per_sample_at_its_threshold() -> None:
    mixture, level, notes = data(), LEVELS[0], {}
    x_t = noisy(mixture, level)
    denoised, unsafe = mixture(x_t, level), mixture(x_t, level, "unsafe")
    evidence = mixture.log_density(x_t, level, "unsafe") - math.log(SHARE)
    threshold = evidence.sort().values[20:22].mean().item()
    guard = SafeDenoiser(
        negation=mixture.references(condition="unsafe"), weight=Gate(threshold=threshold), strength=0.3
    )
    guarded = guard(denoised, at(x_t, level, notes))
    is_open = evidence >= threshold
    assert is_open.sum() == 43
    assert torch.equal(guarded[~is_open], denoised[~is_open])
    torch.testing.assert_close(
        guarded[is_open], (denoised + 0.3 * (denoised - unsafe))[is_open], rtol=1e-10, atol=1e-10
    )
    assert torch.equal(notes["beta"], 0.3 * is_open.double())


# -- the tracked weight --------------------------------------------------------------------------------------------


def test_the_tracked_weight_is_bayes_rule_on_the_reverse_kernels() -> None:
    mixture = data()
    negation = mixture.references(condition="unsafe")
    weight = Dynamic(prior=0.3, tau=0.7, delta=0.02, bounds=(0.05, 0.9))
    guard = SafeDenoiser(negation=negation, weight=weight)
    t, s = NoiseLevel(0.5, math.sqrt(0.75)), NoiseLevel(0.8, 0.6)
    x_t, x_s = noisy(mixture, t), noisy(mixture, s, seed=1)
    memory: dict = {}
    notes: list[dict] = [{}, {}, {}]
    for step, (x, level) in enumerate([(x_t, t), (x_s, s), (x_s, NoiseLevel(1.0, 0.0))]):
        guard(mixture(x, level) if level.sigma else x, at(x, level, notes[step], step=step, memory=memory, eta=1.0))
    # DDPM's posterior in its own symbols: abar, beta = 1 - abar_t/abar_s.
    abar_t, abar_s = 0.25, 0.64
    beta = 1 - abar_t / abar_s
    variance = (1 - abar_s) / (1 - abar_t) * beta

    def mean(x_0: np.ndarray) -> np.ndarray:
        return (
            math.sqrt(abar_s) * beta / (1 - abar_t) * x_0
            + (math.sqrt(abar_t / abar_s) * (1 - abar_s) / (1 - abar_t)) * x_t.numpy()
        )

    far = ((x_s.numpy() - mean(mixture(x_t, t, "unsafe").numpy())) ** 2).sum((1, 2))
    near = ((x_s.numpy() - mean(mixture(x_t, t).numpy())) ** 2).sum((1, 2))
    expected = np.clip(0.3 * np.exp((-0.7 * (far - near) + 0.02) / (2 * variance)), 0.05, 0.9)
    assert ((expected > 0.05) & (expected < 0.9)).sum() > 10  # the clip does not do all the work
    np.testing.assert_allclose(notes[0]["weight"].numpy(), 0.3, rtol=1e-12)
    np.testing.assert_allclose(notes[1]["weight"].numpy(), expected, rtol=1e-9)
    # A kernel without variance says nothing.
    np.testing.assert_array_equal(notes[2]["weight"].numpy(), notes[1]["weight"].numpy())


def test_two_guards_and_two_requests_track_apart() -> None:
    mixture, weight = data(), Dynamic(prior=0.3)
    one, two = (SafeDenoiser(negation=mixture.references(condition=c), weight=weight) for c in ("unsafe", "safe"))
    memory: dict = {}
    x_t = noisy(mixture, LEVELS[0])
    for guard in (one, two):
        guard(mixture(x_t, LEVELS[0]), at(x_t, LEVELS[0], memory=memory))
    assert len(memory) == 2
    later, alone, fresh = {}, {}, {}
    x_s, level = noisy(mixture, LEVELS[2], seed=1), LEVELS[2]
    one(mixture(x_s, level), at(x_s, level, later, step=1, memory=memory))
    memory = {}
    one(mixture(x_t, LEVELS[0]), at(x_t, LEVELS[0], memory=memory))
    one(mixture(x_s, level), at(x_s, level, alone, step=1, memory=memory))
    one(mixture(x_s, level), at(x_s, level, fresh, step=1))
    assert torch.equal(later["weight"], alone["weight"])
    assert not torch.equal(later["weight"], fresh["weight"])


def test_the_tracked_weight_is_refused_without_noise() -> None:
    mixture = data()
    guard = SafeDenoiser(negation=mixture.references(condition="unsafe"), weight=Dynamic(prior=0.3))
    needs = requirements(guard)
    assert needs.stochastic
    assert needs.one_call
    memory: dict = {}
    x_t = noisy(mixture, LEVELS[0])
    guard(mixture(x_t, LEVELS[0]), at(x_t, LEVELS[0], memory=memory, eta=0.0))
    with pytest.raises(UnsoundCombination, match=r"adds no noise .* DDPM"):
        guard(mixture(x_t, LEVELS[2]), at(x_t, LEVELS[2], memory=memory, eta=0.0, step=1))


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda m: exact_guard(m, strength=-0.1), InvalidInput, "steer towards"),
        (lambda m: exact_guard(m, strength=math.nan), InvalidInput, "finite strength"),
        (lambda m: exact_guard(m, max_beta=0.0), InvalidInput, "0 < max_beta"),
        (lambda m: exact_guard(m, gate=1.0), InvalidInput, "0 <= gate < 1"),
        (lambda m: TwoSample(safe=m.references(), prior=0.0), InvalidInput, "0 < prior < 1"),
        (lambda m: TwoSample(safe=m.references(), slope=-1.0), InvalidInput, "slope > 0"),
        (lambda m: TwoSample(safe=m.references(), bandwidth=0.0), InvalidInput, "bandwidth: expected a positive"),
        (lambda m: TwoSample(safe=m.references(), temperature=0.0), InvalidInput, "temperature: expected"),
        (lambda m: Dynamic(prior=0.995), InvalidInput, r"prior <= bounds\[1\]"),
        (lambda m: Dynamic(prior=0.2, tau=0.0), InvalidInput, "finite tau > 0"),
        (lambda m: Gate(threshold=math.inf), InvalidInput, "never open"),
        (
            lambda m: SafeDenoiser(negation=m.references(condition="unsafe"), weight=TwoSample(safe=m.references())),
            UnsoundCombination,
            "4 pictures are in the negation set and in the safe set",
        ),
        (
            lambda m: SafeDenoiser(
                negation=m.references(),
                weight=TwoSample(safe=NegationSet(latents=torch.ones(1, 4), space=Space(encoder="pixels", shape=(4,)))),
            ),
            NegationMismatch,
            "expected latents of",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(build, error, sentence) -> None:
    with pytest.raises(error, match=sentence):
        build(data())


# -- calibration ---------------------------------------------------------------------------------------------------


def test_logistic_regression_finds_the_affine_map_of_two_gaussians() -> None:
    """Scores N(±1, 1) have log-odds exactly 2z; scored as 3z − 4 the map back is slope 2/3, offset 8/3."""
    generator = torch.Generator().manual_seed(0)
    high, low = (torch.randn(20_000, dtype=torch.float64, generator=generator) + m for m in (1.0, -1.0))
    # Unequal class sizes must not matter: both classes weigh the same.
    slope, offset = fit_logistic(3 * high - 4, 3 * low[:5_000] - 4)
    assert slope == pytest.approx(2 / 3, rel=0.04)
    assert offset == pytest.approx(8 / 3, rel=0.04)
    assert auroc(high, low) == pytest.approx(stats.norm.cdf(2 / math.sqrt(2)), abs=0.005)
    assert auroc(torch.ones(3), torch.ones(4)) == 0.5


def test_calibration_repairs_an_overconfident_kernel() -> None:
    """Held-out points of the ring through a kernel far too narrow: badly calibrated before, well after."""
    ring = Mixture(
        means=torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64),
        scales=torch.ones(2, dtype=torch.float64),
        weights=torch.ones(2, dtype=torch.float64),
        labels=("unsafe", "safe"),
    )
    generator = torch.Generator().manual_seed(0)
    draw = {name: ring.sample(400, condition=name, generator=generator)[0] for name in ("unsafe", "safe")}
    negation, safe = (ring.references(60, condition=name, generator=generator) for name in ("unsafe", "safe"))
    raw = TwoSample(safe=safe, prior=0.1, bandwidth=0.1)
    fitted, report = calibrate(raw, negation, **draw)
    # The best possible score is Gaussian with means ±2/2 standard deviations: AUROC Φ(√2) = 0.921; kernels lose some.
    assert 0.8 < report.auroc < 0.93
    assert report.brier_after < report.brier_before - 0.02
    assert 0.0 < report.slope < 0.5
    assert (fitted.prior, fitted.bandwidth, fitted.slope, fitted.offset) == (0.1, 0.1, report.slope, report.offset)
    assert sum(row.n for row in report.reliability) == report.unsafe + report.safe == 800
    # Logistic regression with an intercept is calibrated in the large: mean prediction = share of the class, 1/2.
    z = torch.cat([score(raw, negation, draw["unsafe"]), score(raw, negation, draw["safe"])])
    assert (report.slope * z + report.offset).sigmoid().mean().item() == pytest.approx(0.5, abs=1e-6)


def test_calibration_at_noise_levels_leaves_an_exact_posterior_alone() -> None:
    mixture = data()
    weight = TwoSample(safe=mixture.references(condition="safe"), prior=SHARE)
    generator = torch.Generator().manual_seed(0)
    draw = {name: mixture.sample(2000, condition=name, generator=generator)[0] for name in ("unsafe", "safe")}
    _, report = calibrate(
        weight, mixture.references(condition="unsafe"), **draw, levels=[NoiseLevel(0.3, 1.0)], generator=generator
    )
    assert report.slope == pytest.approx(1.0, abs=0.15)  # a standard error is about 0.05 here
    assert report.offset == pytest.approx(0.0, abs=0.15)


def test_calibration_refuses_swapped_classes_and_missing_levels() -> None:
    mixture = data()
    weight = TwoSample(safe=mixture.references(condition="safe"), bandwidth=0.5)
    negation = mixture.references(condition="unsafe")
    unsafe, safe = (mixture.references(condition=name).latents + 0.01 for name in ("unsafe", "safe"))
    with pytest.raises(UnsoundCombination, match="do not score above"):
        calibrate(weight, negation, unsafe=safe, safe=unsafe)
    with pytest.raises(InvalidInput, match="exactly when bandwidth is None"):
        calibrate(weight, negation, unsafe=unsafe, safe=safe, levels=[LEVELS[0]])
    with pytest.raises(InvalidInput, match="two samples of each class"):
        calibrate(weight, negation, unsafe=unsafe[:1], safe=safe)
