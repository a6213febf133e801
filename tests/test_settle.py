"""What guards do after the last step: once, on the very sample that is decoded, or no picture at all."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForInpainting, LCMScheduler, StableDiffusionXLPipeline
from PIL import Image
from tests.matrix import CASES, FIRST, Case, Loop
from torch import Tensor

from steerclear.attach import attach
from steerclear.denoise import DenoiseState
from steerclear.errors import GuardNotApplied, InvalidInput, SampleRefused, UnsoundCombination
from steerclear.guards import chain, during, when
from steerclear.testing.pipelines import KINDS, tiny_call, tiny_pipeline

# Upstream: schedulers hand tensors to NumPy in ways it is about to drop; torchsde rounds its interval.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}")
    for what in (":FutureWarning", ":DeprecationWarning", r"Should have t[ab]:UserWarning")
]


class Settles:
    """Leaves every estimate alone, remembers what it is asked to settle, and moves it."""

    def __init__(self, move: Any = None) -> None:
        self.move, self.seen, self.states = move, [], []

    def __call__(self, denoised: Tensor, state: DenoiseState) -> None:
        return None

    def settle(self, sample: Tensor, state: DenoiseState) -> Tensor | None:
        self.seen.append(sample.clone())
        self.states.append(state)
        return None if self.move is None else self.move(sample)


def fixed(value: float) -> Settles:
    """Settles at one value: asked again, it has nothing to change."""
    return Settles(lambda x: None if bool((x == value).all()) else torch.full_like(x, value))


@pytest.mark.parametrize("case", [c for c in CASES if c.scheduler != "ScoreSdeVeScheduler"], ids=lambda c: c.name)
def test_every_scheduler_settles_its_last_sample_once(case: Case) -> None:
    loop, guard = Loop(case), Settles()
    plain = loop(FIRST)
    with attach(loop, guard):
        assert torch.equal(loop(FIRST), plain)
    assert len(guard.seen) == 1
    assert torch.equal(guard.seen[0], plain)
    state = guard.states[0]
    assert (state.progress, float(state.level.sigma), len(state.branches)) == (1.0, 0.0, 0)
    with attach(loop, fixed(0.125)):
        assert torch.equal(loop(FIRST), torch.full_like(plain, 0.125))


def test_a_scheduler_whose_result_is_not_its_sample_is_refused() -> None:
    loop = Loop(next(c for c in CASES if c.scheduler == "ScoreSdeVeScheduler"))
    with attach(loop, Settles()), pytest.raises(UnsoundCombination, match="the mean of its last step"):
        loop(FIRST)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_settled_is_what_the_pipeline_returns(kind: str) -> None:
    pipe, guard = tiny_pipeline(kind), Settles()
    call = tiny_call(kind)
    latent = call | {"output_type": "latent"} if kind not in ("dit", "ddpm", "ddim") else call
    with attach(pipe, guard):
        result = pipe(**latent)
    assert len(guard.seen) == 1
    returned = np.asarray(getattr(result, "frames", None) if hasattr(result, "frames") else _images(result))
    if kind in ("ddpm", "ddim"):
        expected = (guard.seen[0] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    elif kind == "dit":
        return  # it always decodes: the comparison at its decoder's door is the test
    else:
        expected = guard.seen[0].numpy()
    assert np.abs(returned - expected).max() <= 1e-6


def _images(result: Any) -> Any:
    return getattr(result, "images", result)


@pytest.mark.parametrize("kind", KINDS)
def test_a_settled_sample_reaches_the_picture_and_none_leaves_it_bit_identical(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    plain = _picture(pipe(**tiny_call(kind)))
    with attach(pipe, Settles()):
        assert np.array_equal(_picture(pipe(**tiny_call(kind))), plain)
    with attach(pipe, fixed(0.25)) as trace:
        moved = _picture(pipe(**tiny_call(kind)))
        assert np.array_equal(
            moved, _picture(pipe(**tiny_call(kind) | {"generator": torch.Generator().manual_seed(9)}))
        )
    assert not np.array_equal(moved, plain)
    assert trace.steps == 6


def _picture(result: Any) -> Any:
    return np.asarray(result.frames if hasattr(result, "frames") else _images(result))


def test_a_doubled_batch_is_settled_as_its_samples() -> None:
    pipe, guard = tiny_pipeline("dit"), fixed(0.5)
    with attach(pipe, guard):
        pipe(**tiny_call("dit") | {"class_labels": [1, 2, 3]})
    assert guard.seen[0].shape[0] == 3


def test_consistency_models_decode_the_second_of_two_results_and_both_are_settled() -> None:
    scheduler = LCMScheduler()

    class Second:
        components = {"scheduler": scheduler}  # noqa: RUF012

        def __call__(self) -> Tensor:
            scheduler.set_timesteps(3)
            x, generator = torch.ones(1, 4, 2, 2), torch.Generator().manual_seed(0)
            for t in scheduler.timesteps:
                result = scheduler.step(0.1 * x, t, x, generator=generator)
                x = result.prev_sample
            return result.denoised

    loop = Second()
    with attach(loop, fixed(0.5)):
        assert torch.equal(loop(), torch.full((1, 4, 2, 2), 0.5))


def test_a_pipeline_that_stops_early_returns_no_image() -> None:
    pipe: StableDiffusionXLPipeline = tiny_pipeline("sdxl")
    call = tiny_call("sdxl") | {"num_inference_steps": 10, "denoising_end": 0.5, "output_type": "latent"}
    with attach(pipe, Settles()), pytest.raises(GuardNotApplied, match="do not end with the schedule's last step"):
        pipe(**call)
    with attach(pipe, during(Settles(), stop=0.4)):
        pipe(**call)  # a window that ends before promises nothing


def test_a_callback_that_changes_latents_afterwards_returns_no_image() -> None:
    pipe = tiny_pipeline("sd")
    after = {"callback_on_step_end": lambda pipe, step, t, given: {"latents": given["latents"] + 0.1}}
    with attach(pipe, Settles()), pytest.raises(GuardNotApplied, match="changed it after the last step"):
        pipe(**tiny_call("sd") | after)
    with attach(pipe, Settles()):
        pipe(**tiny_call("sd") | {"callback_on_step_end": lambda pipe, step, t, given: given})


def test_a_mask_blended_in_after_the_last_step_returns_no_image() -> None:
    pipe = AutoPipelineForInpainting.from_pipe(tiny_pipeline("sd"))
    pipe.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    mask = Image.fromarray(np.pad(np.full((16, 8), 255, np.uint8), ((0, 0), (0, 8))))
    call = {**tiny_call("sd"), "num_inference_steps": 4, "image": image, "mask_image": mask}
    with attach(pipe, fixed(0.5)), pytest.raises(GuardNotApplied, match="a mask, a callback"):
        pipe(**call)


def test_combinators_forward_what_settles_and_nothing_else() -> None:
    pipe, inside, outside, gated = tiny_pipeline("sd"), Settles(), Settles(), Settles()
    guard = chain(during(inside, start=0.5), during(outside, stop=0.5), when(lambda s: s.x_t[:, 0, 0, 0] > 9, gated))
    with attach(pipe, guard):
        pipe(**tiny_call("sd"))
    assert [len(each.seen) for each in (inside, outside, gated)] == [1, 0, 1]


def test_guards_settle_until_they_agree_or_refuse() -> None:
    pipe = tiny_pipeline("sd")
    up = Settles(lambda x: torch.where(x < 1.0, 1.0, x) if bool((x < 1.0).any()) else None)
    down = Settles(lambda x: torch.where(x > 2.0, 2.0, x) if bool((x > 2.0).any()) else None)
    with attach(pipe, up), attach(pipe, chain(down)):
        latents = pipe(**tiny_call("sd") | {"output_type": "latent"}).images
    assert float(latents.min()) >= 1.0
    assert float(latents.max()) <= 2.0
    with attach(pipe, fixed(1.0), fixed(2.0)), pytest.raises(SampleRefused, match="undoing the other"):
        pipe(**tiny_call("sd"))


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (lambda x: x.double(), "expected shape, dtype and device"),
        (lambda x: x * float("nan"), "expected finite values from settle"),
        (lambda x: x.mul_(2.0), "got it changed in place"),
    ],
)
def test_what_a_guard_settles_is_checked(move: Any, message: str) -> None:
    pipe = tiny_pipeline("sd")
    with attach(pipe, Settles(move)), pytest.raises(InvalidInput, match=message):
        pipe(**tiny_call("sd"))
