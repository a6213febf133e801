"""The sampler's space of whole pipelines: pictures in, latents out, and the self-test that establishes the map."""

import math

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

from steerclear.attach import space
from steerclear.attach.api import apply_guard, attach
from steerclear.attach.layout import Layout
from steerclear.attach.space import check, encoder_of
from steerclear.errors import InvalidInput, NegationMismatch, UnsupportedPipeline
from steerclear.guards.base import Requires
from steerclear.negation import Encoder, NegationSet, Space
from steerclear.negation import encoder_of as encoder_of_anything
from steerclear.testing.pipelines import KINDS, tiny_call, tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# Sizes for the families whose default is too large for a test; not square, so that a transposition cannot hide.
SIZES = {"flux": (16, 24), "pixart": (16, 24), "video": (16, 32), "modular-sdxl": (16, 24), "sd": (16, 24)}


def encoder(kind, pipe=None):
    height, width = SIZES.get(kind, (None, None))
    return encoder_of(pipe or tiny_pipeline(kind), height=height, width=width, frames=5 if kind == "video" else None)


def latents_of(kind, vae, images):
    """The sampler's latents of pictures, typed from the families' published constants."""
    pixels = images * 2 - 1
    if kind in ("ddpm", "ddim"):
        return pixels
    if kind == "video":
        clip = pixels.unsqueeze(2).repeat(1, 1, 5, 1, 1)
        mean, std = torch.tensor([-0.76, -0.71, 0.15, 0.11]), torch.tensor([2.82, 1.45, 2.33, 2.61])
        return (vae.encode(clip).latent_dist.mean - mean.view(1, 4, 1, 1, 1)) / std.view(1, 4, 1, 1, 1)
    z = vae.encode(pixels).latent_dist.mean
    if kind == "sd3":
        return (z - 0.0609) * 1.5305
    if kind == "flux":
        z = (z - 0.1159) * 0.3611
        rows = [
            z[:, :, i : i + 2, j : j + 2].flatten(1) for i in range(0, z.shape[2], 2) for j in range(0, z.shape[3], 2)
        ]
        return torch.stack(rows, 1)
    return z * (0.13025 if "sdxl" in kind else 0.18215)


def negation(space, n=2):
    return NegationSet(
        latents=torch.rand(n, *space.shape),
        weights=torch.ones(n),
        ids=tuple(map(str, range(n))),
        labels=("",) * n,
        digests=("",) * n,
        space=space,
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("sdxl", "modular-sdxl")])
@torch.no_grad()
def test_encode_is_the_normalised_mode_of_the_autoencoder(kind, rng):
    pipe = tiny_pipeline(kind)
    made = encoder(kind, pipe)
    images = torch.rand(3, 3, *made.size, generator=rng)
    latents = made.encode(images)
    assert latents.dtype == torch.float32
    assert latents.shape == (3, *made.space.shape)
    expected = latents_of(kind, getattr(pipe, "vae", None), images)
    assert (latents - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_space_has_the_shape_that_the_sampler_steps(kind):
    pipe, shapes = tiny_pipeline(kind), []
    made = encoder(kind, pipe)

    def look(denoised, state):
        shapes.append(tuple(denoised.shape[1:]))

    call = tiny_call(kind)
    if kind in SIZES:
        call |= {"height": made.size[0], "width": made.size[1]}
    with attach(pipe, look):
        pipe(**call)
    assert set(shapes) == {made.space.shape}


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", "video", "ddpm"])
@torch.no_grad()
def test_decode_inverts_the_layout_and_reads_pictures_in_unit_range(kind, rng):
    pipe = tiny_pipeline(kind)
    made = encoder(kind, pipe)
    latents = torch.randn(2, *made.space.shape, generator=rng)
    images = made.decode(latents)
    assert images.shape == (2, 3, *made.size)
    assert images.min() >= 0
    assert images.max() <= 1
    if made.vae is not None:
        z = made.layout.to_vae(latents, made.latent)
        assert (made.layout.to_sampler(z) - latents).abs().max() <= 1e-6


def test_encoder_satisfies_the_protocol_and_is_registered():
    pipe = tiny_pipeline("ddpm")
    made = encoder_of_anything(pipe)
    assert isinstance(made, Encoder)
    assert made.space.encoder == "pixels"
    assert made.size == (8, 8)


def test_pictures_and_latents_of_another_size_are_refused():
    made = encoder("sd")
    with pytest.raises(InvalidInput, match="expected pictures of shape"):
        made.encode(torch.rand(1, 3, 16, 16))
    with pytest.raises(InvalidInput, match="expected latents"):
        made.decode(torch.rand(1, 4, 9, 9))
    pipe = tiny_pipeline("pixart")
    encoder_of(pipe, height=16, width=16)
    with pytest.raises(InvalidInput, match="divides by 2"):
        encoder_of(pipe, height=17, width=16)


# The fingerprint ---------------------------------------------------------------------------------------------------


def test_fingerprint_is_the_same_for_equal_encoders_and_in_half_precision():
    ours, theirs = tiny_pipeline("sd"), tiny_pipeline("sd")
    first = encoder_of(ours).space
    assert encoder_of(theirs).space.encoder == first.encoder
    ours.vae.to(torch.float16)
    ours.vae.to(torch.float32)  # the fingerprint sees weights as float16, so the rounding is invisible
    assert encoder_of(ours).space == first


def test_fingerprint_changes_with_weights_and_normalisation_but_not_with_the_decoder():
    pipe = tiny_pipeline("sd")
    first = encoder_of(pipe).space.encoder
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.add_(1)
    assert encoder_of(pipe).space.encoder == first
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.add_(1)
    second = encoder_of(pipe).space.encoder
    assert second != first
    pipe.vae.register_to_config(scaling_factor=0.2)
    assert encoder_of(pipe).space.encoder not in (first, second)


# The self-test -----------------------------------------------------------------------------------------------------


def test_self_test_restores_everything():
    pipe = tiny_pipeline("sd")
    pipe.scheduler.set_timesteps(7)
    scheduler, timesteps, before = pipe.scheduler, pipe.scheduler.timesteps, torch.get_rng_state()
    bar, config = dict(pipe._progress_bar_config), dict(pipe.config)
    encoder_of(pipe)
    assert pipe.scheduler is scheduler
    assert pipe.scheduler.timesteps is timesteps
    assert torch.equal(before, torch.get_rng_state())
    assert "decode" not in vars(pipe.vae)
    assert pipe._progress_bar_config == bar
    assert dict(pipe.config) == config


def test_self_test_runs_once_per_pipeline(monkeypatch):
    runs, real = [], space.verify
    monkeypatch.setattr(space, "verify", lambda *args: runs.append(args) or real(*args))
    pipe = tiny_pipeline("ddim")
    encoder_of(pipe)
    encoder_of(pipe)
    assert len(runs) == 1


def test_self_test_of_a_guarded_pipeline_does_not_ask_its_guards():
    pipe, asked = tiny_pipeline("sd"), []
    apply_guard(pipe, lambda denoised, state: asked.append(state.step))
    encoder_of(pipe)
    assert not asked
    pipe(**tiny_call("sd"))
    assert asked == [0, 1, 2]


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False),
        DDIMScheduler(set_alpha_to_one=False, clip_sample=False),
        EulerDiscreteScheduler(final_sigmas_type="sigma_min"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedules_that_end_at_noise_pass(scheduler):
    pipe = tiny_pipeline("sd")
    pipe.scheduler = scheduler
    assert encoder_of(pipe).space.shape == (4, 8, 8)
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0.2},
        {"mean": 0.1},
        {"pack": lambda z: z.flip(1)},
        {"pack": lambda z: z.transpose(2, 3)},
    ],
    ids=["scale", "shift", "channels", "transposed"],
)
def test_a_space_that_is_misunderstood_is_refused(wrong, monkeypatch):
    monkeypatch.setattr(space, "layout_of", lambda pipe, vae: Layout(**{"scale": 0.18215} | wrong))
    with pytest.raises(UnsupportedPipeline, match="arrived with an error"):
        encoder_of(tiny_pipeline("sd"))


def test_another_packing_is_refused_with_both_shapes(monkeypatch):
    monkeypatch.setattr(space, "layout_of", lambda pipe, vae: Layout(scale=0.18215, pack=lambda z: z.flatten(2)))
    with pytest.raises(UnsupportedPipeline, match=r"\(4, 8, 8\).*\(4, 64\)"):
        encoder_of(tiny_pipeline("sd"))


def test_a_pipeline_that_cannot_be_called_says_what_to_pass():
    pipe = tiny_pipeline("pixart")
    pipe.text_encoder = None
    with pytest.raises(UnsupportedPipeline, match="call="):
        encoder_of(pipe, height=16, width=16)
    embeds, mask = torch.zeros(1, 4, 32), torch.ones(1, 4)
    call = {"prompt": None, "negative_prompt": None, "prompt_embeds": embeds, "prompt_attention_mask": mask}
    call |= {"negative_prompt_embeds": embeds, "negative_prompt_attention_mask": mask}
    assert encoder_of(pipe, height=16, width=16, call=call).space.shape == (4, 8, 8)


@pytest.mark.parametrize("auto", [AutoPipelineForImage2Image, AutoPipelineForInpainting])
def test_pipelines_that_start_from_a_picture_share_the_space_of_those_that_do_not(auto):
    pipe = tiny_pipeline("sd")
    assert encoder_of(auto.from_pipe(pipe)).space.encoder == encoder_of(pipe).space.encoder
    check(auto.from_pipe(pipe), [negation(encoder_of(pipe).space)])


def test_weights_that_are_not_in_memory_are_refused():
    pipe = tiny_pipeline("sd")
    pipe.vae.encoder.to("meta")
    with pytest.raises(UnsupportedPipeline, match="not in memory"):
        encoder_of(pipe)


# Negation sets -----------------------------------------------------------------------------------------------------


class Reads:
    """A guard that reads a negation set and does nothing."""

    def __init__(self, *sets):
        self.requires = Requires(negation=sets)

    def __call__(self, denoised, state):
        return None


def test_a_set_of_this_encoder_passes_and_another_is_refused_before_sampling():
    pipe, other = tiny_pipeline("sd"), tiny_pipeline("sdxl")
    ours, theirs = negation(encoder_of(pipe).space), negation(encoder_of(other, height=16, width=16).space)
    with attach(pipe, Reads(ours)):
        pipe(**tiny_call("sd"))
    with pytest.raises(NegationMismatch, match="AutoencoderKL"), attach(pipe, Reads(ours, theirs)):
        pass


def test_a_set_of_another_size_passes_only_where_calls_take_sizes():
    pipe = tiny_pipeline("sd")
    large = negation(encoder_of(pipe, height=32, width=32).space)
    check(pipe, [large])
    check(pipe, [large], height=32, width=32)
    with pytest.raises(NegationMismatch):
        check(pipe, [large], height=16, width=16)
    pixels = tiny_pipeline("ddpm")
    with pytest.raises(NegationMismatch):
        check(pixels, [negation(Space(encoder="pixels", shape=(3, 16, 16)))])


def test_a_set_of_another_packing_is_refused():
    pipe = tiny_pipeline("flux")
    ours = encoder_of(pipe, height=16, width=16).space
    spatial = Space(encoder=ours.encoder, shape=(math.prod(ours.shape),))
    with pytest.raises(NegationMismatch):
        check(pipe, [negation(spatial)])


def test_pictures_are_encoded_through_the_pipeline_itself():
    from PIL import Image

    pipe = tiny_pipeline("sd")
    pictures = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    made = NegationSet.encode(pictures, pipe, progress=False)
    assert len(made) == 2
    assert made.space == encoder_of(pipe).space
    check(pipe, [made])
