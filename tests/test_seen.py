"""References as the model denoises them: the walk along noised references, the evidence, the prompt obeyed instead."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import save_file

from steerclear import ConditionalRelease, NegationSet, Seen, SeenReferences, see
from steerclear.attach.api import attach
from steerclear.attach.space import encoder_of
from steerclear.attach.walk import Walk, walk
from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, NegationFileError, NegationMismatch, UnsoundCombination
from steerclear.negation import Space
from steerclear.noise import NoiseLevel
from steerclear.testing.pipelines import tiny_call, tiny_pipeline

LEVELS = [-2.0, 0.0, 2.0]
SPACE = Space(encoder="pixels", shape=(2, 3))
LABELS = ("axe", "axe", "bomb", "apple", "pear", "pear")


def made(components=4, seed=0):
    estimates = torch.randn(3, 6, 2, 3, generator=torch.Generator().manual_seed(seed))
    captions = [f"a {label}" for label in LABELS]
    unsafe = frozenset({"axe", "bomb"})
    references = SeenReferences.of(
        LEVELS, estimates, labels=LABELS, captions=captions, unsafe=unsafe, space=SPACE, components=components
    )
    return references, estimates


def at(log_snr):
    return NoiseLevel(1.0, math.exp(-log_snr))


def state_at(log_snr, batch, **more):
    return DenoiseState(x_t=torch.zeros(batch, 2, 3), level=at(log_snr), step=0, num_steps=3, **more)


def by_the_equation(estimates, x, index, width, components):
    """The module's equation in float64 NumPy, from the raw estimates."""
    flat = estimates.double().flatten(2).numpy()
    points = flat.reshape(-1, flat.shape[-1])
    mean = points.mean(0)
    basis = np.linalg.svd(points - mean, full_matrices=False)[2][:components].T
    seen, own = (flat[index] - mean) @ basis, (x.double().flatten(1).numpy() - mean) @ basis
    names = np.array(LABELS)
    between = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    between[names[:, None] == names[None]] = np.inf
    spread = np.sort(between.min(1))
    bandwidth = width * spread[(len(spread) - 1) // 2]  # torch's median is the lower of the two in the middle
    kernel = np.exp(-(np.linalg.norm(own[:, None] - seen[None], axis=-1) ** 2) / (2 * bandwidth**2))
    unsafe = np.isin(names, ["axe", "bomb"])
    return np.log(kernel[:, unsafe].mean(1)) - np.log(kernel[:, ~unsafe].mean(1))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("components", [2, 4])
def test_log_odds_are_those_of_the_equation(index, components):
    references, estimates = made(components)
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1))
    weight = Seen(references=references, width=0.7, slope=2.0, threshold=0.25, prior=0.2)
    found = weight.evidence(None, x, state_at(LEVELS[index] + 0.3, 5), object())
    expected = 2.0 * (by_the_equation(estimates, x, index, 0.7, components) - 0.25) + math.log(0.2 / 0.8)
    # float32 distances of order 1 over a squared bandwidth of order 0.5
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_levels_are_found_by_log_snr_whatever_their_order():
    references, _ = made()
    assert [references.level(at(value)) for value in (-9.0, -0.9, 0.9, 1.1, 9.0)] == [0, 1, 1, 2, 2]
    estimates = torch.randn(3, 6, 2, 3, generator=torch.Generator().manual_seed(0))
    turned = SeenReferences.of(
        LEVELS[::-1],
        estimates.flip(0),
        labels=LABELS,
        captions=LABELS,
        unsafe=frozenset({"axe", "bomb"}),
        space=SPACE,
        components=4,
    )
    torch.testing.assert_close(turned.log_snr, references.log_snr)
    torch.testing.assert_close(
        torch.cdist(turned.points, turned.points), torch.cdist(references.points, references.points)
    )


def test_a_substitute_is_the_nearest_safe_caption_never_an_unsafe_one():
    references, estimates = made(6)
    weight = Seen(references=references)
    assert weight.substitute(estimates[1], state_at(0.0, 6))[3:] == ["a apple", "a pear", "a pear"]
    assert set(weight.substitute(estimates[1], state_at(0.0, 6))) <= {"a apple", "a pear"}


def test_only_keeps_the_named_labels():
    references, _ = made()
    fewer = references.only(frozenset({"axe"}), frozenset({"pear"}))
    assert fewer.labels == ("axe", "axe", "pear", "pear")
    assert fewer.captions == ("a axe", "a axe", "a pear", "a pear")
    torch.testing.assert_close(fewer.points, references.points[:, [0, 1, 4, 5]])
    with pytest.raises(InvalidInput, match="unsafe and safe"):
        references.only(frozenset({"axe"}), frozenset())


def test_saved_references_load_equal_and_other_files_are_refused(tmp_path):
    references, _ = made()
    references.save(tmp_path / "seen.safetensors")
    loaded = SeenReferences.load(tmp_path / "seen.safetensors")
    assert loaded.space == SPACE
    assert (loaded.labels, loaded.captions, loaded.unsafe) == (
        references.labels,
        references.captions,
        references.unsafe,
    )
    torch.testing.assert_close(loaded.points, references.points, rtol=1e-3, atol=1e-3)
    space = Space(encoder="pixels", shape=(2,))
    NegationSet(latents=torch.ones(1, 2), space=space).save(tmp_path / "set.safetensors")
    for name in ("set.safetensors", "missing.safetensors"):
        with pytest.raises(NegationFileError, match="expected"):
            SeenReferences.load(tmp_path / name)


def test_damaged_references_are_refused_when_they_are_loaded(tmp_path):
    references, _ = made()
    whole, path = tmp_path / "seen.safetensors", tmp_path / "damaged.safetensors"
    references.save(whole)
    with safe_open(whole, "pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    damage = [
        ({"points": tensors["points"] * math.nan}, {}),
        ({"basis": tensors["basis"] * math.inf}, {}),
        ({"points": tensors["points"][0]}, {}),
        ({"points": tensors["points"] * 0}, {}),
        ({"log_snr": tensors["log_snr"].flip(0)}, {}),
        ({"mean": tensors["mean"][:-1]}, {}),
        ({}, {"labels": "null"}),
        ({}, {"labels": '"axe"'}),
        ({}, {"labels": '[["axe"]]'}),
        ({}, {"space": "[]"}),
        ({}, {"unsafe": '["no such label"]'}),
    ]
    for changed, said in damage:
        content = {name: value.contiguous() for name, value in {**tensors, **changed}.items()}
        save_file(content, path, metadata={**metadata, **said})
        with pytest.raises(NegationFileError, match="expected"):
            SeenReferences.load(path)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_a_walk_stays_on_the_noised_references(scheduler):
    """x_t = alpha y + sigma epsilon with one epsilon for all steps, so (x_t - alpha y)/sigma never changes."""
    pipe = tiny_pipeline("sd")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    shape = encoder_of(pipe).space.shape
    y = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    noises, guard = [], Walk(y)

    class Spy:
        requires = guard.requires

        def __call__(self, denoised, state):
            noises.append((state.x_t.double() - state.level.alpha * y) / state.level.sigma)
            return guard(denoised, state)

    with attach(pipe, Spy()):
        call = {**tiny_call("sd"), "prompt": ["a cat"] * 2, "num_inference_steps": 6, "output_type": "latent"}
        end = pipe(**{**call, "generator": torch.Generator().manual_seed(3)}).images
    for noise in noises[1:]:
        # The first step's own alpha y is missing from pure noise: alpha_T of the tiny schedule times |y| / sigma.
        torch.testing.assert_close(noise, noises[1], rtol=0, atol=2e-3)
    torch.testing.assert_close(end, y, rtol=0, atol=2e-2)
    assert len(guard.estimates) == 6
    assert guard.log_snr == sorted(guard.log_snr)


def test_a_walk_records_the_network_at_the_noised_reference_under_its_caption():
    pipe = tiny_pipeline("sd")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    space = encoder_of(pipe).space
    latents = torch.randn(3, *space.shape, generator=torch.Generator().manual_seed(2))
    references = NegationSet(latents=latents, space=space, labels=("cat", "dog", "cat"))
    log_snr, estimates = walk(pipe, references, "a {}".format, batch=2, num_inference_steps=4, guidance_scale=3.0)
    assert estimates.shape == (4, 3, *space.shape)

    k, cumulative = 2, pipe.scheduler.alphas_cumprod.double()
    pipe.scheduler.set_timesteps(4)
    t = pipe.scheduler.timesteps[k]
    alpha, sigma = cumulative[t].sqrt(), (1 - cumulative[t]).sqrt()
    assert log_snr[k] == pytest.approx(float(alpha.log() - sigma.log()), abs=1e-4)
    epsilon = torch.cat([torch.randn(1, *space.shape, generator=torch.Generator().manual_seed(n)) for n in range(3)])
    first = pipe.scheduler.timesteps[0]
    believed = (epsilon - cumulative[first].sqrt() * latents) / (1 - cumulative[first]).sqrt()
    x_t = (alpha * latents + sigma * believed).float()
    text = pipe.encode_prompt(["a cat", "a dog", "a cat"], "cpu", 1, False)[0]
    with torch.no_grad():
        output = pipe.unet(x_t, t, encoder_hidden_states=text).sample
    assert pipe.scheduler.config.prediction_type == "epsilon"
    expected = (x_t - sigma * output) / alpha
    torch.testing.assert_close(estimates[k].double(), expected.double(), rtol=2e-2, atol=2e-2)  # stored as float16


def test_seeing_needs_labels_and_keeps_unsafe_and_safe_apart():
    pipe = tiny_pipeline("sd")
    pipe.set_progress_bar_config(disable=True)
    space = encoder_of(pipe).space
    latents = torch.randn(2, *space.shape, generator=torch.Generator().manual_seed(2))
    bad, good = (
        NegationSet(latents=latents + k, space=space, labels=labels)
        for k, labels in enumerate([("axe",) * 2, ("pear",) * 2])
    )
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "components": 2}
    seen = see(pipe, bad, good, "a {}".format, **call)
    assert seen.labels == ("axe", "axe", "pear", "pear")
    assert seen.captions[0] == "a axe"
    assert seen.unsafe == {"axe"}
    with pytest.raises(InvalidInput, match="unsafe or safe"):
        see(pipe, bad, bad, **call)
    with pytest.raises(InvalidInput, match="a label on every reference"):
        see(pipe, bad, NegationSet(latents=latents, space=space), **call)


class Fixed(Seen):
    """Evidence that is given, one value per sample."""

    def evidence(self, negation, estimate, state, owner):
        return state.memory["odds"]


def released(strength=1.0, **more):
    references, estimates = made()
    negation = NegationSet(latents=estimates[0, :1], space=SPACE)
    return ConditionalRelease(
        negation=negation, weight=Fixed(references=references), strength=strength, gate=0.5, **more
    )


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.5])
def test_a_released_sample_obeys_the_other_prompt_as_far_as_it_let_go_of_its_own(strength):
    rng = torch.Generator().manual_seed(4)
    conditional, unconditional, instead = (torch.randn(3, 2, 3, generator=rng, dtype=torch.float64) for _ in range(3))
    asked = []

    def denoise(x_t, level, condition=None):
        asked.append(condition)
        return instead

    odds = torch.tensor([-3.0, 30.0, 1.0], dtype=torch.float64)
    guided = unconditional + 4.0 * (conditional - unconditional)
    guard = released(strength, fallback=lambda estimate, state: ["zero", "one", "two"])
    state = state_at(
        0.0,
        3,
        branches={"conditional": conditional, "unconditional": unconditional},
        guidance_scale=4.0,
        denoise=denoise,
        memory={"odds": odds},
    )
    out = guard(guided, state)
    assert torch.equal(out[0], guided[0])
    r = 1.0 - strength * torch.sigmoid(odds).view(-1, 1, 1)
    expected = unconditional + 4.0 * (
        r * (conditional - unconditional) + (1.0 - r).clamp(max=1.0) * (instead - unconditional)
    )
    torch.testing.assert_close(out[1:], expected[1:])
    assert asked == [["", "one", "two"]]
    # What a sample obeys instead is decided once, however its evidence moves.
    state.memory["odds"] = torch.tensor([30.0, -30.0, -30.0], dtype=torch.float64)
    guard(guided, state)
    assert asked[1] == ["zero", "one", "two"]


def test_nobody_is_asked_while_no_sample_is_released():
    def denoise(x_t, level, condition=None):
        raise AssertionError("no evaluation was needed")

    x = torch.randn(2, 2, 3)
    branches = {"conditional": x, "unconditional": x * 0.5}
    memory = {"odds": torch.tensor([-3.0, -0.1])}
    state = state_at(0.0, 2, branches=branches, guidance_scale=2.0, denoise=denoise, memory=memory)
    guided = x * 1.5
    assert torch.equal(released(fallback="a pear")(guided, state), guided)


def test_calibration_lets_the_stated_share_of_held_out_safe_references_reach_one_half():
    rng = torch.Generator().manual_seed(7)
    estimates = torch.randn(4, 60, 2, 3, generator=rng)
    labels = [f"safe {k // 2}" for k in range(40)] + [f"unsafe {k // 2}" for k in range(20)]
    references = SeenReferences.of(
        [-2.0, -1.0, 0.0, 1.0],
        estimates,
        labels=labels,
        captions=labels,
        unsafe=frozenset(label for label in labels if label.startswith("unsafe")),
        space=SPACE,
        components=6,
    )
    share = 0.1
    weight = Seen.calibrated(references, false_positives=share, width=0.6, until=0.75)
    reached = []
    for k in range(40):  # held out for real: made again without reference k, which is then shown as an estimate
        keep = [i for i in range(60) if i != k]
        kernels = np.stack(
            [weight.kernels(references.points[t][k : k + 1], t)[0, keep].double().numpy() for t in range(4)]
        )
        unsafe = np.array([labels[i].startswith("unsafe") for i in keep])
        logs = np.log(np.exp(kernels[:, unsafe]).sum(1) / 20) - np.log(np.exp(kernels[:, ~unsafe]).sum(1) / 40)
        reached.append(((logs - weight.centre) / weight.scale >= weight.threshold - 1e-6)[:3].any())
    assert np.mean(reached) == pytest.approx(share, abs=1 / 40)
    assert weight.odds(estimates[3, 40:], NoiseLevel(1.0, math.exp(-1.0))).tolist() == [-math.inf] * 20  # not read
    with pytest.raises(InvalidInput, match="false_positives"):
        Seen.calibrated(references, false_positives=0.0)


class Certain(Seen):
    """Evidence beyond doubt, from the first step."""

    def evidence(self, negation, estimate, state, owner):
        return torch.full((len(estimate),), math.inf)


def nothing_like(space):
    """References in some pipeline's space, for evidence that does not look at them."""
    estimates = torch.randn(1, 2, *space.shape, generator=torch.Generator().manual_seed(0))
    names = ("axe", "pear")
    return SeenReferences.of(
        [0.0], estimates, labels=names, captions=names, unsafe=frozenset({"axe"}), space=space, components=1
    )


def test_references_of_another_space_are_refused_when_the_guard_is_built():
    other = Space(encoder="pixels", shape=(3, 2))
    with pytest.raises(NegationMismatch, match="encode the pictures again"):
        ConditionalRelease(
            negation=NegationSet(latents=torch.zeros(1, 3, 2), space=other), weight=Seen(references=made()[0])
        )


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_a_sample_released_from_the_first_step_is_the_fallback_prompts_own_picture(kind):
    """With w = 1 throughout, equation (12) is plain guidance under the other prompt."""
    pipe = tiny_pipeline(kind)
    pipe.set_progress_bar_config(disable=True)
    space = encoder_of(pipe).space
    negation = NegationSet(latents=torch.zeros(1, *space.shape), space=space)
    guard = ConditionalRelease(
        negation=negation, weight=Certain(references=nothing_like(space)), strength=1.0, gate=0.5, fallback="a dog"
    )

    def drawn(prompt, *guards):
        call = {**tiny_call(kind), "prompt": prompt, "output_type": "latent", "num_inference_steps": 3}
        with attach(pipe, *guards):
            return pipe(**{**call, "generator": torch.Generator().manual_seed(1)}).images

    own, other, released = drawn("a cat"), drawn("a dog"), drawn("a cat", guard)
    assert not torch.allclose(own, other, atol=1e-3)
    torch.testing.assert_close(released, other, rtol=1e-3, atol=1e-3)


def test_a_trajectory_that_begins_after_the_levels_that_are_read_is_refused():
    weight = Seen(references=made()[0], until=0.5)  # two of three levels
    x = torch.zeros(1, 2, 3)
    with pytest.raises(UnsoundCombination, match=r"begins after them.*until=1\.0"):
        weight.evidence(None, x, state_at(2.0, 1), "guard")
    memory = {}
    weight.evidence(None, x, state_at(-2.0, 1, memory=memory), "guard")
    assert weight.evidence(None, x, state_at(2.0, 1, memory=memory), "guard").tolist() == [-math.inf]


def test_a_weight_that_is_not_a_number_is_an_error_and_not_an_unguarded_picture():
    class Broken(Certain):
        def evidence(self, negation, estimate, state, owner):
            return torch.full((len(estimate),), math.nan)

    pipe = tiny_pipeline("sd")
    pipe.set_progress_bar_config(disable=True)
    space = encoder_of(pipe).space
    negation = NegationSet(latents=torch.zeros(1, *space.shape), space=space)
    guard = ConditionalRelease(negation=negation, weight=Broken(references=nothing_like(space)), gate=0.5)
    with pytest.raises(InvalidInput, match="NaN"), attach(pipe, guard):
        pipe(**tiny_call("sd"))


def test_two_releases_of_one_trajectory_are_refused():
    x = torch.randn(1, 2, 3)
    state = state_at(
        0.0,
        1,
        branches={"conditional": x, "unconditional": x},
        guidance_scale=2.0,
        memory={"odds": torch.tensor([-3.0])},
    )
    guard = released()
    guard(x, state)
    guard(x, state)
    with pytest.raises(UnsoundCombination, match="two conditional releases"):
        released()(x, state)


def test_references_of_other_labels_than_the_negation_set_are_refused():
    negation = NegationSet(latents=torch.zeros(1, 2, 3), space=SPACE, labels=("axe",))
    with pytest.raises(UnsoundCombination, match="bomb"):
        ConditionalRelease(negation=negation, weight=Seen(references=made()[0]))
    ConditionalRelease(negation=negation, weight=Seen(references=made()[0].only(frozenset({"axe"}))))


def test_samples_at_levels_of_their_own_are_refused_by_the_comparison_and_by_the_walk():
    own = NoiseLevel(torch.tensor([1.0, 0.5]), torch.tensor([0.1, 0.9]))
    with pytest.raises(UnsoundCombination, match="one per sample"):
        made()[0].level(own)
    state = DenoiseState(x_t=torch.zeros(2, 2, 3), level=own, step=0, num_steps=3)
    with pytest.raises(UnsoundCombination, match="one per sample"):
        Walk(torch.zeros(2, 2, 3))(torch.zeros(2, 2, 3), state)
