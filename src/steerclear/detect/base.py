"""The detector contract, thresholds that turn probabilities into verdicts, and the plug-in lookup."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors.torch import load_file
from torch import Tensor

from steerclear.errors import InvalidInput, SteerclearError

GROUP = "steerclear.detectors"


@runtime_checkable
class Detector(Protocol):
    """``(batch, 3, height, width)`` pictures in ``[0, 1]`` -> ``(batch, len(labels))`` probabilities in ``[0, 1]``.

    Rows are independent of each other. Columns need not sum to 1: a detector of several independent things may
    find all of them.
    """

    @property
    def labels(self) -> tuple[str, ...]: ...

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a detector and a rule say of one picture.

    Args:
        label: The most probable label.
        probability: Its probability.
        unsafe: Whether the rule flags the picture.
        unsafe_probability: Total probability of the labels that the rule calls unsafe, at most 1.
    """

    label: str
    probability: float
    unsafe: bool
    unsafe_probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Flags a picture when the probabilities of the unsafe labels add up to ``threshold`` or more.

    The sum, because a detector may share its belief among near-synonyms ("beer mug", "clinking beer mugs").

    Args:
        unsafe: Labels that count as unsafe; at least one.
        threshold: In ``(0, 1]``.

    Raises:
        InvalidInput: Without labels, or for a threshold outside its range.
    """

    unsafe: frozenset[str]
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not self.unsafe:
            raise InvalidInput("Thresholds: expected at least one unsafe label, got none; nothing could be flagged")
        if not 0.0 < self.threshold <= 1.0:
            raise InvalidInput(f"Thresholds: expected a threshold in (0, 1], got {self.threshold}")

    def verdicts(self, detector: Detector, images: Tensor) -> list[Verdict]:
        """One verdict per picture.

        Args:
            detector: Its labels must contain all of ``unsafe``.
            images: ``(batch, 3, height, width)`` in ``[0, 1]``.

        Raises:
            InvalidInput: If the detector does not know an unsafe label: it could never flag it.
            SteerclearError: If the detector returns another shape, or a value outside ``[0, 1]``.
        """
        unknown = sorted(self.unsafe - set(detector.labels))
        if unknown:
            raise InvalidInput(
                f"Thresholds: expected labels that {type(detector).__name__} knows, got {', '.join(unknown)}; "
                "drop them or use a detector that can see them"
            )
        probabilities = _checked(detector(images), (images.shape[0], len(detector.labels)))
        return [self._verdict(detector.labels, row) for row in probabilities.tolist()]

    def _verdict(self, labels: tuple[str, ...], row: list[float]) -> Verdict:
        best = max(range(len(row)), key=row.__getitem__)
        total = min(1.0, sum(p for label, p in zip(labels, row, strict=True) if label in self.unsafe))
        return Verdict(
            label=labels[best], probability=row[best], unsafe=total >= self.threshold, unsafe_probability=total
        )


def _checked(probabilities: Tensor, shape: tuple[int, int]) -> Tensor:
    """The detector's answer, or an error: a broken detector must not pass for "nothing found"."""
    if tuple(probabilities.shape) != shape:
        raise SteerclearError(f"detector: expected probabilities of shape {shape}, got {tuple(probabilities.shape)}")
    values = probabilities.detach().float().cpu()
    if not bool(((values >= 0.0) & (values <= 1.0 + 1e-4)).all()):
        raise SteerclearError("detector: expected probabilities in [0, 1], got values outside or NaN; do not trust it")
    return values.clamp(max=1.0)


def rgb(images: Tensor, detector: str) -> Tensor:
    """``images`` in float32, or an error in the name of ``detector`` unless they are RGB pictures.

    Raises:
        InvalidInput: For another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise InvalidInput(
            f"{detector}: expected RGB pictures of shape (batch, 3, height, width) in [0, 1], got "
            f"{tuple(images.shape)}; convert them with PIL's .convert('RGB') first"
        )
    return images.float()


def wide_weights(file: Path) -> dict[str, Tensor]:
    """Weights as they ship, in half precision, made float32; integers stay."""
    return {name: t.float() if t.is_floating_point() else t for name, t in load_file(file).items()}


def available() -> dict[str, EntryPoint]:
    """Installed detectors by name; nothing is imported."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def load(name: str, **settings: Any) -> Detector:  # noqa: ANN401  (each detector has its own settings)
    """The detector that is registered as ``name``, built with ``settings``.

    Raises:
        InvalidInput: For an unknown name; the message lists the known ones.
        MissingExtra: If the detector's package is not installed.
        SteerclearError: If it does not load, or is no detector. Never a silent skip.
    """
    points: Mapping[str, EntryPoint] = available()
    if name not in points:
        known = ", ".join(points) or "none is registered"
        raise InvalidInput(f"detector: expected one of {known}, got {name!r}")
    try:
        detector = points[name].load()(**settings)
        known_labels = getattr(
            detector, "labels", ()
        )  # read here, so that missing weights are an error before sampling
    except SteerclearError:
        raise
    except Exception as error:
        raise SteerclearError(f"detector {name!r} does not load: {type(error).__name__}: {error}") from error
    if not known_labels or not isinstance(detector, Detector):
        raise SteerclearError(f"detector {name!r}: expected an object with labels and __call__, got {detector!r}")
    return detector
