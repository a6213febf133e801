"""How pictures become latents: the protocol, and the hook through which a pipeline is turned into an encoder.

This layer does not know diffusers. Whoever does (``steerclear.attach.space``) registers itself with :func:`use`.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from steerclear.negation.space import Space


@runtime_checkable
class Encoder(Protocol):
    """Pictures to the sampler's space and back."""

    @property
    def space(self) -> Space:
        """Where the latents live."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """``(height, width)`` in pixels of the pictures that it takes."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """``(n, 3, height, width)`` in [0, 1] -> ``(n, *space.shape)``: the posterior's mode, float32."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """``(n, *space.shape)`` -> ``(n, 3, height, width)`` in [0, 1]."""
        ...


_factories: list[Callable[..., Encoder]] = []


def use(factory: Callable[..., Encoder]) -> None:
    """Register ``factory(pipe, **options) -> Encoder``; the last one registered is asked."""
    _factories.append(factory)


def encoder_of(source: Any, **options: Any) -> Encoder:  # noqa: ANN401 - a pipeline of any library, and what it needs
    """The encoder that ``source`` is, or that the registered factory makes of it.

    Args:
        source: An :class:`Encoder`, or a pipeline.
        options: For a pipeline, passed on to the factory: ``height`` and ``width`` in pixels if it will draw at another
            size than its default; see ``steerclear.attach.space.encoder_of`` for all.

    Raises:
        UnsupportedPipeline: If ``source`` is neither an encoder nor a pipeline whose space can be established.
    """
    if isinstance(source, Encoder):
        return source
    if not _factories:
        # The one arrow that points up, and only when it is needed: reading a set must not load diffusers.
        import_module("steerclear.attach")
    return _factories[-1](source, **options)
