"""The Safe Denoiser's released sampling loop, in NumPy float64 from its description. Never imports steerclear.

Per step of DDPM, with the noise prediction e at x_t and ᾱ the cumulated schedule:

    x̂ = (x_t − √(1−ᾱ) e) / √ᾱ
    d_n = ‖x̂ − r_n‖ (not squared),  r_n = reference divided by its norm over channels at every position
    k_n = exp(−d_n / (2 s²)),  b = Σ k_n + 1e-8,  E = Σ k_n r_n / b
    inside the window and if b ≥ threshold:  x̃ = x̂ − scale·E,  x_t ← √ᾱ x̃ + √(1−ᾱ) n, n fresh
    DDPM step from that x_t with the old e
"""

import numpy as np

Array = np.ndarray


def normalise(references: Array) -> Array:
    return references / np.sqrt((references**2).sum(axis=1, keepdims=True))


def kernel_sum(x: Array, references: Array, s: float) -> tuple[float, Array]:
    """(b, E) of one sample ``(c, h, w)``."""
    d = np.sqrt(((x[None] - references) ** 2).sum(axis=(1, 2, 3)))
    k = np.exp(-d / (2 * s * s))
    b = k.sum() + 1e-8
    return b, np.einsum("n,nchw->chw", k, references) / b


def gate(references: Array, alphas_cumprod_last: float, noise: Array, s: float, margin: float) -> float:
    r = normalise(references)
    noised = np.sqrt(alphas_cumprod_last) * r + np.sqrt(1 - alphas_cumprod_last) * noise
    return min(kernel_sum(x, r, s)[0] for x in noised) - margin


def ddpm_step(e: Array, x: Array, now: float, before: float, noise: Array | None) -> Array:
    """One ancestral step from ᾱ = ``now`` to ᾱ = ``before``."""
    alpha = now / before
    x_0 = (x - np.sqrt(1 - now) * e) / np.sqrt(now)
    mean = np.sqrt(before) * (1 - alpha) / (1 - now) * x_0 + np.sqrt(alpha) * (1 - before) / (1 - now) * x
    if noise is None:
        return mean
    return mean + np.sqrt((1 - before) / (1 - now) * (1 - alpha)) * noise


def step(
    x: Array,
    e: Array,
    references: Array,
    levels: tuple[float, float],
    fresh: Array,
    noise: Array | None,
    **settings: float,
) -> tuple[Array, bool]:
    """One step of one sample inside the window; the flag says whether the gate opened."""
    now, before = levels
    x_0 = (x - np.sqrt(1 - now) * e) / np.sqrt(now)
    b, mean = kernel_sum(x_0, normalise(references), settings["s"])
    fired = b >= settings["threshold"]
    if fired:
        x = np.sqrt(now) * (x_0 - settings["scale"] * mean) + np.sqrt(1 - now) * fresh
    return ddpm_step(e, x, now, before, noise), bool(fired)
