"""The safe denoiser's unknowns from references seen through the model, and the redirect that leads along them."""

import math

import numpy as np
import pytest
import torch

from steerclear import DenoiseState, NegationSet, SafeDenoiser, SeenReferences
from steerclear.errors import InvalidInput, UnsoundCombination
from steerclear.guards import SafeRedirect, SeenPosterior
from steerclear.negation import Space
from steerclear.noise import NoiseLevel

LEVELS = [-2.0, 0.0, 2.0]
SPACE = Space(encoder="pixels", shape=(2, 3))
LABELS = ("axe", "axe", "apple", "pear", "pear")
UNSAFE = np.array([True, True, False, False, False])


def made(seed=0, components=5, captions=("thing",) * 5):
    estimates = torch.randn(3, 5, 2, 3, generator=torch.Generator().manual_seed(seed))
    return SeenReferences.of(
        LEVELS,
        estimates,
        labels=LABELS,
        captions=captions,
        unsafe=frozenset({"axe"}),
        space=SPACE,
        components=components,
    )


def negation(labels=("axe",)):
    return NegationSet(latents=torch.zeros(len(labels), 2, 3), space=SPACE, labels=labels)


def state(log_snr, batch, memory=None, x_t=None, step=0):
    noise = torch.zeros(batch, 2, 3) if x_t is None else x_t
    level = NoiseLevel(1.0, math.exp(-log_snr))
    return DenoiseState(x_t=noise, level=level, step=step, num_steps=3, memory={} if memory is None else memory)


def by_the_equation(references, x, index, width, slope, share):
    """w and the safe estimate of the module's docstring, in float64 NumPy."""
    basis, points = references.basis.double().numpy(), references.points[index].double().numpy()
    own = (x.double().flatten(1).numpy() - references.mean.double().numpy()) @ basis
    kernel = np.exp(-(np.linalg.norm(own[:, None] - points[None], axis=-1) ** 2))
    kernel **= 1 / (2 * (width * references.spacing[index]) ** 2)
    unsafe, safe = kernel[:, UNSAFE], kernel[:, ~UNSAFE]
    odds = share / (1 - share) * (unsafe.mean(1) / safe.mean(1)) ** slope
    means = [k @ points[which] / k.sum(1, keepdims=True) for k, which in ((unsafe, UNSAFE), (safe, ~UNSAFE))]
    w = odds / (1 + odds)
    shift = w[:, None] * ((means[1] - means[0]) @ basis.T)
    return w, x.double().numpy() + shift.reshape(x.shape)


@pytest.mark.parametrize("index", range(3))
def test_the_safe_denoiser_over_it_is_the_equation(index):
    references, x = made(), torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1))
    weight = SeenPosterior(references=references, width=0.8, slope=1.5, prior=0.3)
    notes, at = {}, state(LEVELS[index], 4)
    at.note = notes.__setitem__
    got = SafeDenoiser(negation=negation(), weight=weight, max_beta=1e6)(x, at)
    w, expected = by_the_equation(references, x, index, 0.8, 1.5, 0.3)
    np.testing.assert_allclose(notes["weight"].numpy(), w, rtol=1e-4)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-4)


def test_the_prior_is_the_share_of_the_references_unless_it_is_given():
    assert SeenPosterior(references=made()).share == pytest.approx(0.4)
    assert SeenPosterior(references=made(), prior=0.1).share == 0.1


def test_levels_after_until_are_not_read_and_may_not_be_the_first():
    weight = SeenPosterior(references=made(), until=0.5)
    guard, memory, x = SafeDenoiser(negation=negation(), weight=weight), {}, torch.randn(2, 2, 3)
    assert not torch.equal(guard(x, state(LEVELS[0], 2, memory)), x)
    assert torch.equal(guard(x, state(LEVELS[2], 2, memory, step=2)), x)
    with pytest.raises(UnsoundCombination):
        guard(x, state(LEVELS[2], 2))


@pytest.mark.parametrize("wrong", [{"width": 0.0}, {"prior": 1.0}, {"until": 0.0}, {"slope": 0.0}, {"bandwidth": 1.0}])
def test_values_outside_their_range_are_refused(wrong):
    with pytest.raises(InvalidInput):
        SeenPosterior(references=made(), **wrong)


def test_other_labels_are_refused():
    for guard in (SafeDenoiser, SafeRedirect):
        with pytest.raises(UnsoundCombination):
            guard(negation=negation(("bomb",)), weight=SeenPosterior(references=made()))


def redirect(**settings):
    return SafeRedirect(
        negation=negation(),
        weight=SeenPosterior(references=made(components=5), width=0.3),
        **{"gate": 0.5, "start": 0.0, "hold": 0.6, **settings},
    )


def seen(references, index, which):
    flat = references.points[index][which] @ references.basis.T + references.mean
    return flat.view(-1, 2, 3)


def test_a_sample_that_is_unsafe_is_led_along_one_safe_reference_until_it_is_let_go():
    guard, memory = redirect(), {}
    references, noise = guard.weight.references, torch.randn(2, 2, 3)
    estimate = torch.cat([seen(references, 0, [0]), seen(references, 0, [3])])  # an axe, a pear
    first = guard(estimate, state(LEVELS[0], 2, memory, noise))
    assert torch.equal(first[1], estimate[1])
    distance = (first[0] - seen(references, 0, [2, 3, 4])).flatten(1).norm(dim=1)
    assert distance.min() < 1e-5
    pears = seen(references, 1, [3, 3])  # safe now, and the first is still led
    again = guard(pears, state(LEVELS[1], 2, memory, step=1))
    torch.testing.assert_close(again[0], seen(references, 1, [2 + int(distance.argmin())])[0])
    assert torch.equal(again[1], pears[1])
    assert guard(estimate, state(LEVELS[2], 2, memory, step=2)) is None


def led_to(guard, noise, estimate):
    """Places among the safe references along which samples of these estimates are led."""
    memory = {}
    guard(estimate, state(LEVELS[0], len(noise), memory, noise))
    return memory[(guard, "chosen")]


def test_every_safe_reference_is_drawn_about_equally_often_and_alone_as_in_a_batch():
    guard, noise = redirect(), torch.randn(3000, 2, 3, generator=torch.Generator().manual_seed(3))
    axe = seen(guard.weight.references, 0, [0])
    chosen = led_to(guard, noise, axe.expand(3000, 2, 3))
    # The directions are drawn once, in six dimensions, so the shares are only roughly equal.
    assert (torch.bincount(chosen, minlength=3) / 3000 > 0.15).all()
    assert [int(led_to(guard, row[None], axe)[0]) for row in noise[:20]] == chosen[:20].tolist()


def test_a_sample_is_led_only_along_references_of_the_nearest_caption():
    references = made(captions=("tool", "tool", "fruit", "tool", "tool"))
    guard = SafeRedirect(negation=negation(), weight=SeenPosterior(references=references), start=0.0)
    chosen = led_to(guard, torch.randn(200, 2, 3), seen(references, 0, [0]).expand(200, 2, 3))
    assert set(chosen.tolist()) == {1, 2}


def test_gate_one_does_nothing_and_dtypes_come_back():
    estimate = seen(made(), 0, [0, 1])
    assert redirect(gate=1.0)(estimate, state(LEVELS[0], 2)) is None
    for dtype in (torch.float16, torch.bfloat16):
        assert redirect()(estimate.to(dtype), state(LEVELS[0], 2)).dtype == dtype


def test_early_evidence_is_not_believed_before_start():
    estimate = seen(made(), 0, [0])
    assert torch.equal(redirect(start=0.3)(estimate, state(LEVELS[0], 1)), estimate)


def test_nan_is_passed_on():
    estimate = torch.full((1, 2, 3), math.nan)
    assert redirect()(estimate, state(LEVELS[0], 1)).isnan().all()


@pytest.mark.parametrize("wrong", [{"gate": 0.0}, {"start": 1.0}, {"hold": 0.0}])
def test_redirect_refuses_values_outside_their_range(wrong):
    with pytest.raises(InvalidInput):
        redirect(**wrong)
