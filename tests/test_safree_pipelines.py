"""SAFREE in whole calls of tiny pipelines: which rows the network saw, at which steps, and what is refused."""

import functools
import math

import numpy as np
import pytest
import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback
from transformers import T5Config, T5EncoderModel

import steerclear
from steerclear.attach import attach
from steerclear.errors import InvalidInput, UnsoundCombination, UnsupportedPipeline
from steerclear.guards import SafeDenoiser, TwoSample
from steerclear.negation import NegationSet
from steerclear.prompts import SAFREE, SelfValidatingFilter
from steerclear.testing.pipelines import tiny_call, tiny_pipeline
from steerclear.testing.pipelines.text import PRINTABLE

CONCEPTS = ["gun", "a bomb"]
PROMPT, OTHER = "a cat and gun", ""  # the second has no token: it is never flagged
FAMILIES = ("sd", "sdxl", "sd3", "flux")
TEXT = {"sd3": {"max_sequence_length": 16}, "flux": {"max_sequence_length": 16}}


def last(n: float) -> SelfValidatingFilter:
    """A filter whose n is the given one, whatever beta."""
    return SelfValidatingFilter(k=1e6, t0=-100.0, up_t=n)


def call(kind, **more):
    given = tiny_call(kind) | {"prompt": [PROMPT, OTHER], "output_type": "latent"} | more
    if kind == "flux":
        given["negative_prompt"] = ["dog", "fish"]
    return given


class Watch:
    """Records what the network is conditioned on, one entry per step."""

    def __init__(self, pipe):
        self.seen, self.pooled = [], []
        network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        self.handle = network.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        self.seen.append(kwargs["encoder_hidden_states"].clone())
        pooled = kwargs.get("pooled_projections", (kwargs.get("added_cond_kwargs") or {}).get("text_embeds"))
        self.pooled.append(None if pooled is None else pooled.clone())

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        self.handle.remove()


def drawn(pipe, given, **attached):
    with Watch(pipe) as watch:
        if not attached:
            return pipe(**given).images, watch
        with attach(pipe, *attached.pop("guards", ()), **attached):
            return pipe(**given).images, watch


def conditional(kind, seen):
    """Per step, the rows under the prompt: the second half, or (FLUX) the first of two calls."""
    return seen[::2] if kind == "flux" else [each.chunk(2)[1] for each in seen]


def unconditional(kind, seen):
    return seen[1::2] if kind == "flux" else [each.chunk(2)[0] for each in seen]


@pytest.fixture(scope="module")
def pipes():
    made = {}

    def get(kind):
        return made.setdefault(kind, tiny_pipeline(kind))

    return get


# What the network sees ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_flagged_rows_are_safe_for_some_steps_and_everything_else_is_untouched(pipes, kind):
    pipe, guard = pipes(kind), SAFREE(concepts=CONCEPTS, alpha=0.02, filter=last(25))
    steps = {"num_inference_steps": 4}
    before, stock = drawn(pipe, call(kind, **steps))
    after, guarded = drawn(pipe, call(kind, **steps), prompts=guard)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])  # the other sample of the batch
    flagged = {test.encoder: test for test in guard.examine(pipe, PROMPT, **TEXT.get(kind, {}))}
    assert any(any(test.flagged) for test in flagged.values())
    ours, theirs = conditional(kind, guarded.seen), conditional(kind, stock.seen)
    for step in range(4):  # n = 25 of 50: steps 0, 1, 2 of 4
        assert torch.equal(ours[step][0], theirs[step][0]) == (step > 2)
        assert torch.equal(ours[step][1], theirs[step][1])
        changed = (ours[step][0] != theirs[step][0]).any(dim=1).nonzero().flatten().tolist()
        assert changed == (rows_of(kind, flagged) if step <= 2 else [])
    for one, other in zip(unconditional(kind, guarded.seen), unconditional(kind, stock.seen), strict=True):
        assert torch.equal(one, other)


def rows_of(kind, tests):
    """Rows that may change: CLIP's are behind its begin token, SD3's T5 rows behind 77 of CLIP."""
    rows = set()
    for name, test in tests.items():
        if math.isnan(test.beta):
            continue
        start = {"text_encoder_3": 77, "text_encoder_2": 0 if kind == "flux" else 1}.get(name, 1)
        rows |= {start + at for at, flag in enumerate(test.flagged) if flag}
    return sorted(rows)


@pytest.mark.parametrize(("kind", "switched"), [("sdxl", True), ("sd3", True), ("flux", False)])
def test_pooled_vectors_lose_the_concepts(pipes, kind, switched):
    pipe = pipes(kind)
    given = call(kind, num_inference_steps=3)
    _, stock = drawn(pipe, given)
    _, guarded = drawn(pipe, call(kind, num_inference_steps=3), prompts=SAFREE(concepts=CONCEPTS, filter=last(0)))
    ours, theirs = (conditional(kind, watch.pooled) for watch in (guarded, stock))
    concepts = torch.cat([conditional(kind, pooled_of(pipe, kind, text))[0] for text in CONCEPTS]).double().numpy()
    width = ours[0].shape[1]
    for part in [slice(0, 32), slice(32, 64)] if kind == "sd3" else [slice(0, width)]:
        e = concepts[:, part].T
        outside = np.eye(e.shape[0]) - e @ np.linalg.pinv(e)
        expected = outside @ theirs[0][0, part].double().numpy()
        np.testing.assert_allclose(ours[0][0, part].double().numpy(), expected, atol=1e-5)
    assert torch.equal(ours[0][1], theirs[0][1])
    assert torch.equal(ours[1][0], theirs[1][0]) == switched  # FLUX has no way back
    for one, other in zip(unconditional(kind, guarded.pooled), unconditional(kind, stock.pooled), strict=True):
        assert torch.equal(one, other)


def pooled_of(pipe, kind, text):
    given = call(kind, num_inference_steps=1, prompt=[text])
    if kind == "flux":
        given["negative_prompt"] = ["dog"]
    return drawn(pipe, given)[1].pooled


def test_rows_and_channels_of_a_wide_sd3_go_to_their_encoders():
    """With T5 as wide as both CLIPs together, as in SD3 itself: three blocks, each projected in its own space."""
    torch.manual_seed(0)
    pipe = tiny_pipeline("sd3")
    sizes = {"vocab_size": len(PRINTABLE) + 4, "d_model": 64, "d_kv": 8, "d_ff": 37, "num_layers": 1, "num_heads": 4}
    config = {**pipe.transformer.config, "joint_attention_dim": 64}
    transformer = SD3Transformer2DModel.from_config(config).eval()
    pipe.register_modules(text_encoder_3=T5EncoderModel(T5Config(**sizes)).eval(), transformer=transformer)
    guard = SAFREE(concepts=CONCEPTS, alpha=0.0, filter=None, order="code")
    given = {"prompt": PROMPT, "max_sequence_length": 16}
    made = guard(pipe, given)["prompt_embeds"][0].double()
    with torch.no_grad():
        before = pipe.encode_prompt(PROMPT, None, None, "cpu", max_sequence_length=16)[0][0].double()
    tests = {test.encoder: test for test in guard.examine(pipe, PROMPT, max_sequence_length=16)}
    blocks = {
        "text_encoder": (slice(0, 77), slice(0, 32), 1),
        "text_encoder_2": (slice(0, 77), slice(32, 64), 1),
        "text_encoder_3": (slice(77, 93), slice(0, 64), 0),
    }
    for name, (rows, channels, first) in blocks.items():
        test = tests[name]
        mine, old = made[rows, channels], before[rows, channels]
        hit = [first + at for at, flag in enumerate(test.flagged) if flag]
        assert hit
        assert (mine != old).any(dim=1).nonzero().flatten().tolist() == hit
        module, tokenizer = getattr(pipe, name), getattr(pipe, name.replace("text_encoder", "tokenizer"))
        toxic = np.stack([summary_of(module, tokenizer, text, first) for text in CONCEPTS])
        projector = toxic.T @ np.linalg.pinv(toxic.T)
        rest = mine[hit].numpy() @ projector
        assert np.linalg.norm(rest) < 1e-5 * np.linalg.norm(mine[hit].numpy())


def summary_of(module, tokenizer, text, clip):
    """The end token's state before the last layer, or the mean of T5's states without padding."""
    made = tokenizer([text], padding="max_length", max_length=77 if clip else 16, return_tensors="pt")
    with torch.no_grad():
        out = module(made.input_ids, output_hidden_states=True)
    count = int(made.attention_mask.sum())
    if clip:
        return out.hidden_states[-2][0, count - 1].double().numpy()
    return out.last_hidden_state[0, :count].double().mean(0).numpy()


def test_a_word_that_one_encoder_flags_is_replaced_in_the_others(pipes):
    tests = SAFREE(concepts=CONCEPTS, alpha=0.05).examine(pipes("sdxl"), PROMPT)
    assert tests[0].flagged == tests[1].flagged  # both read letters
    alone = [own_flags(test) for test in tests]
    assert alone[0] != alone[1]  # though they found different ones
    words = [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    hit = {word for flags in alone for word, flag in zip(words, flags, strict=True) if flag}
    assert list(tests[0].flagged) == [word in hit for word in words]


def own_flags(test):
    d = test.distances.tolist()
    return [d[i] > 1.05 * (sum(d) - d[i]) / (len(d) - 1) for i in range(len(d))]


@pytest.mark.parametrize("prompt_2", [None, "a bird"])
def test_encoders_that_read_other_texts_keep_their_own_flags(pipes, prompt_2):
    tests = SAFREE(concepts=CONCEPTS, alpha=0.05).examine(pipes("sdxl"), PROMPT, prompt_2=prompt_2)
    mine = [list(test.flagged) == own_flags(test) for test in tests]
    assert mine == [prompt_2 is not None] * 2


# When it sees it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "n", "safe"), [(50, 10, 11), (25, 3, 2), (10, 0, 1), (4, 10, 1)])
def test_the_safe_embedding_serves_n_and_one_of_fifty_steps(pipes, steps, n, safe):
    pipe = pipes("sd")
    given = call("sd", prompt=PROMPT, num_inference_steps=steps)
    stock = conditional("sd", drawn(pipe, dict(given, num_inference_steps=1))[1].seen)[0]
    _, watch = drawn(pipe, given, prompts=SAFREE(concepts=CONCEPTS, filter=last(n)))
    assert [not torch.equal(rows, stock) for rows in conditional("sd", watch.seen)] == [True] * safe + [False] * (
        steps - safe
    )


def test_every_sample_switches_at_a_step_of_its_own(pipes):
    pipe = pipes("sd")
    prompts = [PROMPT, OTHER, "the dog of bone", "gun gun gun"]
    guard = SAFREE(concepts=CONCEPTS, alpha=0.0, filter=SelfValidatingFilter(k=4.0, t0=4.6, up_t=40))
    expected = [guard.filter.steps(guard.examine(pipe, text)[0].beta) if text != OTHER else -1 for text in prompts]
    assert len(set(expected)) == 4
    stock = conditional("sd", drawn(pipe, call("sd", prompt=prompts))[1].seen)[0]
    _, watch = drawn(pipe, call("sd", prompt=prompts, num_inference_steps=10), prompts=guard)
    counts = [
        sum(not torch.equal(rows[k], stock[k]) for rows in conditional("sd", watch.seen)) for k in range(len(prompts))
    ]
    assert counts == [sum(50 * step <= n * 10 for step in range(10)) for n in expected]
    assert len(set(counts)) >= 3


def test_without_a_filter_the_safe_embedding_stays(pipes):
    pipe = pipes("sd")
    stock = conditional("sd", drawn(pipe, call("sd"))[1].seen)[0]
    _, watch = drawn(pipe, call("sd"), prompts=SAFREE(concepts=CONCEPTS, filter=None))
    assert all(not torch.equal(rows[0], stock[0]) for rows in conditional("sd", watch.seen))


def test_no_network_evaluation_is_added(pipes):
    pipe = pipes("sd")
    assert len(drawn(pipe, call("sd"))[1].seen) == len(
        drawn(pipe, call("sd"), prompts=SAFREE(concepts=CONCEPTS, alpha=0.0))[1].seen
    )


# Neutral --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("alpha", [math.inf, 50.0])
def test_where_nothing_is_flagged_the_pictures_are_bit_identical(pipes, kind, alpha):
    pipe = pipes(kind)
    before, _ = drawn(pipe, call(kind))
    after, _ = drawn(pipe, call(kind), prompts=SAFREE(concepts=CONCEPTS, alpha=alpha))
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", FAMILIES)
def test_embeddings_written_back_unchanged_give_the_same_picture(pipes, kind):
    """The unflagged sample of a rewritten call, with two pictures of each prompt."""
    pipe = pipes(kind)
    before, _ = drawn(pipe, call(kind, num_images_per_prompt=2))
    after, _ = drawn(pipe, call(kind, num_images_per_prompt=2), prompts=SAFREE(concepts=CONCEPTS, filter=last(5)))
    assert before.shape == after.shape
    assert torch.equal(before[2:], after[2:])
    assert all(not torch.equal(before[k], after[k]) for k in (0, 1))


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_works_without_guidance(pipes, kind):
    pipe, off = pipes(kind), {"true_cfg_scale" if kind == "flux" else "guidance_scale": 1.0}
    before, stock = drawn(pipe, call(kind, **off))
    after, watch = drawn(pipe, call(kind, **off), prompts=SAFREE(concepts=CONCEPTS, filter=last(0)))
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])
    assert [torch.equal(one[0], other[0]) for one, other in zip(watch.seen, stock.seen, strict=True)] == [
        False, True, True,
    ]  # fmt: skip


def test_one_prompt_as_text_is_one_picture(pipes):
    pipe = pipes("sd")
    given = call("sd", prompt=PROMPT, negative_prompt="dog", num_images_per_prompt=3)
    images, watch = drawn(pipe, given, prompts=SAFREE(concepts=CONCEPTS, filter=None))
    assert len(images) == 3
    stock = drawn(pipe, call("sd", prompt=PROMPT, negative_prompt="dog"))[1]
    for rows in unconditional("sd", watch.seen):
        assert all(torch.equal(row, stock.seen[0][0]) for row in rows)  # the call's own negative prompt is kept


# The concepts as negative prompt --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_negative_prompt_is_the_one_that_the_pipeline_takes(pipes, kind):
    pipe = pipes(kind)
    own = call(kind).get("negative_prompt", [None, None])
    joined = [f"gun, a bomb, {text}" if text else "gun, a bomb" for text in own]
    before, _ = drawn(pipe, call(kind) | {"negative_prompt": joined})
    after, _ = drawn(pipe, call(kind), prompts=SAFREE(concepts=CONCEPTS, negative=True, alpha=math.inf))
    assert torch.equal(before, after)
    both, watch = drawn(pipe, call(kind), prompts=SAFREE(concepts=CONCEPTS, negative=True, filter=last(0)))
    stock = drawn(pipe, call(kind) | {"negative_prompt": joined})[1]
    assert torch.equal(both[1], before[1])
    for one, other in zip(unconditional(kind, watch.seen), unconditional(kind, stock.seen), strict=True):
        assert torch.equal(one, other)


def test_another_text_can_be_the_negative_prompt(pipes):
    pipe = pipes("sd")
    before, _ = drawn(pipe, call("sd", negative_prompt=["arms"] * 2))
    after, _ = drawn(pipe, call("sd"), prompts=SAFREE(concepts=CONCEPTS, negative="arms", alpha=math.inf))
    assert torch.equal(before, after)


def test_a_negative_prompt_without_guidance_is_refused(pipes):
    guard = SAFREE(concepts=CONCEPTS, negative=True)
    for kind, off in (("sd", {"guidance_scale": 1.0}), ("flux", {"true_cfg_scale": 1.0})):
        with pytest.raises(UnsoundCombination, match="expected classifier-free guidance"):
            drawn(pipes(kind), call(kind, **off), prompts=guard)


# Callbacks ------------------------------------------------------------------------------------------------------------


def test_the_callers_callback_is_called_with_what_it_asked_for(pipes):
    pipe, seen = pipes("sd"), []

    def note(pipe, step, timestep, tensors):
        seen.append((step, sorted(tensors)))
        return {"latents": tensors["latents"] * 0.5} if step == 1 else {}

    more = {"callback_on_step_end": note, "num_inference_steps": 3}
    before, _ = drawn(pipe, call("sd", **more))
    after, _ = drawn(pipe, call("sd", **more), prompts=SAFREE(concepts=CONCEPTS, filter=last(20)))
    assert seen == [(k, ["latents"]) for k in (0, 1, 2)] * 2
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])


def test_guidance_cut_off_by_a_callback_of_diffusers_goes_together(pipes):
    pipe = pipes("sd")
    given = call("sd", prompt=PROMPT, num_inference_steps=6)
    given["callback_on_step_end"] = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2)
    stock = drawn(pipe, dict(given))[1]
    _, watch = drawn(pipe, dict(given), prompts=SAFREE(concepts=CONCEPTS, filter=last(34)))
    assert [len(rows) for rows in watch.seen] == [len(rows) for rows in stock.seen] == [2, 2, 2, 1, 1, 1]
    same = [torch.equal(one[-1], other[-1]) for one, other in zip(watch.seen, stock.seen, strict=True)]
    assert same == [False] * 5 + [True]  # n = 34 of 50: steps 0 to 4 of 6


def test_a_callback_that_replaces_the_embedding_is_refused(pipes):
    pipe = pipes("sd")

    def replace(pipe, step, timestep, tensors):
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    more = {"callback_on_step_end": replace, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.raises(UnsoundCombination, match="prompt_embeds to stay"):
        drawn(pipe, call("sd", **more), prompts=SAFREE(concepts=CONCEPTS))


# Refused --------------------------------------------------------------------------------------------------------------


def test_embeddings_without_text_are_refused(pipes):
    with pytest.raises(InvalidInput, match="got prompt_embeds"):
        drawn(pipes("sd"), {"prompt_embeds": torch.zeros(1, 77, 32)}, prompts=SAFREE(concepts=CONCEPTS))


def test_two_of_them_are_refused(pipes):
    guard = SAFREE(concepts=CONCEPTS)
    refused = pytest.raises(InvalidInput, match="got prompt_embeds")
    with attach(pipes("sd"), prompts=guard), attach(pipes("sd"), prompts=guard), refused:
        pipes("sd")(**call("sd"))


def test_a_call_without_a_prompt_gets_the_pipelines_own_error(pipes):
    with pytest.raises(ValueError, match="Provide either `prompt`"):
        drawn(pipes("sd"), {"num_inference_steps": 2}, prompts=SAFREE(concepts=CONCEPTS))


def test_image_to_image_needs_the_filter_off(pipes):
    pipe = StableDiffusionImg2ImgPipeline(**pipes("sd").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt": PROMPT, "image": torch.rand(1, 3, 16, 16), "num_inference_steps": 4, "strength": 0.5,
             "guidance_scale": 3.0, "output_type": "latent"}  # fmt: skip
    given["generator"] = torch.Generator().manual_seed(0)
    with pytest.raises(UnsupportedPipeline, match="starts in the middle of the trajectory; use SAFREE"):
        drawn(pipe, given, prompts=SAFREE(concepts=CONCEPTS))
    before, _ = drawn(pipe, given | {"generator": torch.Generator().manual_seed(0)})
    after, watch = drawn(pipe, given, prompts=SAFREE(concepts=CONCEPTS, filter=None))
    assert len(watch.seen) == 2
    assert not torch.equal(before, after)


@pytest.mark.parametrize("kind", ["pixart", "video", "modular-sdxl"])
def test_other_pipelines_are_refused(pipes, kind):
    with pytest.raises(UnsupportedPipeline, match="expected encode_prompt and the text encoders"):
        drawn(pipes(kind), tiny_call(kind), prompts=SAFREE(concepts=CONCEPTS))


class NoCallback(StableDiffusionPipeline):
    """A pipeline whose loop offers no embedding to replace."""

    _callback_tensor_inputs = ("latents",)


def test_a_loop_that_offers_no_embedding_needs_the_filter_off(pipes):
    pipe = NoCallback(**pipes("sd").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(UnsupportedPipeline, match="cannot change its embedding"):
        drawn(pipe, call("sd"), prompts=SAFREE(concepts=CONCEPTS))
    assert not torch.equal(
        drawn(pipe, call("sd"))[0][0], drawn(pipe, call("sd"), prompts=SAFREE(concepts=CONCEPTS, filter=None))[0][0]
    )


class Weighted(StableDiffusionPipeline):
    """A pipeline that changes what its encoder returns, as prompt weighting does."""

    @functools.wraps(StableDiffusionPipeline.encode_prompt)
    def encode_prompt(self, *args, **kwargs):
        prompt, negative = super().encode_prompt(*args, **kwargs)
        return 1.5 * prompt, negative


def test_a_pipeline_that_changes_the_encoders_output_is_refused(pipes):
    pipe = Weighted(**pipes("sd").components, requires_safety_checker=False)
    with pytest.raises(UnsupportedPipeline, match="output of text_encoder in its place"):
        drawn(pipe, call("sd"), prompts=SAFREE(concepts=CONCEPTS))


def test_skipped_layers_of_sd3_need_the_filter_off(pipes):
    with pytest.raises(UnsoundCombination, match="skip_guidance_layers"):
        drawn(pipes("sd3"), call("sd3", skip_guidance_layers=[0]), prompts=SAFREE(concepts=CONCEPTS))


# Together -------------------------------------------------------------------------------------------------------------


def test_it_goes_together_with_the_safe_denoiser():
    """As in the Safe Denoiser paper: the prompt made safe, and the estimate steered."""
    pipe = tiny_pipeline("sd")
    rng = torch.Generator().manual_seed(0)
    pictures = torch.rand(8, 3, 16, 16, generator=rng)
    unsafe, safe = (NegationSet.encode(part, pipe) for part in pictures.split(4))
    guard = SafeDenoiser(negation=unsafe, weight=TwoSample(safe=safe, prior=0.5, bandwidth=4.0))
    prompts = SAFREE(concepts=CONCEPTS, filter=last(20))
    images = {
        "none": drawn(pipe, call("sd"))[0],
        "prompts": drawn(pipe, call("sd"), prompts=prompts)[0],
        "guard": drawn(pipe, call("sd"), guards=(guard,))[0],
        "both": drawn(pipe, call("sd"), guards=(guard,), prompts=prompts)[0],
    }
    assert torch.equal(images["none"][1], images["prompts"][1])
    assert torch.equal(images["guard"][1], images["both"][1])
    assert len({tensor[0].numpy().tobytes() for tensor in images.values()}) == 4
    with steerclear.attach(pipe, guard, prompts=prompts) as trace:
        pipe(**call("sd"))
    assert trace.network_evaluations == trace.steps == 3
