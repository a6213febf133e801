"""Guards on whole pipelines of every family, end to end: nothing but the denoised estimate may change."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    ModularPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from steerclear.attach.api import apply_guard, attach, remove_guard
from steerclear.errors import GuardNotApplied, InvalidInput
from steerclear.testing.pipelines import KINDS, tiny_call, tiny_pipeline

# diffusers' Euler schedule still builds arrays the way NumPy 1 did
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LATENT = [kind for kind in KINDS if kind not in ("ddpm", "ddim")]


def nothing(denoised, state):
    """The guard that never fires."""


def same(denoised, state):
    """The guard that answers what it was given."""
    return denoised.clone()


def shift(denoised, state):
    """A guard that does something."""
    return denoised + 0.25


class Force:
    """Answers Z for every sample and step."""

    def __init__(self):
        self.shapes = []
        self.z = None

    def __call__(self, denoised, state):
        self.shapes.append(tuple(denoised.shape))
        if self.z is None:
            self.z = 1.8 * torch.rand(denoised.shape[1:], generator=torch.Generator().manual_seed(5)) - 0.9
        return self.z.expand_as(denoised)


def pictures(result):
    """The pictures of a call as one array, whatever the family calls them."""
    images = getattr(result, "images", None)
    images = getattr(result, "frames", images) if images is None else images
    return np.asarray(result if images is None else images)


def listen(pipe, monkeypatch):
    """What reaches ``vae.decode``."""
    heard, decode = [], pipe.vae.decode

    def listening(z, *args, **kwargs):
        heard.append(z.clone())
        return decode(z, *args, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode", listening)
    return heard


def decoder_input(kind, z):
    """What each family decodes when its sampler ended at ``z``: typed from the models' published constants."""
    match kind:
        case "sd" | "dit" | "pixart":
            return z / 0.18215
        case "sdxl" | "modular-sdxl":
            return z / 0.13025
        case "sd3":
            return z / 1.5305 + 0.0609
        case "flux":  # row r of the sampler is the 2x2 patch r of a 4x8x8 latent, channels first within it
            grid = np.zeros((4, 8, 8), dtype=np.float32)
            for row in range(16):
                top, left = 2 * (row // 4), 2 * (row % 4)
                grid[:, top : top + 2, left : left + 2] = z[row].reshape(4, 2, 2)
            return torch.from_numpy(grid) / 0.3611 + 0.1159
        case "video":
            mean, std = torch.tensor([-0.76, -0.71, 0.15, 0.11]), torch.tensor([2.82, 1.45, 2.33, 2.61])
            return z * std.view(4, 1, 1, 1) + mean.view(4, 1, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guard", [nothing, same], ids=["none", "clone"])
def test_identity_guard_is_bit_identical(kind, guard):
    pipe = tiny_pipeline(kind)
    plain = pictures(pipe(**tiny_call(kind)))
    with attach(pipe, guard):
        guarded = pictures(pipe(**tiny_call(kind)))
    assert np.array_equal(plain, guarded)


@pytest.mark.parametrize("kind", LATENT)
def test_forced_estimate_reaches_the_decoder(kind, monkeypatch):
    pipe, force = tiny_pipeline(kind), Force()
    heard = listen(pipe, monkeypatch)
    with attach(pipe, force):
        pipe(**tiny_call(kind))
    expected = decoder_input(kind, force.z)
    # float32 rounding of the way through the solver, over the smallest scaling factor
    assert (heard[0][0] - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_forced_estimate_is_the_picture_of_pixel_pipelines(kind):
    pipe, force = tiny_pipeline(kind), Force()
    with attach(pipe, force):
        images = pictures(pipe(**tiny_call(kind)))
    assert np.abs(images[0].transpose(2, 0, 1) - (force.z.numpy() + 1) / 2).max() <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_trace_has_one_record_per_step_and_sample(kind):
    pipe = tiny_pipeline(kind)
    with attach(pipe, shift) as trace:
        pipe(**tiny_call(kind))
        pipe(**tiny_call(kind))
    records = trace.records()
    assert [(r["call"], r["step"], r["sample"]) for r in records] == [(c, s, 0) for c in (0, 1) for s in (0, 1, 2)]
    assert all(r["fired"] and r["change"] > 0 for r in records)


@pytest.mark.parametrize("kind", KINDS)
def test_removing_the_guard_restores_the_pipeline(kind):
    pipe = tiny_pipeline(kind)
    classes = type(pipe), type(pipe.scheduler)
    plain = pictures(pipe(**tiny_call(kind)))
    apply_guard(pipe, shift)
    guarded = pictures(pipe(**tiny_call(kind)))
    remove_guard(pipe)
    assert not np.array_equal(plain, guarded)
    assert np.array_equal(plain, pictures(pipe(**tiny_call(kind))))
    assert (type(pipe), type(pipe.scheduler)) == classes


def save_both(pipe, kind, folder, **options):
    """The pipeline saved as stock and while guarded; the files must be the same, byte for byte."""
    stock, guarded = folder / "stock", folder / "guarded"
    pipe.save_pretrained(str(stock), **options)
    with attach(pipe, shift):
        pipe(**tiny_call(kind))
        pipe.save_pretrained(str(guarded), **options)
    files = sorted(path.relative_to(stock) for path in stock.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(guarded) for path in guarded.rglob("*") if path.is_file())
    for file in files:
        # an index may name the folder that it was saved to
        ours, theirs = ((root / file).read_bytes().replace(bytes(root), b"") for root in (stock, guarded))
        assert ours == theirs, file
    return guarded


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "modular-sdxl"])
def test_saved_while_guarded_reloads_as_stock(kind, tmp_path):
    pipe = tiny_pipeline(kind)
    plain, stock = pictures(pipe(**tiny_call(kind))), type(pipe)
    again = DiffusionPipeline.from_pretrained(save_both(pipe, kind, tmp_path))
    again.set_progress_bar_config(disable=True)
    assert type(again) is stock
    assert type(again.scheduler) is type(pipe.scheduler)
    # loaded weights lie elsewhere in memory, which may change the order of float32 sums
    assert np.abs(plain - pictures(again(**tiny_call(kind)))).max() <= 1e-5


def test_modular_saved_while_guarded_reloads_as_stock(tmp_path):
    pipe = tiny_pipeline("modular-sdxl")
    stock, kind = type(pipe), "modular-sdxl"
    plain = pictures(pipe(**tiny_call(kind)))
    again = ModularPipeline.from_pretrained(save_both(pipe, kind, tmp_path, overwrite_modular_index=True))
    again.load_components()
    assert type(again) is stock
    assert type(again.scheduler) is type(pipe.scheduler)
    assert np.abs(plain - pictures(again(**tiny_call(kind)))).max() <= 1e-5


def test_image_to_image_at_half_strength():
    pipe = AutoPipelineForImage2Image.from_pipe(tiny_pipeline("sd"))
    pipe.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    call = {**tiny_call("sd"), "num_inference_steps": 4, "image": image, "strength": 0.5}
    plain = pictures(pipe(**call))
    with attach(pipe, nothing) as trace:
        same_again = pictures(pipe(**call | {"generator": torch.Generator().manual_seed(0)}))
    assert np.array_equal(plain, same_again)
    assert len(trace.records()) == 2
    assert trace.records()[0]["sigma"] < 0.98


def test_forced_estimate_through_image_to_image(monkeypatch):
    pipe, force = AutoPipelineForImage2Image.from_pipe(tiny_pipeline("sd")), Force()
    pipe.set_progress_bar_config(disable=True)
    heard = listen(pipe, monkeypatch)
    with attach(pipe, force):
        pipe(**{**tiny_call("sd"), "num_inference_steps": 4, "image": Image.new("RGB", (16, 16)), "strength": 0.5})
    assert (heard[0][0] - force.z / 0.18215).abs().max() <= 2e-5


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_batches_with_several_pictures_per_prompt(kind):
    pipe, force = tiny_pipeline(kind), Force()
    call = {**tiny_call(kind), "prompt": ["a cat", "a dog"], "num_images_per_prompt": 2}
    if "negative_prompt" in call:
        call["negative_prompt"] = [call["negative_prompt"]] * 2
    with attach(pipe, force) as trace:
        images = pictures(pipe(**call))
    assert len(images) == 4
    assert {shape[0] for shape in force.shapes} == {4}
    assert sorted({r["sample"] for r in trace.records()}) == [0, 1, 2, 3]
    assert np.abs(images - images[:1]).max() <= 1e-5


def test_doubled_batch_of_dit_is_one_sample():
    pipe, force = tiny_pipeline("dit"), Force()
    with attach(pipe, force) as trace:
        pipe(**tiny_call("dit") | {"class_labels": [1, 2]})
    assert {shape[0] for shape in force.shapes} == {2}
    assert {r["sample"] for r in trace.records()} == {0, 1}


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "video", "modular-sdxl"])
def test_latent_output_is_the_forced_estimate(kind):
    pipe, force = tiny_pipeline(kind), Force()
    with attach(pipe, force):
        result = pipe(**tiny_call(kind) | {"output_type": "latent"})
    latents = torch.as_tensor(pictures(result))
    assert (latents[0] - force.z).abs().max() <= 2e-6


def test_guards_follow_a_scheduler_that_is_exchanged_between_calls():
    pipe, force = tiny_pipeline("sd"), Force()
    apply_guard(pipe, force)
    pipe(**tiny_call("sd"))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    result = pipe(**tiny_call("sd") | {"output_type": "latent"})
    assert (torch.as_tensor(pictures(result))[0] - force.z).abs().max() <= 2e-6


class _PrivateCopy(StableDiffusionPipeline):
    """A pipeline that samples with a scheduler of its own making."""

    def __call__(self, *args, **kwargs):
        original = self.scheduler
        object.__setattr__(self, "scheduler", DDIMScheduler.from_config(original.config))
        try:
            return super().__call__(*args, **kwargs)
        finally:
            object.__setattr__(self, "scheduler", original)


def test_a_pipeline_that_steps_a_private_scheduler_returns_no_image():
    pipe = tiny_pipeline("sd")
    private = _PrivateCopy(**pipe.components, requires_safety_checker=False)
    private.set_progress_bar_config(disable=True)
    with attach(private, nothing), pytest.raises(GuardNotApplied, match="0 calls"):
        private(**tiny_call("sd"))


def test_a_call_without_steps_returns_no_image():
    pipe = tiny_pipeline("video")
    with attach(pipe, nothing), pytest.raises(GuardNotApplied):
        pipe(**tiny_call("video") | {"num_inference_steps": 0})


def test_an_error_inside_a_call_leaves_the_scheduler_stock():
    pipe = tiny_pipeline("flux")
    stock = type(pipe.scheduler)

    def broken(denoised, state):
        raise RuntimeError("broken")

    with attach(pipe, broken), pytest.raises(RuntimeError, match="broken"):
        pipe(**tiny_call("flux"))
    assert type(pipe.scheduler) is stock
    assert pictures(pipe(**tiny_call("flux"))).shape == (1, 16, 16, 3)


def test_weights_are_the_same_for_a_kind_and_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    one, two = tiny_pipeline("sd3"), tiny_pipeline("sd3")
    assert torch.equal(before, torch.get_rng_state())
    ours, theirs = one.transformer.state_dict(), two.transformer.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_copied_pipeline_is_its_own():
    pipe = tiny_pipeline("ddim")
    apply_guard(pipe, shift)
    twin = copy.deepcopy(pipe)
    remove_guard(pipe)
    assert np.array_equal(pictures(pipe(**tiny_call("ddim"))), pictures(twin(**tiny_call("ddim"))))


def test_unknown_kind_lists_the_known_ones():
    with pytest.raises(InvalidInput, match="expected one of sd, sdxl"):
        tiny_pipeline("gan")
