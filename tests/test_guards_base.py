"""The three ways to combine guards: a monoid, a window, a gate per sample."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerclear.denoise import DenoiseState, GuardedDenoiser
from steerclear.errors import InvalidInput
from steerclear.guards import Guard, Requires, chain, during, requirements, when
from steerclear.noise import NoiseLevel

NO_NEEDS = Requires()


@dataclass(frozen=True)
class Affine:
    """x -> scale·x + shift; exact in float32 for the small integers used here."""

    scale: int
    shift: int
    requires: Requires = NO_NEEDS

    def __call__(self, denoised: torch.Tensor, state: DenoiseState) -> torch.Tensor:
        return self.scale * denoised + self.shift


class Nothing:
    """Has nothing to do."""

    def __call__(self, denoised: torch.Tensor, state: DenoiseState) -> None:
        return None


guards = st.one_of(st.builds(Affine, st.integers(-2, 2), st.integers(-3, 3)), st.just(Nothing()))
batches = st.integers(1, 4).flatmap(
    lambda b: st.lists(st.integers(-4, 4), min_size=2 * b, max_size=2 * b).map(
        lambda values: torch.tensor(values, dtype=torch.float32).reshape(-1, 2)
    )
)


def state(x: torch.Tensor, step: int = 0, num_steps: int = 10) -> DenoiseState:
    return DenoiseState(x_t=x, level=NoiseLevel(0.6, 0.8), step=step, num_steps=num_steps)


def apply(guard: Guard, x: torch.Tensor, step: int = 0) -> torch.Tensor:
    before = x.clone()
    guarded = guard(x, state(x, step))
    assert torch.equal(x, before)  # nothing in place
    return x if guarded is None else guarded


@given(guards, guards, guards, batches)
def test_chain_is_a_monoid_and_runs_left_to_right(a: Guard, b: Guard, c: Guard, x: torch.Tensor) -> None:
    assert chain()(x, state(x)) is None
    assert chain(Nothing(), chain())(x, state(x)) is None
    by_hand = apply(c, apply(b, apply(a, x)))
    for same in (chain(a, b, c), chain(chain(a, b), c), chain(a, chain(b, c)), chain(chain(), a, b, c, chain())):
        assert torch.equal(apply(same, x), by_hand)


@given(guards, batches, st.integers(0, 9), st.integers(0, 9), st.integers(1, 10))
def test_a_window_is_half_open_in_fractions(guard: Guard, x: torch.Tensor, step: int, start: int, stop: int) -> None:
    if not start < stop:
        with pytest.raises(InvalidInput, match="start < stop"):
            during(guard, start=start / 10, stop=stop / 10)
        return
    windowed = during(guard, start=start / 10, stop=stop / 10)
    assert torch.equal(apply(windowed, x, step), apply(guard, x, step) if start <= step < stop else x)
    assert torch.equal(apply(during(guard), x, step), apply(guard, x, step))


@given(guards, batches, st.data())
def test_a_gate_acts_on_its_samples_only(guard: Guard, x: torch.Tensor, data: st.DataObject) -> None:
    gate = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x))))
    gated = apply(when(lambda _: gate, guard), x)
    full = apply(guard, x)
    assert torch.equal(gated[gate], full[gate])
    assert torch.equal(gated[~gate], x[~gate])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_combinations_keep_the_dtype(dtype: torch.dtype) -> None:
    x = torch.ones(3, 2, 2, dtype=dtype)
    guard = when(lambda s: torch.tensor([True, False, True]), during(chain(Affine(2, 1), Affine(1, 1)), stop=0.5))
    assert apply(guard, x).dtype == dtype
    assert apply(guard, x)[:, 0, 0].tolist() == [4.0, 1.0, 4.0]


def test_the_gated_guard_still_runs_so_that_its_memory_stays_whole() -> None:
    seen: list[int] = []

    def count(denoised: torch.Tensor, state: DenoiseState) -> torch.Tensor:
        seen.append(state.step)
        return denoised + 1

    x = torch.zeros(2, 1)
    assert torch.equal(apply(when(lambda _: torch.tensor([False, False]), count), x), x)
    assert seen == [0]


def test_requirements_add_up_through_every_combination() -> None:
    one, two = Affine(1, 0, Requires(stochastic=True)), Affine(1, 0, Requires(branches=True, one_call=True))
    assert requirements(chain(one, during(two), Nothing())) == Requires(stochastic=True, branches=True, one_call=True)
    assert requirements(when(lambda _: torch.tensor([True]), one)) == Requires(stochastic=True)
    assert requirements(Nothing()) == Requires()


@pytest.mark.parametrize(("start", "stop"), [(0.6, 0.4), (-0.1, 0.5), (0.0, 1.1), (0.5, 0.5)])
def test_windows_outside_the_trajectory_are_refused(start: float, stop: float) -> None:
    with pytest.raises(InvalidInput, match=rf"during: expected 0 <= start < stop <= 1, got start={start}, stop={stop}"):
        during(Nothing(), start=start, stop=stop)


def test_a_guarded_denoiser_is_a_denoiser() -> None:
    def denoiser(x_t: torch.Tensor, level: NoiseLevel, condition: object = None) -> torch.Tensor:
        return level.alpha * x_t

    x, level = torch.ones(2, 3), NoiseLevel(0.5, 0.5)
    once = GuardedDenoiser(denoiser=denoiser, guard=Affine(2, 1))
    assert torch.equal(once(x, level), torch.full((2, 3), 2.0))
    twice = GuardedDenoiser(denoiser=once, guard=Affine(3, 0))
    assert torch.equal(twice(x, level), torch.full((2, 3), 6.0))
    assert torch.equal(GuardedDenoiser(denoiser=denoiser, guard=Nothing())(x, level), denoiser(x, level))
