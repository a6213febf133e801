"""The models that ship with the package, and one way to load them, a local folder or a model of the hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerclear.errors import InvalidInput

ROOT = Path(__file__).parent / "models"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_REFUSED = {
    "trust_remote_code": "it would run code from the model's repository",
    "custom_pipeline": "it would run code from the model's repository",
    "use_safetensors": "only safetensors files are read; other formats can run code when they are opened",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShippedModel:
    """A model inside the package.

    Args:
        name: What :func:`load` takes.
        draws: What it is for, in one line.
        architecture: Pipeline class and size of the pictures.
        licence: Of the weights, and of the art that they were trained on.
        guard: Kind of guard that the command line draws with unless told otherwise.
        steps, cfg: How the command line samples unless told otherwise: as in the model's tables.
    """

    name: str
    draws: str
    architecture: str
    licence: str
    guard: str = "recommended"
    steps: int = 25
    cfg: float = 3.0

    @property
    def path(self) -> Path:
        """Its folder, in diffusers' own layout."""
        return ROOT / self.name

    @property
    def installed(self) -> bool:
        """Whether the weights are there."""
        return (self.path / "model_index.json").is_file()

    @property
    def mebibytes(self) -> float:
        """Size of its files in MiB; 0 if they are missing."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file()) / 2**20


_SHIPPED = (
    ShippedModel(
        name="emoji-sd",
        draws="about 240 everyday objects, animals, faces and foods as emoji, from their names",
        architecture="StableDiffusionPipeline, 64×64",
        licence="Apache-2.0; trained on Noto (Apache-2.0) and Fluent (MIT) emoji, see NOTICE",
    ),
    ShippedModel(
        name="emoji-dit",
        draws="94 of the same things from the name of a class: food-drink, tools, animals, …",
        architecture="DiTPipeline, 64×64",
        guard="class-redirect",
        steps=20,
        cfg=2.0,
        licence="Apache-2.0; trained on Noto (Apache-2.0) and Fluent (MIT) emoji, see NOTICE",
    ),
    ShippedModel(
        name="avatars-ddpm",
        draws="faces of pixels, with or without glasses, hat and beard, from noise alone",
        architecture="DDIMPipeline, 16×16 pixels",
        guard="avatars-without",
        licence="Apache-2.0; trained on avatars of DiceBear's Pixel Art style (CC0 1.0), see NOTICE",
    ),
)


def shipped() -> tuple[ShippedModel, ...]:
    """The models inside the package."""
    return _SHIPPED


def load(name_or_path: str | Path, **settings: Any) -> Any:  # noqa: ANN401  (some diffusers pipeline)
    """The pipeline of a shipped model, of a local folder, or of a model id of the Hugging Face hub, in that order.

    Args:
        name_or_path: ``"emoji-sd"``, ``"./my-model"``, or ``"owner/name"``.
        settings: For diffusers' ``from_pretrained``, such as ``dtype``. Float32 unless said otherwise.

    Returns:
        A pipeline on the CPU; move it with ``.to("cuda")``.

    Raises:
        InvalidInput: For an unknown name (the message lists the known ones), or a setting that could run foreign code.
        OSError: If files are missing, or the hub cannot be reached.
    """
    for setting, why in _REFUSED.items():
        if setting in settings:
            raise InvalidInput(f"load: {setting} is not accepted: {why}. Leave it out")
    source = _source(name_or_path)
    import torch
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(source, **{"dtype": torch.float32, **settings}, use_safetensors=True)


def quiet() -> None:
    """Keeps notices and progress bars of diffusers, transformers and the hub off the terminal, for this process."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.set_verbosity_error()
        library.disable_progress_bar()


def use_scheduler(pipe: Any, name: str) -> None:  # noqa: ANN401  (some diffusers pipeline)
    """Gives ``pipe`` another scheduler, with the configuration of its own one.

    Args:
        pipe: Changed.
        name: Of a diffusers class, with or without ``Scheduler``, in any case: ``"DDIM"``, ``"euler_ancestral"``.

    Raises:
        InvalidInput: For an unknown name; the message lists the pipeline's compatible ones.
    """
    own: Any = pipe.scheduler
    classes = {kind.__name__: kind for kind in [type(own), *own.compatibles]}
    known = {key.lower().removesuffix("scheduler").removesuffix("discrete"): kind for key, kind in classes.items()}
    short = name.lower().replace("_", "").replace("-", "").removesuffix("scheduler").removesuffix("discrete")
    if short not in known:
        names = ", ".join(sorted(key.removesuffix("Scheduler") for key in classes))
        raise InvalidInput(f"scheduler: expected one of {names}, got {name!r}")
    pipe.scheduler = known[short].from_config(own.config)


def _source(name_or_path: str | Path) -> str:
    """The folder or hub id that a name stands for."""
    for model in _SHIPPED:
        if str(name_or_path) == model.name:
            if not model.installed:
                raise FileNotFoundError(
                    f"load: expected the weights of {model.name} in {model.path}, found none; reinstall steerclear"
                )
            return str(model.path)
    folder = Path(name_or_path)
    if (folder / "model_index.json").is_file():
        return str(folder)
    if folder.is_dir():
        raise InvalidInput(
            f"load: expected a diffusers pipeline in {folder}, but it has no model_index.json; "
            "give the folder that DiffusionPipeline.save_pretrained wrote"
        )
    if isinstance(name_or_path, str) and _HUB_ID.fullmatch(name_or_path):
        return name_or_path
    known = ", ".join(model.name for model in _SHIPPED)
    raise InvalidInput(
        f"load: expected a shipped model ({known}), a local folder, or a hub id like owner/name, "
        f"got {str(name_or_path)!r}"
    )
