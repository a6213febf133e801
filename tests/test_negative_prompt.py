"""The plain negative prompt: against the pipelines' own argument, against its equation, and as text in the call."""

import math

import numpy as np
import pytest
import torch

from steerclear.attach.api import attach
from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput, UnsoundCombination, UnsupportedPipeline
from steerclear.guards import SLD, NegativePrompt, Requires, chain, during, requirements, when
from steerclear.noise import NoiseLevel
from steerclear.prompts.negative import NegativeText, pieces
from steerclear.testing.pipelines import tiny_call, tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def drawn(pipe, *guards, prompts=None, **call):
    call = {"prompt": "a cat", "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"} | call
    with attach(pipe, *guards, prompts=prompts) as trace:
        images = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    return images, trace


# -- the pipelines' own form -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize("scale", [3.0, 7.5])
def test_of_no_strength_it_is_the_pipelines_own_negative_prompt(kind, scale):
    """Both are w x_p + (1 − w) x_n; here x_0 is added and subtracted, which rounds at about w eps per step."""
    pipe, more = tiny_pipeline(kind), {"max_sequence_length": 16} if kind == "sd3" else {}
    expected, _ = drawn(pipe, negative_prompt="a dog", guidance_scale=scale, **more)
    plain, _ = drawn(pipe, guidance_scale=scale, **more)
    got, trace = drawn(pipe, NegativePrompt(prompt="a dog"), guidance_scale=scale, **more)
    assert trace.calls[0].extra_evaluations == 3
    assert (expected - plain).norm() > 1e-3 * expected.norm()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_a_strength_of_w_minus_1_is_the_same_number():
    pipe = tiny_pipeline("sd")
    one, _ = drawn(pipe, NegativePrompt(prompt="a dog"))
    other, _ = drawn(pipe, NegativePrompt(prompt="a dog", strength=2.0))
    assert torch.equal(one, other)


def test_it_takes_the_place_of_a_negative_prompt_of_the_call():
    """At strength w − 1 the prediction in the unconditional place cancels, whatever it was made with."""
    pipe = tiny_pipeline("sd")
    expected, _ = drawn(pipe, negative_prompt="a dog")
    got, _ = drawn(pipe, NegativePrompt(prompt="a dog"), negative_prompt="a bird")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["flux", "pixart", "video"])
def test_runs_on_other_families(kind):
    pipe = tiny_pipeline(kind)
    with attach(pipe, NegativePrompt(prompt="a bird", strength=1.0)) as trace:  # some calls have a dog already
        pipe(**tiny_call(kind))
    assert trace.calls[0].extra_evaluations == 3
    assert all(record.fired.all() for record in trace.calls[0].steps)


# -- the equation ------------------------------------------------------------------------------------------------------


def state_of(batch: int = 2, **more) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, DenoiseState]:
    """Guided, unconditional and negative estimates, and the step that lends them."""
    guided, unconditional, negative = torch.randn(3, batch, 2, 3, generator=torch.Generator().manual_seed(1)).unbind()
    state = DenoiseState(
        x_t=guided,
        level=NoiseLevel(0.8, 0.6),
        step=0,
        num_steps=10,
        branches={"conditional": guided, "unconditional": unconditional},
        guidance_scale=5.0,
        denoise=lambda x, level, text: negative,
        **more,
    )
    return guided, unconditional, negative, state


@pytest.mark.parametrize(("strength", "factor"), [(None, 4.0), (0.5, 0.5), (10.0, 10.0)])
def test_the_push_is_the_equation(strength, factor):
    guided, unconditional, negative, state = state_of()
    got = NegativePrompt(prompt="a dog", strength=strength)(guided, state)
    g, u, n = (x.double().numpy() for x in (guided, unconditional, negative))
    np.testing.assert_allclose(got.numpy(), g - factor * (n - u), rtol=0, atol=1e-5)


def test_at_strength_0_it_asks_nothing_and_is_bit_identical():
    pipe = tiny_pipeline("sd")
    plain, _ = drawn(pipe)
    got, trace = drawn(pipe, NegativePrompt(prompt="a dog", strength=0.0))
    assert torch.equal(got, plain)
    assert trace.calls[0].extra_evaluations == 0


def test_delayed_it_costs_its_window_alone():
    pipe = tiny_pipeline("sd")
    guard = during(NegativePrompt(prompt="a dog"), start=0.2)
    _, trace = drawn(pipe, guard, num_inference_steps=10)
    assert [bool(record.fired.all()) for record in trace.calls[0].steps] == [False, False, *[True] * 8]
    assert trace.calls[0].extra_evaluations == 8


def test_one_text_per_sample_and_an_empty_one_leaves_its_sample_alone():
    pipe, call = tiny_pipeline("sd"), {"prompt": ["a cat", "a cow"]}
    plain, _ = drawn(pipe, **call)
    got, _ = drawn(pipe, NegativePrompt(prompt=["a dog", " "]), **call)
    all_dogs, _ = drawn(pipe, NegativePrompt(prompt="a dog"), **call)
    assert torch.equal(got[1], plain[1])
    torch.testing.assert_close(got[0], all_dogs[0], rtol=1e-5, atol=1e-4)
    with pytest.raises(InvalidInput, match="expected one text per sample, got 3 for 2"):
        drawn(pipe, NegativePrompt(prompt=["a dog", "a bird", "a fish"]), **call)


def test_only_where_a_condition_holds():
    guided, _, _, state = state_of()
    guard = when(lambda state: torch.tensor([True, False]), NegativePrompt(prompt="a dog"))
    got = guard(guided, state)
    assert torch.equal(got[1], guided[1])
    assert not torch.equal(got[0], guided[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_as_it_went_in(dtype):
    guided, _, _, state = state_of()
    assert NegativePrompt(prompt="a dog")(guided.to(dtype), state).dtype is dtype


# -- one evaluation for one text ---------------------------------------------------------------------------------------


def test_guards_that_ask_for_the_same_text_share_its_evaluation():
    pipe = tiny_pipeline("sd")
    both = [NegativePrompt(prompt="a dog", strength=1.0), SLD.max("a dog")]
    together, trace = drawn(pipe, *both)
    assert trace.calls[0].extra_evaluations == 3
    with attach(pipe, both[0]):  # apart, in two attachments, which share nothing
        apart, inner = drawn(pipe, both[1])
    assert inner.calls[0].extra_evaluations == 3
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-4)
    _, trace = drawn(pipe, both[0], SLD.max("a fish"))
    assert trace.calls[0].extra_evaluations == 6


def test_several_add_up():
    guided, unconditional, negative, state = state_of()
    guard = chain(NegativePrompt(prompt="a dog", strength=1.0), NegativePrompt(prompt="a bird", strength=2.0))
    torch.testing.assert_close(guard(guided, state), guided - 3.0 * (negative - unconditional), rtol=1e-5, atol=1e-5)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_needs_guidance():
    assert requirements(NegativePrompt(prompt="a dog")) == Requires(branches=True)
    with pytest.raises(UnsoundCombination, match="needs classifier-free guidance"):
        drawn(tiny_pipeline("sd"), NegativePrompt(prompt="a dog"), guidance_scale=1.0)


def test_a_sampler_without_branches_network_or_scale_is_refused():
    guided, *_, state = state_of()
    state.guidance_scale = None
    with pytest.raises(UnsoundCombination, match="pass a strength"):
        NegativePrompt(prompt="a dog")(guided, state)
    state.denoise = None
    with pytest.raises(UnsoundCombination, match="evaluate another prompt"):
        NegativePrompt(prompt="a dog", strength=1.0)(guided, state)
    state.branches = {}
    with pytest.raises(UnsoundCombination, match="branches of classifier-free guidance"):
        NegativePrompt(prompt="a dog", strength=1.0)(guided, state)


@pytest.mark.parametrize(
    "bad", [{"strength": -1.0}, {"strength": math.inf}, {"prompt": ""}, {"prompt": []}, {"prompt": ["", " "]}]
)
def test_values_outside_their_range_are_refused(bad):
    with pytest.raises(InvalidInput, match="NegativePrompt: expected"):
        NegativePrompt(**({"prompt": "a dog"} | bad))


# -- as text in the call -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_text_is_added_to_the_call(kind):
    pipe = tiny_pipeline(kind)
    call = {key: value for key, value in tiny_call(kind).items() if key not in ("negative_prompt", "generator")}
    expected = pipe(**call, negative_prompt="a dog", generator=torch.Generator().manual_seed(0)).images
    with attach(pipe, prompts=NegativeText(text="a dog")):
        got = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    assert np.array_equal(got, expected)


def test_text_is_added_to_a_modular_call():
    pipe = tiny_pipeline("modular-sdxl")
    arguments = NegativeText(text="a dog")(pipe, {"prompt": "a cat"})
    assert arguments == {"prompt": "a cat", "negative_prompt": "a dog"}
    pipe.guider.guidance_scale = 1.0
    with pytest.raises(UnsoundCombination, match="guidance_scale=1"):
        NegativeText(text="a dog")(pipe, {"prompt": "a cat"})


@pytest.mark.parametrize(
    ("text", "call", "expected"),
    [
        ("a dog", {"prompt": "a cat"}, {"negative_prompt": "a dog"}),
        ("a dog", {"prompt": "a cat", "negative_prompt": "blur"}, {"negative_prompt": "a dog, blur"}),
        ("a dog", {"prompt": "a cat", "negative_prompt": ""}, {"negative_prompt": "a dog"}),
        ("a dog", {"prompt": ["x", "y"]}, {"negative_prompt": ["a dog"] * 2}),
        ("a dog", {"prompt": ["x", "y"], "negative_prompt": "blur"}, {"negative_prompt": ["a dog, blur"] * 2}),
        ("a dog", {"prompt": ["x", "y"], "negative_prompt": ["b", ""]}, {"negative_prompt": ["a dog, b", "a dog"]}),
        (["a dog", ""], {"prompt": ["x", "y"], "negative_prompt": "b"}, {"negative_prompt": ["a dog, b", "b"]}),
        (["a dog"], {"prompt": ["x"]}, {"negative_prompt": ["a dog"]}),
        (
            "a dog",
            {"prompt": "x", "negative_prompt_2": "blur"},
            {"negative_prompt": "a dog", "negative_prompt_2": "a dog, blur"},
        ),
    ],
)
def test_ours_comes_first_and_the_users_own_is_kept(text, call, expected):
    pipe, before = tiny_pipeline("sdxl"), dict(call)
    assert NegativeText(text=text)(pipe, call) == call | expected
    assert call == before


def test_a_list_of_another_length_is_refused():
    with pytest.raises(InvalidInput, match="one text per prompt, got 2 for 1"):
        NegativeText(text=["a dog", "a bird"])(tiny_pipeline("sd"), {"prompt": "a cat"})


def test_what_would_have_no_effect_is_refused():
    text = NegativeText(text="a dog")
    with pytest.raises(UnsupportedPipeline, match="takes a negative_prompt, got DiTPipeline"):
        text(tiny_pipeline("dit"), {})
    with pytest.raises(UnsoundCombination, match=r"guidance_scale=1\.0"):
        text(tiny_pipeline("sd"), {"prompt": "a cat", "guidance_scale": 1.0})
    with pytest.raises(UnsoundCombination, match=r"true_cfg_scale=1\.0"):
        text(tiny_pipeline("flux"), {"prompt": "a cat"})
    with pytest.raises(InvalidInput, match="got negative_prompt_embeds"):
        text(tiny_pipeline("sd"), {"prompt": "a cat", "negative_prompt_embeds": torch.zeros(1, 77, 32)})
    with pytest.raises(InvalidInput, match="NegativeText: expected"):
        NegativeText(text=" ")


def test_a_text_that_would_be_cut_is_refused_and_pieces_fit():
    """A token per letter, two marks around them, 77 in all."""
    pipe, terms = tiny_pipeline("sd"), [letter * 30 for letter in "abcde"]
    with pytest.raises(InvalidInput, match=r"one 1 tokens too long"):
        NegativeText(text="a" * 76)(pipe, {"prompt": "a cat"})
    assert NegativeText(text="a" * 75)(pipe, {"prompt": "a cat"})["negative_prompt"] == "a" * 75
    texts = pieces(pipe, terms)
    assert texts == [", ".join(terms[:2]), ", ".join(terms[2:4]), terms[4]]
    with pytest.raises(InvalidInput, match="tokens too long"):
        pieces(pipe, ["a" * 76])
    with pytest.raises(InvalidInput, match="at least one term"):
        pieces(pipe, [])


def test_the_longest_reader_counts():
    """SD3's CLIP encoders read 77 tokens, its T5 as many as the call says."""
    pipe, text = tiny_pipeline("sd3"), "a" * 100
    with pytest.raises(InvalidInput, match="too long"):
        NegativeText(text=text)(pipe, {"prompt": "a cat", "max_sequence_length": 64})
    assert NegativeText(text=text)(pipe, {"prompt": "a cat", "max_sequence_length": 128})["negative_prompt"] == text
    pipe.text_encoder_3 = None  # as it is often loaded, to save memory
    with pytest.raises(InvalidInput, match="too long"):
        NegativeText(text=text)(pipe, {"prompt": "a cat", "max_sequence_length": 128})
