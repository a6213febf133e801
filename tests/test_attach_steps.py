"""One step at a time: couplings, clipping, precision, skipped steps, and what a guard is told."""

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
)
from torch import Tensor

from steerclear.attach import Trace, attach
from steerclear.denoise import DenoiseState
from steerclear.errors import GuardNotApplied, InvalidInput
from steerclear.testing.pipelines import tiny_call, tiny_pipeline

# Upstream: schedulers hand tensors to NumPy in a way it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SHAPE = (3, 4, 4, 4)
CLEAN = {"clip_sample": False}


class Steps:
    """A pipeline that steps from given samples; the output is that of a fixed random network."""

    def __init__(self, scheduler: Any, dtype: torch.dtype = torch.float32, start: int = 0, **extra: Any) -> None:
        self.components = {"scheduler": scheduler}
        self.dtype, self.start, self.extra = dtype, start, extra

    def __call__(self, steps: int = 4, only: int | None = None) -> list[Tensor]:
        scheduler = self.components["scheduler"]
        scheduler.set_timesteps(steps)
        if self.start:
            scheduler.set_begin_index(self.start)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(SHAPE, generator=generator).to(self.dtype)
        seen = []
        for index, t in enumerate(scheduler.timesteps[self.start :]):
            output = torch.randn(SHAPE, generator=generator).to(self.dtype)
            if only is None or index == only:
                seen.append(scheduler.step(output, t, x, return_dict=False, **self.extra)[0])
        return seen


def first_row(value: float) -> Any:
    def guard(denoised: Tensor, state: DenoiseState) -> Tensor:
        return torch.cat([denoised[:1] + value, denoised[1:]])

    return guard


@pytest.mark.parametrize(("step", "score", "sample"), [(0, 0.0094, 0.0858), (25, 0.0368, 0.5765), (45, 0.1547, 0.9700)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_couplings_move_the_next_sample_by_their_coefficients(
    prediction: str, step: int, score: float, sample: float
) -> None:
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": prediction}
    loop = Steps(DDIMScheduler(**CLEAN, **config, set_alpha_to_one=False))
    plain = loop(50, step)[0]
    for coupling, expected in (("score", score), ("sample", sample)):
        with attach(loop, first_row(1.0), coupling=coupling):  # pyright: ignore[reportArgumentType]
            moved = loop(50, step)[0] - plain
        # 1/alpha = 14 at the first step, so float32 leaves about 1e-5; the coefficients are given to 4 digits.
        assert moved[0].mean().item() == pytest.approx(expected, abs=6e-5)
        assert torch.equal(moved[1:], torch.zeros_like(moved[1:]))


def test_renoise_noises_the_target_afresh_and_keeps_the_old_output() -> None:
    torch.manual_seed(0)
    scheduler = DDIMScheduler(**CLEAN)
    loop = Steps(scheduler, generator=torch.Generator().manual_seed(5))
    with attach(loop, lambda d, s: torch.ones_like(d), coupling="renoise"):
        got = loop(4, 2)[0]
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    source = torch.Generator().manual_seed(0)
    output = [torch.randn(SHAPE, generator=source) for _ in range(4)][3]
    t = scheduler.timesteps[2]
    product = float(scheduler.alphas_cumprod[t])
    renoised = math.sqrt(product) + math.sqrt(1 - product) * noise
    expected = DDIMScheduler.step(scheduler, output, t, renoised).prev_sample
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_renoise_draws_nothing_when_nothing_fires() -> None:
    plain = Steps(DDPMScheduler(**CLEAN), generator=torch.Generator().manual_seed(5))()
    loop = Steps(DDPMScheduler(**CLEAN), generator=torch.Generator().manual_seed(5))
    with attach(loop, lambda d, s: d.clone(), coupling="renoise"):
        assert all(torch.equal(a, b) for a, b in zip(loop(), plain, strict=True))


PROJECTING: list[tuple[Any, dict[str, bool]]] = [
    (DDIMScheduler, {"clip_sample": True}),
    (DDIMScheduler, {"thresholding": True}),
    (DDPMScheduler, {"thresholding": True}),
    (HeunDiscreteScheduler, {"clip_sample": True}),
    (DPMSolverMultistepScheduler, {"thresholding": True}),
]


@pytest.mark.parametrize(("scheduler", "config"), PROJECTING)
def test_a_guard_sees_the_clipped_estimate_and_its_target_survives_clipping(
    scheduler: Any, config: dict[str, bool]
) -> None:
    loop, limits = Steps(scheduler(**config)), []

    def half(denoised: Tensor, state: DenoiseState) -> Tensor:
        limits.append(float(denoised.abs().max()))
        return torch.cat([denoised[:1] * 0.5, denoised[1:]])

    with attach(loop, half):
        loop(4, 0)
    assert max(limits) <= 1.0
    with attach(loop, lambda d, s: torch.full_like(d, 0.25)):
        final = loop(1)[-1]
    # One step from the schedule's start to its end; every one of these ends without noise.
    torch.testing.assert_close(final, torch.full(SHAPE, 0.25), atol=1e-4, rtol=0)


def test_unchanged_samples_are_bit_identical_and_fired_says_which() -> None:
    loop = Steps(EulerAncestralDiscreteScheduler(), generator=torch.Generator().manual_seed(1))
    loop.components["scheduler"].is_scale_input_called = True
    plain = loop(4, 1)[0]
    loop.extra["generator"].manual_seed(1)
    with attach(loop, first_row(0.5)) as trace:
        got = loop(4, 1)[0]
    assert torch.equal(got[1:], plain[1:])
    assert not torch.equal(got[0], plain[0])
    record = trace.calls[0].steps[0]
    assert record.fired.tolist() == [True, False, False]
    assert record.change[0].item() == pytest.approx(0.5 * math.sqrt(64), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single_and_written_back(dtype: torch.dtype) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    loop = Steps(scheduler, dtype)
    plain = loop()
    seen: list[torch.dtype] = []

    def look(denoised: Tensor, state: DenoiseState) -> Tensor:
        seen.extend((denoised.dtype, state.x_t.dtype))
        return denoised.clone()

    with attach(loop, look):
        assert all(torch.equal(a, b) for a, b in zip(loop(), plain, strict=True))
    assert set(seen) == {torch.float32}
    with attach(loop, lambda d, s: torch.full_like(d, 0.5)):
        final = loop(1)[0]
    assert final.dtype == dtype
    # x - sigma o with o rounded to 8 bits of mantissa and |o| below 4: 4 / 256.
    torch.testing.assert_close(final.float(), torch.full(SHAPE, 0.5), atol=0.016, rtol=0)


def test_steps_are_counted_in_pairs_for_two_call_solvers_and_from_the_begin_index() -> None:
    def steps(loop: Steps) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        with attach(loop, lambda d, s: seen.append((s.step, s.num_steps))):
            loop(4)
        return seen

    assert steps(Steps(HeunDiscreteScheduler())) == [(0, 4), (0, 4), (1, 4), (1, 4), (2, 4), (2, 4), (3, 4)]
    assert steps(Steps(FlowMatchEulerDiscreteScheduler(), start=1)) == [(0, 3), (1, 3), (2, 3)]


def test_eta_follows_the_call() -> None:
    def eta(loop: Steps) -> set[float | None]:
        seen: set[float | None] = set()
        with attach(loop, lambda d, s: seen.add(s.eta)):
            loop()
        return seen

    assert eta(Steps(DDIMScheduler())) == {0.0}
    assert eta(Steps(DDIMScheduler(), eta=0.7)) == {0.7}
    assert eta(Steps(DDPMScheduler())) == {1.0}
    assert eta(Steps(DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"))) == {1.0}
    assert eta(Steps(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))) == {None}


def test_zero_terminal_snr_skips_the_first_step_with_a_reason() -> None:
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    loop = Steps(DDIMScheduler(**CLEAN, **config))
    with attach(loop, first_row(1.0)) as trace:
        loop(4)
    reasons = [record.skipped for record in trace.calls[0].steps]
    assert "the signal is gone" in str(reasons[0])
    assert reasons[1:] == [None, None, None]
    with attach(loop, first_row(1.0)), pytest.raises(GuardNotApplied, match="all 1 steps were skipped"):
        loop(4, 0)


def test_rows_whose_estimate_is_not_finite_are_left_alone_and_refused_if_never_finite() -> None:
    class Broken(Steps):
        def __call__(self, steps: int = 2) -> None:
            scheduler = self.components["scheduler"]
            scheduler.set_timesteps(steps)
            for index, t in enumerate(scheduler.timesteps):
                x = torch.zeros(SHAPE)
                x[1] = torch.inf if index < self.extra["bad"] else 0.0
                scheduler.step(torch.ones(SHAPE), t, x)

    pipe = Broken(DDIMScheduler(**CLEAN), bad=1)
    with attach(pipe, first_row(1.0)) as trace:
        pipe()
    assert [row["skipped"] for row in trace.records()[:3]] == [None, "the estimate is not finite", None]
    pipe = Broken(DDIMScheduler(**CLEAN), bad=2)
    with attach(pipe, first_row(1.0)), pytest.raises(GuardNotApplied, match="never finite"):
        pipe()


class CosmosTextToWorldPipeline:
    """The double call of Cosmos 1: a probe on the doubled batch, a step back, then the real step."""

    def __init__(self) -> None:
        self.components = {"scheduler": EDMEulerScheduler()}

    def __call__(self) -> Tensor:
        scheduler = self.components["scheduler"]
        scheduler.set_timesteps(3)
        x = torch.ones(1, 4, 2, 2)
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            both = scheduler.step(torch.zeros(2, 4, 2, 2), t, torch.cat([x, x]), return_dict=False)[1]
            scheduler._step_index -= 1
            x = scheduler.step(both[:1], t, x, return_dict=False, pred_original_sample=both[:1])[0]
        return x


def test_cosmos_probes_are_skipped_and_its_real_steps_are_guarded() -> None:
    pipe, seen = CosmosTextToWorldPipeline(), []

    def force(denoised: Tensor, state: DenoiseState) -> Tensor:
        seen.append(denoised.shape[0])
        return torch.full_like(denoised, 0.5)

    with attach(pipe, force) as trace:
        final = pipe()
    assert seen == [1, 1, 1]
    assert [record.skipped is None for record in trace.calls[0].steps] == [False, True] * 3
    torch.testing.assert_close(final, torch.full_like(final, 0.5), atol=1e-5, rtol=0)


def test_dit_shows_each_sample_once() -> None:
    pipe, seen = tiny_pipeline("dit"), []
    call = tiny_call("dit") | {"guidance_scale": 4.0}
    with attach(pipe, lambda d, s: seen.append(d.shape[0])) as trace:
        pipe(**call)
    assert set(seen) == {len(call["class_labels"])}
    assert {record.fired.shape[0] for record in trace.calls[0].steps} == set(seen)


def test_a_compiled_network_has_no_graph_break_and_is_compiled_once() -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    ).eval()
    graphs: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(unet, backend=count, fullgraph=True)

    class Pipe:
        def __init__(self) -> None:
            self.components = {"scheduler": DDIMScheduler(**CLEAN)}

        @torch.no_grad()
        def __call__(self) -> None:
            scheduler = self.components["scheduler"]
            scheduler.set_timesteps(3)
            x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
            for t in scheduler.timesteps:
                x = scheduler.step(compiled(x, t).sample, t, x).prev_sample

    pipe = Pipe()
    pipe()
    with attach(pipe, lambda d, s: d + 0.1):
        pipe()
    assert len(graphs) == 1


def test_the_trace_reads_as_a_table_and_saves(tmp_path: Any) -> None:
    import json

    import pyarrow.parquet as pq

    def guard(denoised: Tensor, state: DenoiseState) -> Tensor:
        state.note("weight", torch.tensor([0.1, 0.2, 0.3]))
        return first_row(1.0)(denoised, state)

    loop = Steps(DDIMScheduler(**CLEAN))
    with attach(loop, guard) as trace:
        loop(2)
    assert trace.steps == trace.network_evaluations == 2
    assert trace.guard_seconds > 0
    rows = trace.records()
    assert len(rows) == 6
    assert rows[1]["weight"] == pytest.approx(0.2)
    assert "1/3" in trace.summary()
    trace.save(tmp_path / "trace.json")
    trace.save(tmp_path / "trace.parquet")
    assert len(json.loads((tmp_path / "trace.json").read_text())["records"]) == 6
    assert pq.read_table(tmp_path / "trace.parquet").num_rows == 6
    with pytest.raises(InvalidInput, match=r"\.json or \.parquet"):
        trace.save(tmp_path / "trace.txt")
    assert Trace().summary() == "no guarded call yet"
