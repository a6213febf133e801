"""Guards on a text together with the Safe Denoiser, as in the latter's paper: what each sees, and in which order."""

import numpy as np
import pytest
import torch

from steerclear.attach.api import attach
from steerclear.denoise import DenoiseState
from steerclear.guards import SLD, Gate, NegativePrompt, SafeDenoiser, chain
from steerclear.negation import NegationSet, Space
from steerclear.noise import NoiseLevel
from steerclear.testing.pipelines import tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TEXTS = {
    "SLD": SLD(concept="a dog", strength=1e9, threshold=np.inf, momentum=0.0, warmup=0.0),
    "negative prompt": NegativePrompt(prompt="a dog", strength=1.5),
}
LEVEL, W = NoiseLevel(0.8, 0.6), 3.0


def step() -> tuple[torch.Tensor, DenoiseState, dict[str, torch.Tensor]]:
    """One step in four dimensions, and what stands behind it."""
    names = ("x_t", "unconditional", "conditional", "negative", "one", "other")
    parts = dict(zip(names, torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(3)).double(), strict=True))
    state = DenoiseState(
        x_t=parts["x_t"],
        level=LEVEL,
        step=0,
        num_steps=1,
        branches={name: parts[name] for name in ("unconditional", "conditional")},
        guidance_scale=W,
        denoise=lambda x, level, text: parts["negative"],
    )
    guided = parts["unconditional"] + W * (parts["conditional"] - parts["unconditional"])
    return guided, state, parts


def repulsion(parts: dict[str, torch.Tensor]) -> tuple[SafeDenoiser, np.ndarray]:
    """A Safe Denoiser of constant strength 0.5 with two references, and its unsafe mean in NumPy."""
    references = torch.stack([parts["one"][0], parts["other"][0]])
    space = Space(encoder="sha256:test", shape=(4,), name="four")
    guard = SafeDenoiser(negation=NegationSet(latents=references, space=space), weight=Gate(), strength=0.5)
    x, y = parts["x_t"].numpy(), references.numpy()
    log_kernel = -((x[:, None] - LEVEL.alpha * y) ** 2).sum(2) / (2 * LEVEL.sigma**2)
    share = np.exp(log_kernel - log_kernel.max(1, keepdims=True))
    return guard, share / share.sum(1, keepdims=True) @ y


def pushed(name: str, parts: dict[str, torch.Tensor]) -> np.ndarray:
    """What the text's guard adds: w (x_p's direction replaced) for SLD of every element, λ (x_∅ − x_n) otherwise."""
    away = (parts["unconditional"] - parts["negative"]).numpy()
    return (W if name == "SLD" else 1.5) * away


@pytest.mark.parametrize("name", TEXTS)
def test_the_safe_denoiser_multiplies_what_the_text_has_moved(name):
    """Text first: (1 + β)(x̂ + a) − β u. Text last: (1 + β) x̂ − β u + a. They differ by β a."""
    guided, state, parts = step()
    images, unsafe = repulsion(parts)
    a, beta = pushed(name, parts), 0.5
    first = chain(TEXTS[name], images)(guided, state)
    last = chain(images, TEXTS[name])(guided, state)
    np.testing.assert_allclose(first.numpy(), (1 + beta) * (guided.numpy() + a) - beta * unsafe, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(last.numpy(), (1 + beta) * guided.numpy() + a - beta * unsafe, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose((first - last).numpy(), beta * a, rtol=1e-7, atol=1e-9)


def constant(pipe, scale: float = 0.2) -> SafeDenoiser:
    """A Safe Denoiser with one reference in the pipeline's space."""
    from steerclear.attach.space import encoder_of

    references = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return SafeDenoiser(
        negation=NegationSet(latents=references, space=encoder_of(pipe).space), weight=Gate(), strength=scale
    )


def drawn(pipe) -> torch.Tensor:
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    return pipe("a cat", **call, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("name", TEXTS)
def test_a_chain_is_the_two_in_one_attach_and_in_two(name):
    pipe = tiny_pipeline("sd")
    text, images = TEXTS[name], constant(pipe)
    with attach(pipe, chain(text, images)) as trace:
        chained = drawn(pipe)
    assert trace.calls[0].extra_evaluations == 4
    with attach(pipe, text, images):
        listed = drawn(pipe)
    with attach(pipe, text), attach(pipe, images):  # the outer one acts first; the estimate passes through the output
        nested = drawn(pipe)
    with attach(pipe, images, text):
        swapped = drawn(pipe)
    assert torch.equal(chained, listed)
    assert (nested - chained).norm() < 1e-5 * chained.norm() < 1e-3 * chained.norm() < (swapped - chained).norm()


@pytest.mark.parametrize("name", TEXTS)
def test_the_published_loop_re_noises_what_the_text_has_moved(name):
    """As in the paper: the text changes the prediction; the loop and its re-noising are an attachment within."""
    pipe = tiny_pipeline("sd")
    published = SafeDenoiser.published(constant(pipe).negation, stop=1.0)
    with attach(pipe, published, coupling="renoise"):
        alone = drawn(pipe)
    with attach(pipe, TEXTS[name]) as outer, attach(pipe, published, coupling="renoise") as inner:
        both = drawn(pipe)
    assert outer.calls[0].extra_evaluations == 4
    assert inner.calls[0].extra_evaluations == 0
    assert all(record.fired.all() for record in inner.calls[0].steps)
    assert (both - alone).norm() > 1e-3 * alone.norm()
