"""SPELL: the projection against closed forms and SciPy, the guard on the way, and the certificate at the end."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from steerclear.attach import attach
from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, NegationMismatch, SampleRefused
from steerclear.guards import SPELL, FinishedSamples, Shield, during, radius_of, requirements
from steerclear.guards.shields import project
from steerclear.negation import NegationSet, Space, encoder_of
from steerclear.noise import NoiseLevel
from steerclear.testing.pipelines import tiny_call, tiny_pipeline

D = 16


def space(*shape: int, encoder: str = "sha256:test") -> Space:
    return Space(encoder=encoder, shape=shape, name="test")


def shielded(points: Tensor, radius: float, **more) -> SPELL:
    negation = NegationSet(latents=points, space=space(*points.shape[1:]))
    return SPELL(shields=(Shield(negation=negation, radius=radius),), **more)


def state(x: Tensor, **more) -> DenoiseState:
    return DenoiseState(x_t=x, level=NoiseLevel(1.0, 0.5), step=0, num_steps=4, **more)


def axis(k: int = 0, scale: float = 1.0, size: int = D) -> Tensor:
    return scale * torch.eye(size)[k]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def away(x: Tensor, centres: Tensor) -> np.ndarray:
    """Distances in float64 NumPy."""
    return np.linalg.norm(x.double().numpy()[None] - centres.double().numpy(), axis=1)


# The projection ------------------------------------------------------------------------------------------------------


def test_one_ball_is_left_by_the_shortest_way() -> None:
    x, z = random(D), random(D, seed=1)
    direction = (x.double() - z.double()) / np.linalg.norm((x.double() - z.double()).numpy())
    found = project(x, z[None], torch.tensor([9.0]))
    torch.testing.assert_close(found.point.double(), z.double() + 9.0 * direction, rtol=0, atol=1e-5)
    assert found.slack >= 0.0
    assert found.distance == pytest.approx(9.0, rel=1e-6)


def test_antipodal_shields_in_which_the_plain_sum_stays_where_it_is() -> None:
    z = torch.stack([axis(scale=10.0), axis(scale=-10.0)])
    x = torch.zeros(1, D)
    plain = shielded(z, 60.0, overlap="sum", strength=1.0)(x, state(x))
    assert away(plain[0], z).min() == pytest.approx(10.0)
    found = project(x[0], z, torch.full((2,), 60.0))
    assert found.slack >= 0.0
    # Out of the line through both centres: sqrt(60^2 - 10^2), and no shorter way exists.
    assert np.linalg.norm(found.point.numpy()) == pytest.approx(math.sqrt(3500.0), rel=1e-5)


def test_twenty_near_duplicates_which_the_plain_sum_overshoots() -> None:
    distance = (20 * 60.0 - 458.0) / 19  # where the sum of twenty pushes of 60 - d ends at 458
    z = axis(scale=distance) + 1e-4 * random(20, D)
    x = torch.zeros(1, D)
    plain = shielded(z, 60.0, overlap="sum", strength=1.0)(x, state(x))
    assert away(plain[0], z).min() == pytest.approx(458.0, abs=0.1)
    found = project(x[0], z, torch.full((20,), 60.0))
    assert found.slack >= 0.0
    assert found.distance == pytest.approx(60.0, abs=1e-4)
    assert np.linalg.norm(found.point.numpy()) == pytest.approx(60.0 - distance, abs=1e-2)


def test_a_sample_on_a_centre_leaves_by_a_fixed_direction() -> None:
    z = random(3, D)
    found = project(z[1].clone(), z, torch.full((3,), 7.0))
    assert found.slack >= 0.0
    assert torch.equal(found.point, project(z[1].clone(), z, torch.full((3,), 7.0)).point)


def test_ends_on_a_line_are_found_where_there_is_no_way_round() -> None:
    found = project(torch.tensor([0.5]), torch.tensor([[0.0], [1.5], [3.0]]), torch.tensor([1.0, 1.0, 1.0]))
    assert found.slack >= 0.0
    assert float(found.point) in (pytest.approx(-1.0, abs=1e-5), pytest.approx(4.0, abs=1e-5))


@pytest.mark.parametrize("seed", range(8))
def test_as_near_as_scipy_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z, r = rng.normal(size=(4, 3)), rng.uniform(0.8, 1.6, size=4)
    x = z.mean(0) + 0.2 * rng.normal(size=3)
    found = project(torch.tensor(x), torch.tensor(z), torch.tensor(r))
    outside = {
        "type": "ineq",
        "fun": lambda y: ((y - z) ** 2).sum(1) - r**2,
        "jac": lambda y: 2 * (y - z),
    }
    best = math.inf
    for _ in range(20):
        start = x + 2.0 * rng.normal(size=3)
        done = minimize(lambda y: ((y - x) ** 2).sum(), start, jac=lambda y: 2 * (y - x), constraints=outside)
        if done.success and (np.linalg.norm(done.x - z, axis=1) >= r - 1e-6).all():
            best = min(best, math.sqrt(done.fun))
    assert found.slack >= 0.0
    ours = np.linalg.norm(found.point.numpy() - x)
    assert best - 1e-5 <= ours <= 1.6 * best + 1e-5  # local, against the best of twenty starts
    # And it is a local solution: SciPy finds no way down from there.
    again = minimize(
        lambda y: ((y - x) ** 2).sum(), found.point.numpy(), jac=lambda y: 2 * (y - x), constraints=outside
    )
    assert math.sqrt(again.fun) >= ours - 1e-4


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 12),
    size=st.integers(1, 6),
    scale=st.floats(0.05, 3.0),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_outside_every_shield_or_said_not_to_be(
    count: int, size: int, scale: float, seed: int, dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(count, size, generator=rng)
    r = scale * (0.5 + torch.rand(count, generator=rng))
    x = torch.randn(size, generator=rng).to(dtype)
    found = project(x, z, r)
    true = (away(found.point, z) - r.double().numpy()).min()
    assert found.point.dtype == dtype
    assert found.slack == pytest.approx(true, abs=1e-9)
    assert found.slack >= 0.0  # no dtype and no dimension is too small for these
    if (away(x, z) >= r.double().numpy()).all():
        assert torch.equal(found.point, x)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 8))
def test_the_order_of_shields_does_not_matter(seed: int, count: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    z, x = torch.randn(count, 8, generator=rng, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    x = x + 0.3 * torch.randn(8, generator=rng, dtype=torch.float64)
    r, order = torch.full((count,), 3.0, dtype=torch.float64), torch.randperm(count, generator=rng)
    one, two = project(x, z, r), project(x, z[order], r)
    torch.testing.assert_close(one.point, two.point, rtol=0, atol=1e-4)


def test_many_overlapping_shields_become_active_in_rounds() -> None:
    z, x = random(300, 64), 0.1 * random(64, seed=2)
    found = project(x, z, torch.full((300,), 8.5))
    assert found.slack >= 0.0
    assert found.active >= 64


def test_what_is_not_finite_is_not_certified() -> None:
    found = project(torch.tensor([1.0, math.nan]), torch.zeros(1, 2), torch.tensor([1.0]))
    assert math.isnan(found.slack)


# On the way ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", ["sum", "projection"])
def test_one_active_shield_is_the_published_update(overlap: str) -> None:
    z, x = random(3, D) + 20 * torch.eye(3, D), random(2, D, seed=1)
    x[0] = z[0] + 0.1 * x[0]
    out = shielded(z, 2.0, overlap=overlap)(x, state(x))
    distance = away(x[0], z)[0]
    expected = x[0].double() + 1.6 * (2.0 / distance - 1.0) * (x[0].double() - z[0].double())
    torch.testing.assert_close(out[0].double(), expected, rtol=0, atol=1e-5)
    assert away(out[0], z)[0] == pytest.approx(distance + 1.6 * (2.0 - distance), rel=1e-5)
    assert torch.equal(out[1], x[1])


def test_strength_one_lands_on_the_sphere_and_zero_waits_for_the_end() -> None:
    z = random(1, D)
    x = z + 0.2
    assert away(shielded(z, 3.0, strength=1.0)(x, state(x))[0], z)[0] == pytest.approx(3.0, rel=1e-6)
    assert shielded(z, 3.0, strength=0.0)(x, state(x)) is None


def test_outside_all_shields_nothing_happens() -> None:
    z, x = random(5, D), 50 + random(3, D)
    guard = shielded(z, 4.0)
    assert guard(x, state(x)) is None
    assert guard.settle(x, state(x)) is None
    assert torch.equal(shielded(z, 4.0, overlap="sum")(x, state(x)), x)


@pytest.mark.parametrize("overlap", ["sum", "projection"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_callers_dtype_comes_back_and_nothing_changes_in_place(overlap: str, dtype: torch.dtype) -> None:
    z, x = random(4, 2, 4, 2), (0.1 * random(3, 2, 4, 2, seed=1)).to(dtype)
    before, guard = x.clone(), shielded(z, 5.0, overlap=overlap)
    for out in (guard(x, state(x)), guard.settle(x, state(x))):
        assert (out.dtype, out.shape) == (dtype, x.shape)
    assert torch.equal(x, before)
    settled = guard.settle(x, state(x))
    assert min(away(row.flatten(), z.flatten(1)).min() for row in settled) >= 5.0


@pytest.mark.parametrize("overlap", ["sum", "projection"])
def test_samples_do_not_know_of_each_other(overlap: str) -> None:
    z, x = random(6, D), 0.3 * random(4, D, seed=3)
    guard = shielded(z, 4.5, overlap=overlap)
    together = guard(x, state(x))
    other = x.clone()
    other[2] = z[0]
    changed = guard(other, state(other))
    assert torch.equal(changed[[0, 1, 3]], together[[0, 1, 3]])
    torch.testing.assert_close(torch.cat([guard(row[None], state(row[None])) for row in x]), together)


def test_batch_shields_push_samples_apart_and_earlier_calls_count() -> None:
    memory = FinishedSamples()
    guard = SPELL(batch_radius=4.0, finished=memory, strength=1.0)
    x = torch.stack([torch.zeros(D), axis(0), axis(1, 30.0)])
    out = guard(x, state(x))
    assert np.linalg.norm((out[0] - x[1]).numpy()) == pytest.approx(4.0, rel=1e-5)  # from where the others are
    assert np.linalg.norm((out[1] - x[0]).numpy()) == pytest.approx(4.0, rel=1e-5)
    assert torch.equal(out[2], x[2])
    end = state(x)
    settled = guard.settle(x, end)
    assert torch.equal(settled[0], x[0])
    gaps = [away(settled[k], settled[torch.arange(3) != k]).min() for k in range(3)]
    assert min(gaps) >= 4.0
    assert len(memory) == 3
    assert guard.settle(settled, end) is None  # asked again about its own samples
    assert len(memory) == 3
    later = guard.settle(x, state(x))
    assert min(away(row, settled).min() for row in later) >= 4.0
    memory.clear()
    assert len(memory) == 0
    assert SPELL(batch_radius=4.0)(x[:1], state(x[:1])) is None


def test_finished_samples_forget_the_oldest_and_keep_their_shape() -> None:
    memory = FinishedSamples(limit=3)
    for call in range(3):
        memory.keep(call, random(2, D, seed=call))
    assert len(memory) == 2
    with pytest.raises(InvalidInput, match="from an earlier call"):
        memory.latents((D + 1,))
    with pytest.raises(InvalidInput, match="limit"):
        FinishedSamples(limit=0)


# The certificate -----------------------------------------------------------------------------------------------------


def notes(guard: SPELL, x: Tensor, **more) -> tuple[Tensor | None, dict[str, Tensor]]:
    kept: dict[str, Tensor] = {}
    return guard.settle(x, state(x, note=kept.__setitem__, **more)), kept


def test_the_certificate_is_per_sample_and_rechecked() -> None:
    z = torch.cat([torch.stack([axis(scale=10.0), axis(scale=-10.0)]), 40 * torch.eye(2, D)])
    x = torch.stack([torch.zeros(D), axis(5, 200.0)])
    settled, kept = notes(shielded(z, 60.0), x)
    assert away(settled[0], z).min() >= 60.0
    assert torch.equal(settled[1], x[1])
    assert kept["certified"].tolist() == [True, True]
    assert kept["final distance"][0].item() == pytest.approx(away(settled[0], z).min(), rel=1e-6)
    assert kept["final active"].tolist()[1] == 0
    assert kept["moved"][1].item() == 0.0


def test_a_sample_that_would_have_to_be_moved_too_far_is_refused() -> None:
    z = random(1, D)
    x = torch.cat([z + 0.1, z + 30.0, z + 0.01])
    with pytest.raises(SampleRefused, match=r"sample 0 would have to be moved by .*; sample 2") as error:
        shielded(z, 9.0, max_move=5.0).settle(x, state(x))
    assert error.value.samples == (0, 2)
    guard, memory = shielded(z, 9.0, max_move=5.0, refuse="blank"), {}
    settled, kept = notes(guard, x, memory=memory)
    assert torch.equal(settled[[0, 2]], torch.zeros(2, D))
    assert torch.equal(settled[1], x[1])
    assert kept["refused"].tolist() == [True, False, True]
    assert kept["certified"].tolist() == [False, True, False]
    again, kept = notes(guard, settled, memory=memory)
    assert again is None
    assert kept["refused"].tolist() == [True, False, True]


def test_nan_at_the_end_is_refused() -> None:
    x = torch.full((1, D), math.nan)
    with pytest.raises(SampleRefused, match="sample 0"):
        shielded(random(2, D), 1.0).settle(x, state(x))


@pytest.mark.parametrize("kind", ["sd", "flux", "dit"])
def test_the_pipelines_own_latents_are_certified(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    size = encoder_of(pipe, height=16, width=16).space if kind == "flux" else encoder_of(pipe).space
    latents = []
    free = attach(pipe, _Keep(latents))
    with free:
        pipe(**tiny_call(kind))
    drawn = latents.pop()
    near = drawn + 0.05 * random(3, *drawn.shape[1:])
    negation = NegationSet(latents=near, space=size)
    radius = 0.5 * math.sqrt(drawn[0].numel())
    guard = SPELL(shields=(Shield(negation=negation, radius=radius),))
    with attach(pipe, guard, _Keep(latents)) as trace:
        pipe(**tiny_call(kind))
    assert away(latents.pop().flatten(), near.flatten(1)).min() >= radius
    last = trace.records()[-1]
    assert last["certified"] is True
    assert last["final distance"] >= radius
    with attach(pipe, SPELL(shields=guard.shields, strength=0.0)) as trace:
        pipe(**tiny_call(kind))
    last = trace.records()[-1]
    assert last["moved"] == pytest.approx(radius - last["distance"], rel=0.1)
    assert last["final active"] > 0
    assert "certified" not in trace.records()[0]
    with attach(pipe, during(guard, stop=0.5)) as trace:
        pipe(**tiny_call(kind))
    assert "certified" not in trace.records()[-1]
    with attach(pipe, SPELL(shields=guard.shields, max_move=1e-3, strength=0.0)), pytest.raises(SampleRefused):
        pipe(**tiny_call(kind))


class _Keep:
    """Keeps what the pipeline is about to decode."""

    def __init__(self, kept: list[Tensor]) -> None:
        self.kept = kept

    def __call__(self, denoised: Tensor, state: DenoiseState) -> None:
        return None

    def settle(self, sample: Tensor, state: DenoiseState) -> None:
        self.kept.append(sample.clone())


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_in_pixels_the_certificate_is_about_the_picture_itself(kind: str) -> None:
    pipe = tiny_pipeline(kind)

    def drawn() -> np.ndarray:
        result = pipe(**tiny_call(kind) | {"output_type": "pil"})
        return np.asarray(result.images[0], dtype=np.float64) / 127.5 - 1

    picture = drawn()
    protected = torch.tensor(picture.transpose(2, 0, 1)[None], dtype=torch.float32)
    negation = NegationSet(latents=protected, space=encoder_of(pipe).space)
    assert negation.space.encoder == "pixels"
    with attach(pipe, SPELL(shields=(Shield(negation=negation, radius=6.0),), strength=0.0)):
        moved = drawn()
    assert 6.0 <= np.linalg.norm(moved - picture) <= 6.6
    far = 2.1 * math.sqrt(picture.size)  # no picture is so far from another
    with (
        attach(pipe, SPELL(shields=(Shield(negation=negation, radius=far),), strength=0.0)),
        pytest.raises(SampleRefused, match="too near"),
    ):
        drawn()


# The radius and the rest ---------------------------------------------------------------------------------------------


def test_the_radius_is_a_quantile_of_nearest_neighbour_distances() -> None:
    points = random(40, 2, 3)
    flat = points.double().numpy().reshape(40, -1)
    gaps = np.linalg.norm(flat[:, None] - flat[None], axis=2)
    np.fill_diagonal(gaps, np.inf)
    for quantile in (0.0, 0.05, 0.5, 1.0):
        expected = np.quantile(gaps.min(1), quantile)
        assert radius_of(points, quantile) == pytest.approx(expected, rel=1e-6)
        assert radius_of(points, quantile, block=100) == pytest.approx(expected, rel=1e-6)
    calibrated = SPELL.calibrated(NegationSet(latents=points, space=space(2, 3)), quantile=0.05)
    assert calibrated.shields[0].radius == radius_of(points, 0.05)
    assert calibrated.certify
    with pytest.raises(InvalidInput, match="remove repeated ones"):
        radius_of(torch.cat([points, points]), 0.5)
    with pytest.raises(InvalidInput, match="two pictures"):
        radius_of(points[:1])


def test_the_published_preset_is_the_plain_sum_without_a_certificate() -> None:
    guard = SPELL.published(NegationSet(latents=random(2, D), space=space(D)), radius=38.7)
    assert (guard.strength, guard.overlap, guard.settles) == (1.6, "sum", False)
    assert len(requirements(guard).negation) == 1


def test_every_set_has_its_own_radius_and_one_space() -> None:
    one, two = random(2, D), 20 + random(2, D)
    sets = [NegationSet(latents=points, space=space(D)) for points in (one, two)]
    guard = SPELL(shields=(Shield(negation=sets[0], radius=2.0), Shield(negation=sets[1], radius=9.0)))
    x = torch.cat([one[:1] + 0.1, two[:1] + 0.1])
    settled = guard.settle(x, state(x))
    assert away(settled[0], one).min() == pytest.approx(2.0, abs=1e-4)
    assert away(settled[1], two).min() == pytest.approx(9.0, abs=1e-3)
    elsewhere = NegationSet(latents=one, space=space(D, encoder="sha256:other"))
    with pytest.raises(NegationMismatch):
        SPELL(shields=(*guard.shields, Shield(negation=elsewhere, radius=1.0)))
    with pytest.raises(NegationMismatch, match="expected samples of shape"):
        guard(x[:, :-1], state(x[:, :-1]))


@pytest.mark.parametrize(
    "bad",
    [
        {"strength": -1.0},
        {"batch_radius": math.inf},
        {"overlap": "both"},
        {"refuse": "quietly"},
        {"max_move": 0.0},
        {"finished": FinishedSamples()},
        {"shields": ()},
    ],
)
def test_values_outside_their_range_are_refused(bad: dict) -> None:
    shields = (Shield(negation=NegationSet(latents=random(2, D), space=space(D)), radius=1.0),)
    with pytest.raises(InvalidInput, match="SPELL: expected"):
        SPELL(**{"shields": shields} | bad)
    with pytest.raises(InvalidInput, match="Shield: expected"):
        Shield(negation=shields[0].negation, radius=0.0)
