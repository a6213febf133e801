r"""Pixel-wise uncertainty against data whose denoiser is known.

For Gaussian data of mean m and variance tau² at the level (a, s), with v = a² tau² + s²:
D(x) = m + (a tau²/v)(x - a m), the predicted noise is (s/v)(x - a m), its variance over x = a y + s e is (s²/v)², and
Var[x_0 | x_t] = tau² s²/v. A Dirac is tau = 0: D = m, the predicted noise is the noise that was put in.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerclear.attach.api import attach
from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.guards import AleatoricGuidance, Certain, Settled, requirements, when
from steerclear.guards.aleatoric import above_quantile, posterior_noise, predicted_noise
from steerclear.guards.base import Requires
from steerclear.noise import NoiseLevel
from steerclear.testing.pipelines import tiny_call, tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LEVELS = {
    "vp": NoiseLevel(0.6, 0.8),
    "early": NoiseLevel(0.068, 0.9977),
    "flow": NoiseLevel(0.3, 0.7),
    "ve": NoiseLevel(1.0, 5.0),
}
MEAN = 0.25


def gaussian(tau, level):
    """The denoiser of N(MEAN, tau²), in the dtype that it is asked in."""
    a, s = level.alpha, level.sigma
    return lambda x: MEAN + a * tau**2 / (a**2 * tau**2 + s**2) * (x - a * MEAN)


def state_of(denoise, level, shape=(3, 2, 4, 4), seed=0, step=0, memory=None, dtype=torch.float32):
    """A state in which the sampler denoises with ``denoise``, and the list of noisy samples it was asked about."""
    x_t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    asked = []

    def again(x):
        asked.append(x)
        return denoise(x)

    state = DenoiseState(
        x_t=x_t,
        level=level,
        step=step,
        num_steps=20,
        denoised=denoise(x_t),
        again=again,
        memory={} if memory is None else memory,
    )
    return state, asked


def noise_of(asked, denoised, level):
    """What was put into the copies, (M, batch, ...), float64."""
    return (np.stack([x.double().numpy() for x in asked]) - level.alpha * denoised.double().numpy()) / level.sigma


def reference(asked, x_t, denoised, level, tau, q):
    """The whole method in float64 NumPy, for Gaussian data."""
    a, s = level.alpha, level.sigma
    v = a**2 * tau**2 + s**2
    copies, x_t, x = (np.asarray(y, dtype=np.float64) for y in (np.stack(asked), x_t, denoised))
    seen = s / v * (copies - a * MEAN)
    e = (x_t - a * x) / s
    everything = np.concatenate([seen, e[None]])
    u = ((everything - everything.mean(0)) ** 2).sum(0) / (len(everything) - 1)
    abar = a**2 / (a**2 + s**2)
    post = 1 / (len(seen) / u + 1 / abar) * (1 / u) * seen.sum(0)
    mask = np.stack([one > np.quantile(one, q) for one in u])
    return np.where(mask, (x_t - s * post) / a, x), mask, u


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("tau", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("samples", "q"), [(5, 0.95), (2, 0.5)])
def test_the_guard_is_the_published_equation(level, tau, samples, q):
    state, asked = state_of(gaussian(tau, level), level, shape=(3, 4, 8, 8))
    noted = {}
    state.note = lambda name, value: noted.update({name: value})
    guarded = AleatoricGuidance(samples=samples, quantile=q)(state.denoised, state)
    expected, mask, u = reference(asked, state.x_t, state.denoised, level, tau, q)
    assert len(asked) == samples
    changed = (guarded != state.denoised).numpy()
    assert (changed == mask).mean() == 1.0  # 256 elements: the mask has no near ties
    assert mask.reshape(3, -1).sum(1).tolist() == [round(256 * (1 - q) + 0.5 - 1e-9)] * 3
    scale = np.abs(expected).max()
    assert np.abs(guarded.double().numpy() - expected).max() <= 2e-5 * scale / min(1.0, level.alpha)
    assert noted["uncertainty"].numpy() == pytest.approx(u.reshape(3, -1).mean(1), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_uncertainty_of_gaussian_data_has_a_closed_form(level):
    """u = (s²/v)²: 1 for a Dirac, where the network is sure, towards 0 for wide data, where it knows nothing."""
    for tau in (0.0, 0.7, 3.0):
        state, _ = state_of(gaussian(tau, level), level, shape=(2, 1, 64, 64))
        u = predicted_noise(state.denoised, state, samples=8, seed=0, owner="u").var(0).mean((1, 2, 3))
        v = level.alpha**2 * tau**2 + level.sigma**2
        expected = (level.sigma**2 / v) ** 2
        # The mean of 4096 sample variances of 8 has a relative error of sqrt(2/7/4096) = 0.008.
        assert u.numpy() == pytest.approx([expected] * 2, rel=5 * 0.0085)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_expected_error_of_gaussian_data_is_its_posterior_deviation(level):
    """0 for a Dirac; the opposite order from u."""
    for tau in (0.7, 3.0):
        state, _ = state_of(gaussian(tau, level), level, shape=(2, 1, 64, 64))
        noted = {}
        state.note = lambda name, value, noted=noted: noted.update({name: value})
        Certain(threshold=1.0, samples=8)(state)
        a, s = level.alpha, level.sigma
        v = a**2 * tau**2 + s**2
        # The offset D(a x̂) - x̂ adds its own square to the variance of each term, at most that of x̂ itself.
        offset = (gaussian(tau, level)(a * state.denoised) - state.denoised).square().mean().item()
        error = s / a * np.sqrt((2 * (a * tau**2 * s / v) ** 2 + offset) / 8 / 4096)
        assert noted["expected_error"].square().numpy() == pytest.approx([tau**2 * s**2 / v] * 2, abs=5 * error)


def test_a_dirac_is_certain_and_a_wide_gaussian_is_not():
    level = LEVELS["vp"]
    batch = torch.tensor([0.0, 0.1, 3.0]).reshape(3, 1, 1, 1)
    v = 0.36 * batch**2 + 0.64
    state, asked = state_of(lambda x: MEAN + 0.6 * batch**2 / v * (x - 0.6 * MEAN), level, shape=(3, 1, 16, 16))
    assert Certain(threshold=0.3)(state).tolist() == [True, True, False]
    assert len(asked) == 3
    state, _ = state_of(lambda x: torch.full_like(x, MEAN), level, shape=(4, 1, 16, 16))
    assert Certain(threshold=0.0, samples=1)(state).shape == (4,)


def test_the_sample_axis_is_the_one_that_is_summed(rng):
    """Two samples of one batch and three copies: the wrong axis crashes, or permutes."""
    epsilons, u = torch.randn(3, 2, 1, 2, 2, generator=rng), torch.rand(2, 1, 2, 2, generator=rng) + 0.1
    level = LEVELS["vp"]
    got = posterior_noise(epsilons, u, level)
    for row in range(2):
        for k in range(4):
            e = epsilons[:, row].flatten(1)[:, k].double().numpy()
            uk = float(u[row].flatten()[k])
            assert float(got[row].flatten()[k]) == pytest.approx(e.sum() / uk / (3 / uk + 1 / 0.36), rel=1e-5)


def test_posterior_noise_goes_from_the_mean_to_zero():
    """No noise in the observations: their mean. Nothing but noise: the prior's mean, 0."""
    epsilons = torch.tensor([1.0, 2.0, 6.0]).reshape(3, 1, 1)
    level = LEVELS["vp"]
    assert posterior_noise(epsilons, torch.zeros(1, 1), level).item() == pytest.approx(3.0, rel=1e-6)
    assert abs(posterior_noise(epsilons, torch.full((1, 1), 1e12), level).item()) <= 1e-9


@given(st.integers(1, 40), st.floats(0.0, 1.0), st.booleans())
def test_the_mask_is_that_of_numpys_quantile(n, q, ties):
    rng = torch.Generator().manual_seed(n)
    u = torch.rand(2, n, generator=rng, dtype=torch.float64)
    u = (4 * u).round() if ties else u
    expected = [row > np.quantile(row, q) for row in u.numpy()]
    assert (above_quantile(u, q).numpy() == np.stack(expected)).all()


def test_nan_is_above_every_quantile():
    assert above_quantile(torch.tensor([[0.0, float("nan"), 1.0]]), 0.9).tolist() == [[False, True, False]]


# Rows, random numbers, neutrality ----------------------------------------------------------------------------------


def test_samples_do_not_see_their_batch():
    level = LEVELS["vp"]
    denoise = lambda x: torch.tanh(2 * x)  # noqa: E731 - any elementwise denoiser
    full, _ = state_of(denoise, level)
    for guard in (AleatoricGuidance(), Certain(threshold=0.3)):
        if isinstance(guard, AleatoricGuidance):
            together, act = guard(full.denoised, full), lambda s: guard(s.denoised, s)  # noqa: B023 - used at once
        else:
            together, act = guard(full), guard
        for rows in ([1], [2, 0]):
            alone = DenoiseState(
                x_t=full.x_t[rows], level=level, step=0, num_steps=20, denoised=full.denoised[rows], again=denoise
            )
            assert torch.equal(act(alone), together[rows])


def test_noise_belongs_to_the_sample_the_step_and_the_seed():
    level, memory = LEVELS["vp"], {}
    first, asked = state_of(lambda x: 0 * x, level, memory=memory)
    guard = AleatoricGuidance(samples=2)
    guard(first.denoised, first)
    later, asked_later = state_of(lambda x: 0 * x, level, memory=memory, step=1)
    guard(later.denoised, later)
    again, asked_again = state_of(lambda x: 0 * x, level)
    guard(again.denoised, again)
    seeded, asked_seeded = state_of(lambda x: 0 * x, level)
    AleatoricGuidance(samples=2, seed=1)(seeded.denoised, seeded)
    assert torch.equal(asked[0], asked_again[0])
    for other in (asked[1], asked_later[0], asked_seeded[0], asked[0].flip(0)):
        assert (other - asked[0]).abs().mean() > 0.1
    noise = noise_of(asked + asked_later, first.denoised, level)
    assert abs(noise.mean()) <= 5 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) <= 5 * np.sqrt(2 / noise.size)


def test_a_condition_draws_the_same_noise_however_often_it_was_asked_before():
    """The guard that it gates may want something at a step because of another sample of the batch."""
    level = LEVELS["vp"]

    def errors(asked_at):
        memory, noted = {}, []
        for step in range(3):
            state, _ = state_of(lambda x: torch.tanh(2 * x), level, seed=step, step=step, memory=memory)
            state.note = lambda name, value: noted.append(value)
            certain.observe(state)
            if step in asked_at:
                certain(state)
        return noted[-1]

    certain = Certain(threshold=0.1)
    assert torch.equal(errors({2}), errors({0, 1, 2}))


def test_everything_left_alone_is_left_alone():
    state, asked = state_of(lambda x: 0.5 * x, LEVELS["vp"])
    assert AleatoricGuidance(quantile=1.0)(state.denoised, state) is None
    assert not asked
    before = state.denoised.clone()
    guarded = AleatoricGuidance(quantile=0.9)(state.denoised, state)
    assert torch.equal(state.denoised, before)
    assert (guarded == before).float().mean().item() == pytest.approx(28 / 32)  # floor(0.9 · 31) + 1 = 28 of 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype):
    state, asked = state_of(lambda x: 0.5 * x, LEVELS["vp"], dtype=dtype)
    assert AleatoricGuidance()(state.denoised, state).dtype == dtype
    assert asked[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert Certain(threshold=1.0)(state).dtype == torch.bool


def test_a_level_without_signal_says_nothing():
    state, asked = state_of(lambda x: 0.5 * x, NoiseLevel(0.0, 1.0))
    assert AleatoricGuidance()(state.denoised, state) is None
    assert not Certain(threshold=1e9)(state).any()
    assert not asked


def test_nan_is_passed_on():
    state, _ = state_of(lambda x: x * float("nan"), LEVELS["vp"])
    assert AleatoricGuidance()(torch.zeros_like(state.x_t), state).isnan().any()
    assert Certain(threshold=0.1)(state).all()


# How far the estimate moved ----------------------------------------------------------------------------------------


def test_settled_compares_with_the_step_before():
    memory, answers = {}, []
    settled = Settled(threshold=0.5)
    for step, value in enumerate((0.0, 1.0, 1.3, float("nan"))):
        state, _ = state_of(lambda x, value=value: x * 0 + torch.tensor([value, 0.0, 0.0]).reshape(3, 1, 1, 1),
                            LEVELS["vp"], step=step, memory=memory)  # fmt: skip
        settled.observe(state)
        answers.append(settled(state).tolist())  # the same state twice is one call
    assert answers == [[False] * 3, [False, True, True], [True] * 3, [True] * 3]


def test_settled_does_not_trust_a_gap():
    memory, settled = {}, Settled(threshold=0.5)
    for step, expected in ((0, False), (1, True), (1, True), (3, False)):
        state, _ = state_of(lambda x: 0 * x, LEVELS["vp"], step=step, memory=memory)
        assert settled(state).tolist() == [expected] * 3


def test_when_keeps_the_history_also_while_the_guard_has_nothing_to_do():
    pipe, moves = tiny_pipeline("ddim"), []

    def guard(denoised, state):
        return denoised + 1.0 if state.step == 2 else None

    with attach(pipe, when(Settled(threshold=1e9), guard)) as trace:
        pipe(**tiny_call("ddim"))
    moves = [row["move"] for row in trace.records() if "move" in row]
    assert len(moves) == 1
    assert 0.0 < moves[0] < 1e9
    assert [row["fired"] for row in trace.records()] == [False, False, True]


# In pipelines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddpm", "dit", "sd", "sd3"])
def test_the_guard_acts_in_its_window_and_is_counted(kind):
    pipe = tiny_pipeline(kind)
    call = tiny_call(kind) | {"num_inference_steps": 10}
    with attach(pipe, AleatoricGuidance.published()) as trace:
        pipe(**call)
    fired = [row["fired"] for row in trace.records()]
    acts = [kind != "sd3", True]  # 3/20 of ten steps, rounded up; SD3's first level has no signal
    assert fired == acts + [False] * 8
    branches = 1 if kind == "ddpm" else 2
    assert trace.network_evaluations == 10 + sum(acts) * 5 * branches


@pytest.mark.parametrize("kind", ["ddpm", "sd"])
def test_neutral_parameters_are_the_pipeline_itself(kind):
    """The guard draws random numbers of its own, so the sampler's are not shifted either."""
    pipe = tiny_pipeline(kind)
    plain = pipe(**tiny_call(kind)).images
    with attach(pipe, AleatoricGuidance(quantile=1.0)):
        assert (pipe(**tiny_call(kind)).images == plain).all()
    with attach(pipe, when(Certain(threshold=1e9), lambda denoised, state: denoised.clone())):
        assert (pipe(**tiny_call(kind)).images == plain).all()


def test_a_guard_abstains_where_the_estimate_is_not_certain():
    pipe = tiny_pipeline("ddim")
    plain = pipe(**tiny_call("ddim")).images
    with attach(pipe, when(Certain(threshold=0.0), lambda denoised, state: denoised + 1)) as trace:
        abstained = pipe(**tiny_call("ddim")).images
    errors = [row["expected_error"] for row in trace.records()]
    fired = [row["fired"] for row in trace.records()]
    assert fired == [error == 0.0 for error in errors]
    assert any(error > 0.0 for error in errors)
    if not any(fired):
        assert (abstained == plain).all()


# Values ------------------------------------------------------------------------------------------------------------


def test_the_published_window():
    def active(guard, step):
        state, asked = state_of(lambda x: 0.5 * x, LEVELS["vp"], step=step)
        guard(state.denoised, state)
        return len(asked)

    assert [active(AleatoricGuidance.published(), step) for step in range(20)] == [5] * 3 + [0] * 17
    late = [active(AleatoricGuidance.published(start=15), step) for step in range(20)]
    assert late == [0] * 15 + [5] * 3 + [0] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AleatoricGuidance(samples=0), "samples >= 1"),
        (lambda: AleatoricGuidance(quantile=1.5), "quantile"),
        (lambda: Certain(threshold=-1.0), "threshold"),
        (lambda: Certain(threshold=float("nan")), "threshold"),
        (lambda: Certain(threshold=1.0, samples=0), "samples >= 1"),
        (lambda: Settled(threshold=float("inf")), "threshold"),
    ],
)
def test_values_outside_their_range_are_refused(make, message):
    with pytest.raises(InvalidInput, match=message):
        make()


def test_what_is_not_lent_is_named():
    bare = DenoiseState(x_t=torch.zeros(1, 2), level=LEVELS["vp"], step=0, num_steps=1)
    for ask in (lambda: AleatoricGuidance()(bare.x_t, bare), lambda: Certain(threshold=1.0)(bare)):
        with pytest.raises(UnsoundCombination, match="expected"):
            ask()
    with pytest.raises(UnsoundCombination, match=r"state\.denoised"):
        Settled(threshold=1.0)(bare)
    assert requirements(AleatoricGuidance.published()) == Requires(evaluations=True)
    assert requirements(when(Certain(threshold=1.0), lambda d, s: None)) == Requires(evaluations=True)
    assert requirements(when(Settled(threshold=1.0), lambda d, s: None)) == Requires()
