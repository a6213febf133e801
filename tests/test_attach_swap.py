"""The class swap leaves everything else as it was, and nothing gets past the guards unnoticed."""

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, EulerDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor

import steerclear.attach
from steerclear.attach import apply_guard, attach, remove_guard
from steerclear.denoise import DenoiseState
from steerclear.errors import (
    GuardNotApplied,
    InvalidInput,
    UnsoundCombination,
    UnsupportedPipeline,
    UnsupportedScheduler,
)
from steerclear.guards.base import Requires
from steerclear.testing.pipelines import tiny_call, tiny_pipeline

# Upstream: schedulers hand tensors to NumPy in a way it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Loop:
    """A pipeline that only steps; ``inside`` runs before each step."""

    def __init__(self, scheduler: Any, inside: Any = None) -> None:
        self.scheduler, self.inside = scheduler, inside

    @property
    def components(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler}

    def __call__(self, steps: int = 4, rows: int = 2) -> Tensor:
        self.scheduler.set_timesteps(steps)
        x = torch.randn(rows, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        for t in self.scheduler.timesteps:
            self.scheduler.scale_model_input(x, t)
            step = self.inside(self) if self.inside else self.scheduler.step
            x = step(0.5 * x, t, x, return_dict=False)[0]
        return x


def nothing(denoised: Tensor, state: DenoiseState) -> None:
    return None


def shift(denoised: Tensor, state: DenoiseState) -> Tensor:
    return denoised + 0.1


def peek(scheduler_class: type, look: Any) -> list[Any]:
    seen: list[Any] = []

    def inside(loop: Loop) -> Any:
        seen.append(look(loop.scheduler))
        return loop.scheduler.step

    loop = Loop(scheduler_class(), inside)
    with attach(loop, nothing):
        loop()
    assert type(loop.scheduler) is scheduler_class
    return seen


def test_the_swapped_scheduler_looks_like_the_stock_one() -> None:
    names = peek(DDIMScheduler, lambda s: (type(s).__name__, type(s).__qualname__, type(s).__module__))
    assert set(names) == {("DDIMScheduler", "DDIMScheduler", DDIMScheduler.__module__)}
    assert all(peek(DDIMScheduler, lambda s: isinstance(s, DDIMScheduler)))
    signature = inspect.signature(DDIMScheduler().step)
    assert all(peek(DDIMScheduler, lambda s: inspect.signature(s.step) == signature))


def test_pickle_and_from_config_give_stock_schedulers() -> None:
    pickled = peek(DDIMScheduler, lambda s: type(pickle.loads(pickle.dumps(s))))  # noqa: S301 - our own bytes
    assert set(pickled) == {DDIMScheduler}
    assert set(peek(DDIMScheduler, lambda s: type(type(s).from_config(s.config)))) == {DDIMScheduler}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy])
def test_copies_are_flagged_skipped_and_stock_again_afterwards(duplicate: Any) -> None:
    kept: list[Any] = []

    def inside(loop: Loop) -> Any:
        if not kept:
            kept.append(duplicate(loop.scheduler))
            x = torch.zeros(2, 4, 3, 3)
            kept[0].step(x, loop.scheduler.timesteps[0], x)
        return loop.scheduler.step

    loop = Loop(DDIMScheduler(), inside)
    with attach(loop, shift) as trace:
        loop()
    skipped = [record.skipped for record in trace.calls[0].steps]
    assert [reason is not None and "copy" in reason for reason in skipped] == [True, False, False, False, False]
    assert type(kept[0]) is DDIMScheduler


def test_a_loop_that_steps_only_a_copy_is_refused() -> None:
    loop = Loop(EulerDiscreteScheduler())
    loop.inside = lambda loop: copy.deepcopy(loop.scheduler).step
    with attach(loop, nothing), pytest.raises(GuardNotApplied, match="all 4 steps were skipped"):
        loop()


def test_a_loop_that_never_steps_is_refused() -> None:
    loop = Loop(DDIMScheduler())
    loop.inside = lambda loop: DDIMScheduler.from_config(loop.scheduler.config).step
    other = DDIMScheduler()
    other.set_timesteps(4)
    loop.inside = lambda loop: other.step
    with attach(loop, nothing), pytest.raises(GuardNotApplied, match=r"0 calls in 4 steps.*No image is returned"):
        loop()


def test_a_step_behind_the_guards_back_is_refused() -> None:
    loop = Loop(EulerDiscreteScheduler())
    calls: list[int] = []

    def inside(loop: Loop) -> Any:
        calls.append(1)
        return (
            loop.scheduler.step
            if len(calls) != 2
            else lambda *a, **k: EulerDiscreteScheduler.step(loop.scheduler, *a, **k)
        )

    loop.inside = inside
    with attach(loop, nothing), pytest.raises(GuardNotApplied, match=r"1 steps .* behind the guard's back"):
        loop()


def test_a_scheduler_replaced_during_the_call_is_refused() -> None:
    def inside(loop: Loop) -> Any:
        step = loop.scheduler.step
        loop.scheduler = copy.copy(loop.scheduler)
        return step

    loop = Loop(DDIMScheduler(), inside)
    with attach(loop, nothing), pytest.raises(GuardNotApplied):
        loop()


def test_unsupported_schedulers_and_pipelines_are_refused_on_attaching() -> None:
    with pytest.raises(UnsupportedScheduler), attach(Loop(object()), nothing):
        pass
    with pytest.raises(UnsupportedPipeline, match="component 'scheduler'"), attach(object(), nothing):
        pass
    with pytest.raises(InvalidInput, match="one of score, sample, renoise"):
        apply_guard(Loop(DDIMScheduler()), nothing, coupling="both")  # pyright: ignore[reportArgumentType]


BAD: dict[str, Any] = {
    "shape": (lambda d, s: d[:1], "expected shape"),
    "dtype": (lambda d, s: d.double(), "float64"),
    "type": (lambda d, s: 1.0, "expected a tensor or None, got float"),
    "nan": (lambda d, s: torch.where(torch.tensor([False, True]).view(2, 1, 1, 1), torch.nan, d), r"samples \[1\]"),
    "in place": (lambda d, s: d.add_(1.0), "changed in place"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_guard_that_returns_nonsense_is_named(name: str) -> None:
    guard, message = BAD[name]
    loop = Loop(EulerDiscreteScheduler())
    with attach(loop, guard), pytest.raises(InvalidInput, match=message):
        loop()
    assert type(loop.scheduler) is EulerDiscreteScheduler


def test_an_exception_restores_everything() -> None:
    def fail(denoised: Tensor, state: DenoiseState) -> None:
        raise KeyError("mine")

    loop = Loop(DDIMScheduler())
    with pytest.raises(KeyError, match="mine"), attach(loop, fail):
        loop()
    assert type(loop.scheduler) is DDIMScheduler
    assert type(loop) is Loop


def test_nested_guards_act_outer_first() -> None:
    order: list[str] = []

    def say(name: str) -> Any:
        return lambda denoised, state: order.append(name)

    loop = Loop(DDIMScheduler())
    with attach(loop, say("a"), say("b")):
        with attach(loop, say("c")):
            loop(steps=1)
        loop(steps=1)
    assert order == ["a", "b", "c", "a", "b"]
    assert type(loop) is Loop


def test_the_inner_guard_sees_what_the_outer_one_made() -> None:
    loop = Loop(DDIMScheduler(clip_sample=False))
    seen: list[Tensor] = []
    with attach(loop, lambda d, s: torch.ones_like(d)), attach(loop, lambda d, s: seen.append(d)):
        loop(steps=2)
    for denoised in seen:  # (alpha + sigma) eps / alpha up to 1e-6: alpha is 0.5 and more here
        torch.testing.assert_close(denoised, torch.ones_like(denoised), atol=1e-5, rtol=0)


class NeedsNoise:
    requires = Requires(stochastic=True)

    def __call__(self, denoised: Tensor, state: DenoiseState) -> None:
        assert state.eta


class NeedsOneCall(NeedsNoise):
    requires = Requires(one_call=True)


def test_unsound_combinations_name_sound_ones() -> None:
    loop = Loop(DDIMScheduler())
    with attach(loop, NeedsNoise()), pytest.raises(UnsoundCombination, match=r"eta=0.*DDPMScheduler"):
        loop()
    with attach(Loop(DDPMScheduler()), NeedsNoise()):
        pass
    with pytest.raises(UnsoundCombination, match=r"HeunDiscreteScheduler.*Use DDPMScheduler"):
        apply_guard(Loop(HeunDiscreteScheduler()), NeedsOneCall())


def test_the_package_is_callable_like_its_function() -> None:
    loop = Loop(DDIMScheduler())
    with steerclear.attach(loop, nothing) as trace:
        loop()
    assert trace.steps == 4


def test_a_standing_guard_on_a_real_pipeline(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    stock, call = type(pipe), tiny_call("sd")
    trace = apply_guard(pipe, shift)
    assert type(pipe).__name__ == stock.__name__
    assert inspect.signature(type(pipe).__call__) == inspect.signature(stock.__call__)
    pipe(**call)
    assert len(trace.calls) == 1
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe(**call)
    assert len(trace.calls) == 2
    assert type(pipe.scheduler) is DDIMScheduler
    assert type(type(pipe).from_pipe(pipe)) is stock
    assert type(copy.copy(pipe)) is stock
    pipe.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is stock
    remove_guard(pipe)
    assert type(pipe) is stock
    pipe(**call)
    assert len(trace.calls) == 2


def test_prompt_guards_rewrite_the_call() -> None:
    loop = Loop(DDIMScheduler())
    with attach(loop, nothing, prompts=lambda pipe, call: call | {"steps": 2}) as trace:
        loop(3)
    assert trace.steps == 2
