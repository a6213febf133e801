"""All schedulers × prediction types × variants: the identity is bit-exact, and a guarded network is another network."""

import importlib
import inspect
import pkgutil
from typing import Any

import diffusers.schedulers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from tests.matrix import CASES, FIRST, SECOND, Case, Loop
from torch import Tensor

from steerclear.attach import attach
from steerclear.attach.readers import READERS, UNSUPPORTED, reader_of
from steerclear.denoise import DenoiseState
from steerclear.errors import UnsupportedScheduler

# Upstream: schedulers hand tensors to NumPy in ways it is about to drop; torchsde rounds its interval.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}")
    for what in (":FutureWarning", ":DeprecationWarning", r"Should have t[ab]:UserWarning")
]


def swap(denoised: Tensor, state: DenoiseState) -> Tensor:
    return SECOND(state.x_t.double(), state.level.alpha, state.level.sigma).float()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_guarded_network_is_the_other_network_and_the_identity_is_bit_exact(case: Case) -> None:
    loop = Loop(case)
    plain = loop(FIRST)
    assert plain.isfinite().all()
    errors: list[float] = []

    def nothing(denoised: Tensor, state: DenoiseState) -> None:
        exact = FIRST(state.x_t.double(), state.level.alpha, state.level.sigma)
        errors.append(float((denoised - exact).abs().max()))

    with attach(loop, nothing) as trace:
        assert torch.equal(loop(FIRST), plain)
    assert trace.steps == case.calls
    assert max(errors) <= case.estimate
    with attach(loop, lambda denoised, state: denoised.clone()):
        assert torch.equal(loop(FIRST), plain)
    with attach(loop, swap):
        error = (loop(FIRST) - Loop(case)(SECOND)).abs().max() / SECOND.std
    assert error <= case.swap


def test_there_are_120_cases() -> None:
    assert len(CASES) == 120
    assert len({case.name for case in CASES}) == 120


def scheduler_classes() -> dict[str, Any]:
    found: dict[str, Any] = {}
    package = diffusers.schedulers
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        found |= {
            name: value
            for name, value in vars(importlib.import_module(info.name)).items()
            if inspect.isclass(value) and issubclass(value, SchedulerMixin) and value.__module__ == info.name
        }
    found.pop("SchedulerMixin", None)
    return found


def test_every_scheduler_class_of_diffusers_is_in_exactly_one_table() -> None:
    found = set(scheduler_classes())
    assert len(found) == 51
    assert found - READERS.keys() - UNSUPPORTED.keys() == set(), "new schedulers: add a reader, or a reason"
    assert (READERS.keys() | UNSUPPORTED.keys()) - found == set(), "schedulers that diffusers no longer has"
    assert not READERS.keys() & UNSUPPORTED.keys()


def test_every_reader_is_covered_by_a_case() -> None:
    assert READERS.keys() == {case.scheduler for case in CASES}


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_an_unsupported_scheduler_is_refused_with_the_reason(name: str) -> None:
    scheduler = object.__new__(scheduler_classes()[name])
    with pytest.raises(UnsupportedScheduler, match=name) as error:
        reader_of(scheduler)
    assert UNSUPPORTED[name] in str(error.value)


def test_a_users_subclass_is_read_like_its_base() -> None:
    class Mine(diffusers.DDIMScheduler):
        pass

    assert reader_of(Mine()) is READERS["DDIMScheduler"]


def test_an_unknown_scheduler_is_refused_before_sampling() -> None:
    class Unknown:
        pass

    with pytest.raises(UnsupportedScheduler, match=r"expected one of the 44 .* got Unknown\. Set one"):
        reader_of(Unknown())
