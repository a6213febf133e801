"""Branches by name from a pipeline's guider: as the hook finds them, and where the hook cannot."""

import functools

import pytest
import torch
from diffusers import guiders
from diffusers.hooks import LayerSkipConfig

from steerclear.attach import branches as branches_module
from steerclear.attach.api import attach
from steerclear.attach.guider import guiders_of
from steerclear.errors import UnsoundCombination, UnsupportedPipeline
from steerclear.guards.base import Requires, when
from steerclear.testing.pipelines import tiny_call, tiny_pipeline


class Look:
    """A guard that keeps what it is lent, and pulls towards the unconditional branch if told to."""

    def __init__(self, requires, pull=0.0):
        self.requires, self.pull, self.seen = requires, pull, []

    def __call__(self, denoised, state):
        self.seen.append((denoised.clone(), dict(state.branches), state.guidance_scale))
        if not self.pull:
            return None
        u, c = state.branches["unconditional"], state.branches["conditional"]
        return denoised - self.pull * state.guidance_scale * (c - u)


BRANCHES, PREDICTIONS = Requires(branches=True), Requires(predictions=True)

OTHERS = {
    "rescaled": lambda: guiders.ClassifierFreeGuidance(guidance_scale=5.0, guidance_rescale=0.7),
    "apg": lambda: guiders.AdaptiveProjectedGuidance(guidance_scale=5.0, adaptive_projected_guidance_momentum=-0.5),
    "zero-star": lambda: guiders.ClassifierFreeZeroStarGuidance(guidance_scale=5.0, zero_init_steps=0),
    "tangential": lambda: guiders.TangentialClassifierFreeGuidance(guidance_scale=5.0),
}


@pytest.fixture(scope="module")
def pipe():
    """Its network listens to the prompt more than random weights do, so that the branches differ."""
    pipe = tiny_pipeline("modular-sdxl")
    for name, weight in pipe.unet.named_parameters():
        if "attn2.to_" in name and name.endswith("weight"):
            weight.data.mul_(16.0)
    return pipe


@pytest.fixture
def with_guider(pipe):
    """The pipeline under another guider; its own comes back afterwards."""
    own = pipe.guider

    def put(guider):
        pipe.update_components(guider=guider)
        return pipe

    yield put
    pipe.update_components(guider=own)


def call():
    return tiny_call("modular-sdxl") | {"negative_prompt": "a dog"}


def run(pipe, look):
    with attach(pipe, look):
        return pipe(**call())


def relative(difference, to):
    return (difference.norm() / to.norm()).item()


@pytest.mark.parametrize("pull", [0.0, 0.8])
def test_guider_and_hook_lend_the_same(with_guider, monkeypatch, pull):
    pipe = with_guider(guiders.ClassifierFreeGuidance(guidance_scale=4.0))
    by_guider, by_hook = Look(BRANCHES, pull), Look(BRANCHES, pull)
    images = run(pipe, by_guider)
    monkeypatch.setattr("steerclear.attach.guider.guiders_of", lambda pipe: [])
    assert (run(pipe, by_hook) == images).all()
    assert len(by_guider.seen) == len(by_hook.seen) == 3
    for (_, named, g, *_), (_, found, h, *_) in zip(by_guider.seen, by_hook.seen, strict=True):
        assert g == h == 4.0
        assert relative(named["conditional"] - named["unconditional"], named["unconditional"]) > 1e-3
        for name in ("conditional", "unconditional"):
            assert torch.equal(named[name], found[name])


def test_the_original_formulation_has_a_scale_one_larger(with_guider):
    """c + g (c - u) = u + (g + 1) (c - u)."""
    pipe, look = with_guider(guiders.ClassifierFreeGuidance(2.0, use_original_formulation=True)), Look(BRANCHES)
    run(pipe, look)
    assert [scale for _, _, scale in look.seen] == pytest.approx([3.0] * 3, rel=1e-5)


@pytest.mark.parametrize("scale", [0.4, 1.5])
def test_any_scale_is_recognised_where_the_branches_have_names(with_guider, scale):
    """Below one half arithmetic alone would take the branches for each other."""
    pipe, look = with_guider(guiders.ClassifierFreeGuidance(guidance_scale=scale)), Look(BRANCHES)
    run(pipe, look)
    denoised, branches, found = look.seen[0]
    u, c = branches["unconditional"], branches["conditional"]
    assert found == scale
    assert relative(u + scale * (c - u) - denoised, denoised) <= 2e-6


@pytest.mark.parametrize("kind", OTHERS)
def test_other_guiders_lend_named_predictions_but_no_scale(with_guider, kind):
    """The first step's branches do not depend on how they are combined."""
    plain, look = Look(BRANCHES), Look(PREDICTIONS)
    run(with_guider(guiders.ClassifierFreeGuidance(guidance_scale=5.0)), plain)
    run(with_guider(OTHERS[kind]()), look)
    for name in ("conditional", "unconditional"):
        assert torch.equal(look.seen[0][1][name], plain.seen[0][1][name])
    assert [scale for _, _, scale in look.seen] == [None] * 3


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("needs", [BRANCHES, Requires(evaluations=True)], ids=["branches", "evaluations"])
def test_other_guiders_are_refused_to_guards_that_rely_on_the_scale(with_guider, kind, needs):
    pipe = with_guider(OTHERS[kind]())
    with attach(pipe, Look(needs)), pytest.raises(UnsupportedPipeline, match="guidance_rescale"):
        pipe(**call())


def test_weakened_models_are_not_called_unconditional(with_guider):
    config = LayerSkipConfig(indices=[0], fqn="mid_block.attentions.0.transformer_blocks")
    pipe = with_guider(guiders.AutoGuidance(guidance_scale=5.0, auto_guidance_config=config))
    with attach(pipe, Look(PREDICTIONS)), pytest.raises(UnsupportedPipeline, match="weakened"):
        pipe(**call())


def test_a_guider_that_pauses_is_refused(with_guider):
    pipe = with_guider(guiders.ClassifierFreeGuidance(guidance_scale=5.0, stop=0.5))
    with attach(pipe, Look(BRANCHES)), pytest.raises(UnsoundCombination, match="start=0 and stop=1"):
        pipe(**call())


def test_a_guard_that_looks_and_one_that_relies_meet_in_one_call(with_guider):
    pipe = with_guider(guiders.ClassifierFreeGuidance(guidance_scale=4.0))
    looks, relies = Look(PREDICTIONS), Look(BRANCHES)
    with attach(pipe, looks), attach(pipe, relies):
        pipe(**call())
    assert looks.seen[0][2] is None
    assert relies.seen[0][2] == 4.0
    assert torch.equal(looks.seen[0][1]["conditional"], relies.seen[0][1]["conditional"])


def test_a_branch_more_equals_the_guiders_own(with_guider):
    pipe, extra = with_guider(guiders.ClassifierFreeGuidance(guidance_scale=4.0)), []

    class Ask(Look):
        def __call__(self, denoised, state):
            super().__call__(denoised, state)
            extra.append((state.denoise(state.x_t, state.level), state.again(state.x_t)))

    ask = Ask(BRANCHES)
    run(pipe, ask)
    for (denoised, branches, _), (unconditional, again) in zip(ask.seen, extra, strict=True):
        assert relative(unconditional - branches["unconditional"], unconditional) <= 1e-6
        assert relative(again - denoised, denoised) <= 5e-6


def test_guiders_are_left_as_they_were(with_guider):
    pipe = with_guider(guiders.ClassifierFreeGuidance(guidance_scale=4.0))
    (guider,) = guiders_of(pipe)
    run(pipe, Look(BRANCHES))
    assert "forward" not in vars(guider)
    own = functools.partial(type(guider).forward, guider)
    guider.forward = own

    def broken(denoised, state):
        raise RuntimeError("broken")

    broken.requires = BRANCHES
    with attach(pipe, broken), pytest.raises(RuntimeError, match="broken"):
        pipe(**call())
    assert vars(guider)["forward"] is own


def test_needs_join():
    joined = Requires(predictions=True) | Requires(evaluations=True)
    assert (joined.branches, joined.predictions, joined.evaluations, joined.network) == (False, True, True, True)
    assert not Requires(stochastic=True, one_call=True).network

    def condition(state):
        return torch.ones(1, dtype=torch.bool)

    condition.requires = Requires(evaluations=True)
    assert when(condition, Look(PREDICTIONS)).requires == joined
    assert branches_module.BranchHook(object()).needs == BRANCHES
