"""The judge of ``avatars-ddpm``: which attributes does an avatar have?

A residual network (0.7 M parameters, 16x16 pixels) with an independent yes or no for glasses, a hat, a beard and
accessories. Trained on avatars that neither the generator nor any reference set holds; accuracy on further ones is in
``docs/unconditional.md``. On other pictures its answers mean nothing.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from steerclear.detect.base import rgb, wide_weights
from steerclear.detect.emoji_judge import Block

SHIPPED = Path(__file__).parents[1] / "zoo" / "models" / "avatars-judge"
SIZE, WIDTHS = 16, (32, 64, 128)


class AttributeNetwork(nn.Module):
    """Pictures ``(batch, 3, 16, 16)`` in [-1, 1] -> logits ``(batch, attributes)``."""

    def __init__(self, attributes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTHS[0])
        self.blocks = nn.Sequential(Block(32, 32), Block(32, 64), Block(64, 128), Block(128, 128))
        self.head = nn.Linear(WIDTHS[-1], attributes)

    def features(self, x: Tensor) -> Tensor:
        """What is seen before it is decided, ``(batch, 128)``."""
        return self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@dataclass(frozen=True)
class AvatarsJudge:
    """Detector over the attributes of avatars; see the module's docstring.

    Args:
        folder: Where ``judge.safetensors`` and ``judge.json`` lie; default: the shipped one.

    Call:
        images: ``(batch, 3, height, width)`` in [0, 1]; resized to 16x16, each cell the mean of its pixels.

    Returns:
        Probabilities ``(batch, labels)``; an avatar may have several attributes or none.

    Raises:
        InvalidInput: If the pictures do not have three channels.
    """

    folder: Path = field(default=SHIPPED)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The attributes."""
        return tuple(json.loads((self.folder / "judge.json").read_text(encoding="utf-8"))["labels"])

    @cached_property
    def network(self) -> AttributeNetwork:
        """The network, in float32."""
        network = AttributeNetwork(len(self.labels))
        network.load_state_dict(wide_weights(self.folder / "judge.safetensors"))
        return network.eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        return self.network(self._prepared(images)).sigmoid()

    def features(self, images: Tensor) -> Tensor:
        """What the judge sees before it decides, ``(batch, 128)``: a feature space for distances between avatars."""
        return self.network.features(self._prepared(images))

    def _prepared(self, images: Tensor) -> Tensor:
        pictures = rgb(images, "AvatarsJudge")
        if pictures.shape[-2:] != (SIZE, SIZE):
            pictures = F.interpolate(pictures, (SIZE, SIZE), mode="area")
        return pictures.to(next(self.network.parameters()).device) * 2 - 1
