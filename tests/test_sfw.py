"""The SFW sampler against closed forms and diffusers' own step: a linear toy, call counts, identities, independence."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import steerclear
from steerclear.attach import decoder_of
from steerclear.denoise import DenoiseState
from steerclear.errors import InvalidInput
from steerclear.guards import SFW
from steerclear.guards.sfw import FLOOR
from steerclear.noise import NoiseLevel
from steerclear.testing.pipelines import tiny_call, tiny_pipeline

SHAPE = (4, 3, 3)


def state(x: Tensor, notes: dict | None = None) -> DenoiseState:
    keep = {} if notes is None else {"note": notes.__setitem__}
    return DenoiseState(x_t=x, level=NoiseLevel(0.8, 0.6), step=0, num_steps=4, **keep)


@dataclass
class Linear:
    """Scores ⟨w_i, y⟩ of whatever is decoded."""

    w: Tensor  # (columns, elements)
    calls: int = 0

    @property
    def columns(self) -> int:
        return len(self.w)

    def __call__(self, pictures: Tensor) -> Tensor:
        self.calls += 1
        return pictures.flatten(1) @ self.w.to(pictures.dtype).T


def linear(columns: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Linear:
    w = torch.randn(columns, math.prod(SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Linear(w.to(dtype))


def draw(n: int = 4, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same(x: Tensor) -> Tensor:
    return x


def expected(x: Tensor, w: Tensor, gamma: float, eta: float, k: int) -> np.ndarray:
    """Equations 2 to 6 in NumPy float64: for a linear score the slope of log q_i is w_i / q_i."""
    rows, weights = x.double().flatten(1).numpy(), w.double().numpy()
    out = rows.copy()
    for b, row in enumerate(rows):
        q = weights @ row
        if q.max() > eta:
            for i in np.argsort(-q)[:k]:
                if q[i] > FLOOR:
                    out[b] -= gamma * weights[i] / q[i]
    return out.reshape(x.shape)


# -- the equations ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.floats(-2.0, 4.0), st.floats(0.01, 5.0), st.integers(0, 1000))
def test_the_estimate_moves_as_the_equations_say(k: int, eta: float, gamma: float, seed: int) -> None:
    x, score = draw(seed=seed), linear(seed=seed + 1)
    guarded = SFW(decode=same, score=score, strength=gamma, threshold=eta, top_k=k)(x, state(x))
    got = x if guarded is None else guarded
    np.testing.assert_allclose(got.numpy(), expected(x, score.w, gamma, eta, k), rtol=1e-9, atol=1e-9)


def test_one_ddim_step_is_the_plain_one_minus_alpha_gamma_w_over_q() -> None:
    """Conformance (b): through a real pipeline and diffusers' own DDIM, under coupling="sample"."""
    pipe = tiny_pipeline("sd")
    w = torch.randn(1, 4 * 8 * 8, generator=torch.Generator().manual_seed(3)).abs()
    seen: list[Tensor] = []

    class Positive(Linear):
        def __call__(self, pictures: Tensor) -> Tensor:
            seen.append(pictures.detach().clone())
            return super().__call__(pictures.abs())

    gamma = 0.3
    guard = SFW(decode=same, score=Positive(w), strength=gamma, threshold=0.0)
    call = {**tiny_call("sd"), "num_inference_steps": 1, "output_type": "latent"}
    plain = pipe(**call).images
    call["generator"] = torch.Generator().manual_seed(0)
    with steerclear.attach(pipe, guard, coupling="sample"):
        moved = pipe(**call).images
    (estimate,) = seen
    scheduler = pipe.scheduler
    before = scheduler.timesteps[0] - scheduler.config.num_train_timesteps
    product = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
    q = (w * estimate.flatten(1).abs()).sum()
    slope = (w.view_as(estimate[0]) * estimate.sign()) / q
    torch.testing.assert_close(moved, plain - product.sqrt() * gamma * slope, rtol=1e-4, atol=1e-4)


def test_every_step_of_a_ddim_trajectory_agrees_with_the_published_loop() -> None:
    """The published step, x_s = a_s (x̂ − γ m g) + s_s ε̂ with the uncorrected ε̂, typed once more around the network."""
    pipe = tiny_pipeline("sd")
    w = torch.randn(1, 4 * 8 * 8, generator=torch.Generator().manual_seed(3))
    gamma, eta, steps = 0.5, 0.0, 5
    guard = SFW(decode=same, score=Linear(w), strength=gamma, threshold=eta)
    call = {**tiny_call("sd"), "num_inference_steps": steps, "output_type": "latent"}
    with steerclear.attach(pipe, guard, coupling="sample") as trace:
        got = pipe(**call).images
    assert any(bool(record.fired.any()) for record in trace.calls[0].steps)

    outputs: list[Tensor] = []
    scheduler = pipe.scheduler
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompt, empty = pipe.encode_prompt("a cat", "cpu", 1, True)
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([empty, prompt])).sample
            without, given_prompt = out.chunk(2)
            epsilon = without + 3.0 * (given_prompt - without)
            product = scheduler.alphas_cumprod[t]
            later = t - scheduler.config.num_train_timesteps // steps
            after = scheduler.alphas_cumprod[later] if later >= 0 else scheduler.final_alpha_cumprod
            clean = (x - (1 - product).sqrt() * epsilon) / product.sqrt()
            q = (clean.flatten(1) @ w.T).item()
            if q > eta:
                clean = clean - gamma * w.view_as(clean) / max(q, FLOOR)
            x = after.sqrt() * clean + (1 - after).sqrt() * epsilon
            outputs.append(x)
    torch.testing.assert_close(got, outputs[-1], rtol=1e-3, atol=1e-3)


# -- identities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"strength": 0.0}, {"threshold": math.inf}], ids=str)
@pytest.mark.parametrize("coupling", ["score", "sample"])
def test_a_neutral_guard_is_the_plain_pipeline_bit_for_bit(settings: dict, coupling: str) -> None:
    """Conformance (a)."""
    pipe = tiny_pipeline("sd")
    plain = pipe(**tiny_call("sd")).images
    guard = SFW(decode=decoder_of(pipe), score=Means(2), **{"threshold": 0.0, **settings})
    with steerclear.attach(pipe, guard, coupling=coupling) as trace:  # type: ignore[arg-type]
        assert np.array_equal(pipe(**tiny_call("sd")).images, plain)
    assert all(bool((record.notes["score"] > 0).all()) for record in trace.calls[0].steps)


def test_samples_behind_a_closed_gate_keep_their_bits() -> None:
    x, score = draw(8, dtype=torch.float32), linear(1)
    q = score(x).squeeze(1)
    eta = float(q.sort().values[4])
    guarded = SFW(decode=same, score=score, threshold=eta)(x, state(x))
    assert guarded is not None
    moved = (guarded != x).flatten(1).any(1)
    assert torch.equal(moved, q > eta)
    assert moved.any()
    assert not moved.all()


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_changing_one_sample_never_changes_another(at_once: int) -> None:
    """Conformance (c), with the decoder and a convolution in the way."""
    pipe = tiny_pipeline("sd")
    decode = decoder_of(pipe)
    guard = SFW(decode=decode, score=Means(2), threshold=0.0, at_once=at_once)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    other = x.clone()
    other[1] = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(9))
    one, two = guard(x, state(x)), guard(other, state(other))
    assert one is not None
    assert two is not None
    assert torch.equal(one[[0, 2]], two[[0, 2]])
    assert not torch.equal(one[1], two[1])


def test_the_parts_of_a_batch_agree_with_the_whole() -> None:
    x, score = draw(5), linear()
    whole, parts = (SFW(decode=same, score=score, threshold=0.5, at_once=n)(x, state(x)) for n in (5, 2))
    torch.testing.assert_close(whole, parts)


# -- what it costs -----------------------------------------------------------------------------------------------------


@dataclass
class Means:
    """Scores in (0, 1): brightness of the picture's halves, so that both gates and slopes are real."""

    columns: int
    calls: int = 0

    def __call__(self, pictures: Tensor) -> Tensor:
        self.calls += 1
        half = pictures.shape[-1] // 2
        return torch.stack([pictures[..., :half].mean((1, 2, 3)), pictures[..., half:].mean((1, 2, 3))], 1)


@dataclass
class Counted:
    """Counts forward and backward passes of a decoder."""

    inner: Callable[[Tensor], Tensor]
    forward: int = 0
    backward: list[int] = field(default_factory=list)

    def __call__(self, x: Tensor) -> Tensor:
        self.forward += 1
        if x.requires_grad:
            x.register_hook(lambda grad: self.backward.append(len(grad)))
        return self.inner(x)


@pytest.mark.parametrize(("eta", "backward"), [(0.0, 3), (math.inf, 0)])
def test_calls_of_network_decoder_and_backward(eta: float, backward: int) -> None:
    """Conformance (d), and no backward pass where every gate is closed."""
    pipe = tiny_pipeline("sd")
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    pipe(**tiny_call("sd"))
    plain = len(calls)
    decode = Counted(decoder_of(pipe))
    calls.clear()
    score = Means(2)
    with steerclear.attach(pipe, SFW(decode=decode, score=score, threshold=eta), coupling="sample") as trace:
        pipe(**tiny_call("sd"))
    assert len(calls) == plain
    assert trace.calls[0].extra_evaluations == 0
    assert decode.forward == score.calls == 3
    assert len(decode.backward) == backward


def test_a_closed_gate_in_every_part_saves_its_backward_pass() -> None:
    x = draw(4)
    score = linear(1)
    q = score(x).squeeze(1)
    decode = Counted(same)
    between = float(q.sort().values[-2:].mean())
    SFW(decode=decode, score=score, threshold=between, at_once=1)(x, state(x))
    assert decode.forward == 4
    assert decode.backward == [1]


def test_gradients_stay_switched_off_around_it_and_weights_get_none() -> None:
    pipe = tiny_pipeline("sd")
    guard = SFW(decode=decoder_of(pipe), score=Means(2), threshold=0.0)
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        guarded = guard(x, state(x))
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        again = guard(x.clone(), state(x))
        assert torch.is_inference_mode_enabled()
    assert guarded is not None
    assert again is not None
    assert torch.equal(guarded, again)
    assert not guarded.requires_grad
    assert all(p.grad is None and p.requires_grad for p in pipe.vae.parameters())


# -- numbers at the edge -----------------------------------------------------------------------------------------------


def test_negative_scores_have_no_slope_and_give_no_nan() -> None:
    x = draw(6, dtype=torch.float32)
    score = linear(3)
    guarded = SFW(decode=same, score=score, threshold=-100.0, top_k=3, strength=1.0)(x, state(x))
    assert guarded is not None
    assert guarded.isfinite().all()
    assert (score(x) < 0).any()
    np.testing.assert_allclose(guarded.numpy(), expected(x, score.w, 1.0, -100.0, 3), rtol=1e-4, atol=1e-4)


def test_nan_is_never_nothing_to_do() -> None:
    x = draw(3)
    x[1] = torch.nan
    guarded = SFW(decode=same, score=linear(), threshold=100.0)(x, state(x))
    assert guarded is not None
    assert guarded[1].isnan().all()
    assert torch.equal(guarded[[0, 2]], x[[0, 2]])

    broken = linear()
    broken.w[0] = torch.nan
    x = draw(2)
    guarded = SFW(decode=same, score=broken, threshold=100.0)(x, state(x))
    assert guarded is not None
    assert guarded.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_callers_dtype_comes_back(dtype: torch.dtype) -> None:
    x = draw(dtype=dtype)
    guarded = SFW(decode=same, score=linear(dtype=torch.float32), strength=0.5, threshold=0.1)(x, state(x))
    assert guarded is not None
    assert guarded.dtype == dtype
    assert guarded.shape == x.shape


def test_the_note_is_the_highest_score() -> None:
    x, score, notes = draw(), linear(), {}
    SFW(decode=same, score=score, threshold=100.0)(x, state(x, notes))
    torch.testing.assert_close(notes["score"], score(x).amax(1))


def test_what_it_refuses() -> None:
    def refused(match: str, **settings: object) -> None:
        with pytest.raises(InvalidInput, match=match):
            SFW(**{"decode": same, "score": linear(3), **settings})  # type: ignore[arg-type]

    refused("top_k in 1 … 3", top_k=4)
    refused("top_k in 1 … 3", top_k=0)
    refused("matching score has one column", score=linear(1), top_k=2)
    refused("strength >= 0", strength=-1.0)
    refused("strength >= 0", strength=math.inf)
    refused("got NaN", threshold=math.nan)
    refused("at_once", at_once=0)
    refused("callable decode", decode=None)
    refused("score with columns", score=lambda x: x)
    x = draw()
    with pytest.raises(InvalidInput, match=r"scores of shape \(4, 3\)"):
        SFW(decode=lambda x: x[:2], score=linear(3))(x, state(x))


def test_the_published_settings() -> None:
    guard = SFW.published(same, linear())
    assert (guard.strength, guard.threshold, guard.top_k) == (75.0, 0.23, 1)


# -- pipelines ---------------------------------------------------------------------------------------------------------

SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    HeunDiscreteScheduler,
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_it_darkens_pictures_under_any_scheduler(scheduler: type) -> None:
    pipe = tiny_pipeline("sd")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    call = {**tiny_call("sd"), "num_inference_steps": 4}
    plain = pipe(**call).images
    guard = SFW(decode=decoder_of(pipe), score=Means(2), strength=20.0, threshold=0.0, top_k=2)
    call["generator"] = torch.Generator().manual_seed(0)
    with steerclear.attach(pipe, guard, coupling="sample") as trace:
        guarded = pipe(**call).images
    assert guarded.mean() < plain.mean()
    assert all(bool(record.fired.all()) for record in trace.calls[0].steps)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux", "dit", "ddpm", "ddim"])
def test_other_families(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    size = {name: value for name, value in tiny_call(kind).items() if name in ("height", "width")}
    guard = SFW(decode=decoder_of(pipe, **size), score=Means(2), strength=20.0, threshold=0.0, top_k=2)
    plain = pipe(**tiny_call(kind)).images
    with steerclear.attach(pipe, guard, coupling="sample") as trace:
        guarded = pipe(**tiny_call(kind)).images
    assert np.asarray(guarded).mean() < np.asarray(plain).mean()
    assert trace.calls[0].steps
