"""The detector that always says the same: a double for tests, and the null hypothesis of an evaluation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from steerclear.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Always:
    """Gives every picture the same probabilities.

    Args:
        probabilities: One per label, each in ``[0, 1]``.
        labels: Names, as many as probabilities.

    Raises:
        InvalidInput: If the lengths differ or a probability is outside ``[0, 1]``.
    """

    probabilities: tuple[float, ...]
    labels: tuple[str, ...] = ("unsafe",)

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.probabilities):
            raise InvalidInput(
                f"Always: expected one probability per label, got {len(self.probabilities)} for {len(self.labels)}"
            )
        if not all(0.0 <= p <= 1.0 for p in self.probabilities):
            raise InvalidInput(f"Always: expected probabilities in [0, 1], got {self.probabilities}")

    def __call__(self, images: Tensor) -> Tensor:
        row = torch.tensor(self.probabilities, dtype=torch.float32, device=images.device)
        return row.expand(images.shape[0], -1)
