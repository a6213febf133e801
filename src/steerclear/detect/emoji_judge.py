"""The judge of the shipped model: which concept does an emoji-sized picture show?

A residual network (2.8 M parameters, 64x64 pixels) over the concepts that ``emoji-sd`` draws, and ``"something else"``
for everything it does not draw, for blends and for noise. Trained on art that no negation set and no safe reference set
holds, half of it by vendors that nothing else sees; sensitivity and specificity are in ``docs/model.md``. It judges
emoji art only: on photographs its answers mean nothing.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steerclear.detect.base import rgb, wide_weights
from steerclear.errors import InvalidInput

SOMETHING_ELSE = "something else"
SHIPPED = Path(__file__).parents[1] / "zoo" / "models" / "emoji-judge"
SIZE, WIDTHS = 64, (32, 64, 128, 256)


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut; halves the picture when the width grows."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        stride = 1 if width_in == width else 2
        self.one = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm_one, self.norm_two = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm_one(self.one(x)))
        return F.relu(self.norm_two(self.two(y)) + self.shortcut(x))


class JudgeNetwork(nn.Module):
    """Pictures ``(batch, 3, 64, 64)`` in [-1, 1] -> logits ``(batch, labels)``."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 5, 2, 2, bias=False)
        self.norm = nn.BatchNorm2d(WIDTHS[0])
        pairs = zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False)
        self.blocks = nn.Sequential(*(layer for a, b in pairs for layer in (Block(a, b), Block(b, b))))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(WIDTHS[-1], labels)

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(self.drop(features.mean((2, 3))))


@dataclass(frozen=True)
class EmojiJudge:
    """Detector over the concepts of ``emoji-sd``; see the module's docstring.

    Args:
        folder: Where ``judge.safetensors`` and ``judge.json`` (labels, policies) lie; default: the shipped one.

    Call:
        images: ``(batch, 3, height, width)`` in [0, 1]; resized to 64x64.

    Returns:
        Probabilities ``(batch, labels)``, each row summing to 1.

    Raises:
        InvalidInput: If the pictures do not have three channels.

    Cost:
        About 75 million multiply-adds a picture.
    """

    folder: Path = field(default=SHIPPED)

    @cached_property
    def card(self) -> dict[str, list[str]]:
        return json.loads((self.folder / "judge.json").read_text(encoding="utf-8"))

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.card["labels"])

    @cached_property
    def network(self) -> JudgeNetwork:
        network = JudgeNetwork(len(self.labels))
        network.load_state_dict(wide_weights(self.folder / "judge.safetensors"))
        return network.eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        pictures = rgb(images, "EmojiJudge")
        if pictures.shape[-2:] != (SIZE, SIZE):
            pictures = F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        device = next(self.network.parameters()).device
        with torch.no_grad():
            return self.network(pictures.to(device) * 2 - 1).softmax(1)

    def probability(self, images: Tensor, concepts: list[str] | tuple[str, ...]) -> Tensor:
        """P(the picture shows one of ``concepts``), shape ``(batch,)``."""
        unknown = set(concepts) - set(self.labels)
        if unknown:
            known = f"its {len(self.labels)} labels"
            raise InvalidInput(f"EmojiJudge: expected concepts among {known}, got {sorted(unknown)}")
        columns = [self.labels.index(concept) for concept in concepts]
        return self(images)[:, columns].sum(1)
