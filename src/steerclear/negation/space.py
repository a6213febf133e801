"""Where latents live: the encoder that made them and the shape that the sampler works in."""

from dataclasses import dataclass

from steerclear.errors import InvalidInput, NegationMismatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The sampler's space for one pipeline. Two latents may be compared only if their spaces agree.

    Args:
        encoder: Fingerprint of the encoder's weights, configuration and normalisation, ``"sha256:…"``, or ``"pixels"``.
        shape: Shape of one sample, without the batch, for example ``(4, 64, 64)``.
        name: What a person calls it, for messages only: ``"AutoencoderKL 4×64×64"``.

    Raises:
        InvalidInput: If the fingerprint is empty or the shape is not made of positive integers.
    """

    encoder: str
    shape: tuple[int, ...]
    name: str = ""

    def __post_init__(self) -> None:
        if not self.encoder:
            raise InvalidInput(
                "Space: expected the encoder's fingerprint ('sha256:…' or 'pixels'), got an empty string"
            )
        if not self.shape or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in self.shape):
            raise InvalidInput(f"Space: expected a shape of positive integers, got {self.shape!r}")

    def require(self, other: "Space") -> None:
        """Check that ``other``, the space of something to be compared with this one, is the same space.

        Raises:
            NegationMismatch: If the encoder or the shape differs; names are not compared.
        """
        if self.encoder == other.encoder and self.shape == other.shape:
            return
        raise NegationMismatch(
            f"expected latents of {self}, got latents of {other}; "
            "encode the pictures again for this pipeline: NegationSet.encode(images, pipe)"
        )

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape))
        return f"{self.name or 'an unnamed encoder'} ({shape}, {self.encoder[:19]})"
