"""SAFREE's arithmetic against a float64 NumPy transcription of its equations, and the edges of the token test."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel

from steerclear.errors import InvalidInput
from steerclear.prompts import FILTERS, NUDITY, SAFREE, SelfValidatingFilter
from steerclear.prompts.subspace import basis, inside, outside
from steerclear.prompts.token_test import flags
from steerclear.testing.pipelines import tiny_pipeline

CONCEPTS = ["gun", "a bomb"]
PROMPT = "a cat and a gun"


@pytest.fixture(scope="module")
def pipe():
    made = tiny_pipeline("sd")
    made.text_encoder.double()
    return made


def rewritten(pipe, guard, prompt=PROMPT, **more):
    return guard(pipe, {"prompt": prompt, "guidance_scale": 3.0, **more})


def plain(pipe, prompt=PROMPT):
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


# The outside truth: transformers' CLIP, and the equations in NumPy ----------------------------------------------------


def ids_of(pipe, text):
    return pipe.tokenizer([text], padding="max_length", max_length=77, truncation=True).input_ids[0]


def states_of(pipe, ids):
    with torch.no_grad():
        return pipe.text_encoder(torch.tensor([ids])).last_hidden_state[0].numpy()


def projector(vectors):
    """E (EᵀE)⁺ Eᵀ with the columns of E in ``vectors``' rows."""
    e = np.asarray(vectors, dtype=np.float64).T
    return e @ np.linalg.pinv(e.T @ e, rcond=1e-12) @ e.T


def by_hand(pipe, prompt, concepts, alpha, order):
    """The whole chain: distances, flags, the safe embedding, beta."""
    ids = ids_of(pipe, prompt)
    end = ids.index(pipe.tokenizer.eos_token_id)
    e = states_of(pipe, ids)
    pooled = [states_of(pipe, [*ids[:i], 0, *ids[i + 1 :]])[end] for i in range(1, end)]
    toxic = []
    for text in concepts:
        concept = ids_of(pipe, text)
        toxic.append(states_of(pipe, concept)[concept.index(pipe.tokenizer.eos_token_id)])
    p_c, p_i, one = projector(toxic), projector(pooled), np.eye(e.shape[1])
    d = [np.linalg.norm((one - p_c) @ p) for p in pooled]
    m = [d[i] > (1 + alpha) * np.mean([d[j] for j in range(len(d)) if j != i]) for i in range(len(d))]
    matrix = (one - p_c) @ p_i if order == "code" else p_i @ (one - p_c)
    projected = e @ matrix.T
    safe = e.copy()
    for i, flag in enumerate(m):
        if flag:
            safe[i + 1] = projected[i + 1]
    cosines = [projected[i] @ e[i] / np.linalg.norm(projected[i]) / np.linalg.norm(e[i]) for i in range(end + 1)]
    return np.array(d), m, safe, 1 - np.mean(cosines)


@pytest.mark.parametrize("order", ["paper", "code"])
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.05])
def test_the_chain_is_the_one_of_the_equations(pipe, order, alpha):
    guard = SAFREE(concepts=CONCEPTS, alpha=alpha, order=order, filter=None)
    distances, flagged, safe, beta = by_hand(pipe, PROMPT, CONCEPTS, alpha, order)
    assert 0 < sum(flagged) < len(flagged)  # otherwise the test shows less than it says
    (found,) = guard.examine(pipe, PROMPT)
    np.testing.assert_allclose(found.distances.numpy(), distances, rtol=1e-9)
    assert list(found.flagged) == flagged
    assert found.beta == pytest.approx(beta, rel=1e-9)
    made = rewritten(pipe, guard)["prompt_embeds"][0].numpy()
    np.testing.assert_allclose(made, safe, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("order", ["paper", "code"])
def test_rows_that_are_not_flagged_keep_their_bits(pipe, order):
    guard = SAFREE(concepts=CONCEPTS, alpha=0.02, order=order)
    (found,) = guard.examine(pipe, PROMPT)
    rows = [1 + i for i, flag in enumerate(found.flagged) if flag]
    others = [i for i in range(77) if i not in rows]
    made, before = rewritten(pipe, guard)["prompt_embeds"][0], plain(pipe)[0]
    assert rows
    assert torch.equal(made[others], before[others])
    assert all(not torch.equal(made[i], before[i]) for i in rows)


def spans(pipe):
    end = len(PROMPT.replace(" ", ""))
    ids = ids_of(pipe, PROMPT)
    masked = [states_of(pipe, [*ids[:i], 0, *ids[i + 1 :]])[end + 1] for i in range(1, end + 1)]
    toxic = [states_of(pipe, ids_of(pipe, text))[len(text.replace(" ", "")) + 1] for text in CONCEPTS]
    return projector(toxic), projector(masked)


def test_the_orders_differ_as_they_should(pipe):
    p_c, p_i = spans(pipe)
    rows = {}
    for order in ("paper", "code"):
        guard = SAFREE(concepts=CONCEPTS, alpha=0.0, order=order)
        (found,) = guard.examine(pipe, PROMPT)
        made = rewritten(pipe, guard)["prompt_embeds"][0]
        rows[order] = made[[1 + i for i, flag in enumerate(found.flagged) if flag]].numpy()
    size = np.linalg.norm
    assert size(rows["code"] @ p_c) < 1e-5 * size(rows["code"])  # no rest of the concepts
    assert size(rows["code"] - rows["code"] @ p_i) > 1e-3 * size(rows["code"])  # outside the prompt's span
    assert size(rows["paper"] - rows["paper"] @ p_i) < 1e-5 * size(rows["paper"])  # inside it
    assert size(rows["paper"] @ p_c) > 1e-3 * size(rows["paper"])  # a rest of the concepts


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.sampled_from([1.0, 1e-2, 1e-3]))
@settings(max_examples=25, deadline=None)
def test_projectors_are_idempotent_and_symmetric_for_nearly_parallel_vectors(seed, n, spread):
    rng = torch.Generator().manual_seed(seed)
    vectors = (torch.randn(1, 64, generator=rng) + spread * torch.randn(n, 64, generator=rng)).float()
    span = basis(vectors, 1e-6)
    p = span @ span.T
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-13)
    assert torch.equal(p, p.T) or float((p - p.T).abs().max()) < 1e-15
    x = torch.randn(5, 64, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(inside(x, span) + outside(x, span), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(inside(vectors.double(), span), vectors.double(), rtol=0, atol=1e-4)


# The filter -----------------------------------------------------------------------------------------------------------

BETAS = [0.40, 0.45, 0.48, 0.50, 0.52, 0.533, 0.56, 0.58, 0.60, 0.75, 1.0]
PUBLISHED = {"nudity": [0, 0, 1, 2, 3, 5, 8, 9, 10, 10, 10], "artist": [0, 0, 0, 0, 1, 2, 7, 9, 10, 10, 10]}


@pytest.mark.parametrize("category", PUBLISHED)
def test_the_filter_follows_the_published_table(category):
    assert [FILTERS[category].steps(beta) for beta in BETAS] == PUBLISHED[category]


def test_extreme_constants_neither_overflow_nor_leave_the_range():
    steep = SelfValidatingFilter(k=1e6, t0=5.0, up_t=7)
    assert [steep.steps(beta) for beta in (-1.0, 0.4999, 0.5001, 2.0)] == [0, 0, 7, 7]


# Edges of the token test ----------------------------------------------------------------------------------------------


def test_flags_compare_with_the_mean_of_the_others():
    distances = torch.tensor([1.0, 1.0, 1.0, 1.2], dtype=torch.float64)
    assert flags(distances, 0.0) == (False, False, False, True)
    assert flags(distances, 0.19) == (False, False, False, True)
    assert flags(distances, 0.21) == (False, False, False, False)
    assert flags(distances[:1], 0.0) == (False,)
    assert flags(distances[:0], 0.0) == ()
    assert flags(torch.ones(3, dtype=torch.float64), 0.0) == (False, False, False)


@pytest.mark.parametrize("prompt", ["", " ", "g"])
def test_empty_prompts_and_those_of_one_token_are_left_as_they_are(pipe, prompt):
    arguments = {"prompt": prompt, "guidance_scale": 3.0}
    assert SAFREE(concepts=CONCEPTS, alpha=0.0)(pipe, arguments) == arguments


def test_an_infinite_threshold_leaves_the_call_as_it_is(pipe):
    arguments = {"prompt": [PROMPT, "a dog"], "guidance_scale": 3.0}
    assert SAFREE(concepts=CONCEPTS, alpha=math.inf)(pipe, arguments) == arguments


SHORT, FILLER = "gun of a cat", " z" * 200


def seen(pipe, prompt):
    """Share of tokens flagged, and whether any is among the first four words."""
    (found,) = SAFREE(concepts=CONCEPTS, alpha=0.0).examine(pipe, prompt)
    return found, any(found.flagged[: len(SHORT.replace(" ", ""))])


def test_a_prompt_beyond_the_context_is_tested_like_a_short_one(pipe):
    (short, in_short), (long, in_long) = seen(pipe, SHORT), seen(pipe, SHORT + FILLER)
    assert in_short
    assert in_long
    assert len(long.tokens) == 75  # cut, and the end token kept
    assert float(long.distances.std()) > 1e-3 * float(long.distances.mean())  # the bypass: all of them equal
    assert len(short.tokens) == len(SHORT.replace(" ", ""))


def test_the_longest_prompt_that_fits_and_the_first_that_does_not_give_the_same(pipe):
    fits = "gun" + " z" * 72
    (one,), (other,) = (SAFREE(concepts=CONCEPTS, alpha=0.0).examine(pipe, text) for text in (fits, fits + " z"))
    assert len(one.tokens) == len(other.tokens) == 75
    assert torch.equal(one.distances, other.distances)


def test_an_end_token_typed_by_somebody_does_not_blind_the_test(pipe):
    (found,) = SAFREE(concepts=CONCEPTS, alpha=0.0).examine(pipe, "<|endoftext|> a cat and a gun")
    assert float(found.distances.std()) > 1e-3 * float(found.distances.mean())
    assert any(found.flagged)


def test_concepts_that_span_everything_are_refused(pipe):
    many = [f"{a}{b}" for a in "abcdefgh" for b in "ijklmnop"]
    with pytest.raises(InvalidInput, match="span all that a prompt can say"):
        SAFREE(concepts=many, rcond=1e-9).examine(pipe, PROMPT)


def test_states_that_are_not_finite_are_refused():
    broken = tiny_pipeline("sd")
    with torch.no_grad():
        broken.text_encoder.final_layer_norm.weight[0] = math.nan
    with pytest.raises(InvalidInput, match="finite states of text_encoder"):
        rewritten(broken, SAFREE(concepts=CONCEPTS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concepts": "gun"}, "list of phrases"),
        ({"concepts": []}, "at least one concept"),
        ({"concepts": ["gun", " "]}, "list of phrases"),
        ({"concepts": CONCEPTS, "alpha": -0.1}, "alpha >= 0"),
        ({"concepts": CONCEPTS, "alpha": math.nan}, "alpha >= 0"),
        ({"concepts": CONCEPTS, "order": "both"}, "order 'paper' or 'code'"),
        ({"concepts": CONCEPTS, "rcond": 0.0}, "rcond"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(InvalidInput, match=message):
        SAFREE(**settings)


def test_filters_check_their_constants():
    for wrong in ({"k": 0.0}, {"t0": math.nan}, {"up_t": -1.0}, {"up_t": math.inf}):
        with pytest.raises(InvalidInput, match="SelfValidatingFilter"):
            SelfValidatingFilter(**wrong)


def test_the_published_runs_are_a_preset():
    published = SAFREE.published()
    assert (published.order, published.negative, published.alpha) == ("code", True, 0.01)
    assert published.concepts == NUDITY
    assert len(NUDITY) == 17
    assert SAFREE.published(["oil painting"], category="artist").filter == FILTERS["artist"]
    with pytest.raises(InvalidInput, match="category"):
        SAFREE.published(category="weapons")


def test_prompts_are_looked_at_one_by_one(pipe):
    guard = SAFREE(concepts=CONCEPTS, alpha=0.0)
    together = rewritten(pipe, guard, [PROMPT, "a dog", PROMPT])["prompt_embeds"]
    alone = rewritten(pipe, guard, PROMPT)["prompt_embeds"]
    torch.testing.assert_close(together[0], alone[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together[0], together[2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("skip", [1, 2])
def test_skipped_layers_are_skipped_in_the_test_too(pipe, skip):
    """The last layer norm follows the skipped layers in Stable Diffusion."""
    made = SAFREE(concepts=CONCEPTS, alpha=0.0).examine(pipe, PROMPT, clip_skip=skip)[0]
    with torch.no_grad():
        ids = ids_of(pipe, PROMPT)
        ids[1] = 0
        hidden = pipe.text_encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states[-(skip + 1)]
        vector = pipe.text_encoder.final_layer_norm(hidden)[0, len(PROMPT.replace(" ", "")) + 1]
        toxic = []
        for text in CONCEPTS:
            states = pipe.text_encoder(torch.tensor([ids_of(pipe, text)]), output_hidden_states=True)
            states = pipe.text_encoder.final_layer_norm(states.hidden_states[-(skip + 1)])
            toxic.append(states[0, len(text.replace(" ", "")) + 1].numpy())
    expected = np.linalg.norm((np.eye(32) - projector(toxic)) @ vector.numpy())
    assert float(made.distances[0]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_in_and_comes_out(dtype):
    half = tiny_pipeline("sd")
    half.text_encoder.to(dtype)
    made = rewritten(half, SAFREE(concepts=CONCEPTS, alpha=0.0))["prompt_embeds"]
    assert made.dtype == dtype
    assert bool(made.isfinite().all())


def test_another_random_encoder_of_another_width_agrees_too():
    """A three-layer encoder of width 24 in place of the tiny pipeline's."""
    torch.manual_seed(3)
    other = tiny_pipeline("sd")
    config = {
        **other.text_encoder.config.to_dict(),
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
    }
    other.register_modules(text_encoder=CLIPTextModel(CLIPTextConfig(**config)).eval().double())
    for order in ("paper", "code"):
        _, flagged, safe, _ = by_hand(other, PROMPT, CONCEPTS, 0.0, order)
        assert any(flagged)
        made = rewritten(other, SAFREE(concepts=CONCEPTS, alpha=0.0, order=order))["prompt_embeds"][0].numpy()
        np.testing.assert_allclose(made, safe, rtol=1e-6, atol=1e-8)
