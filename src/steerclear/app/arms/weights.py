"""Guards that live in weights: ``(**settings) -> (pipeline -> block)``, inside which the pipeline has them."""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from steerclear import zoo
from steerclear.errors import InvalidInput

ADAPTERS = Path(zoo.__file__).parent / "adapters"


def safegen(policies: Sequence[str], adapter: str = "safegen-captions") -> Callable[[Any], AbstractContextManager[Any]]:
    """SafeGen's adapter for the shipped model, which knows all policies at once."""
    if set(policies) != set(zoo.policies()):
        raise InvalidInput(
            f"safegen: expected all policies ({', '.join(zoo.policies())}), which the adapter was trained on together, "
            f"got {', '.join(policies)}; train one for these: steerclear finetune safegen"
        )
    known = sorted(path.name for path in ADAPTERS.iterdir() if path.is_dir())
    if adapter not in known:
        raise InvalidInput(f"safegen: expected an adapter of {', '.join(known)}, got {adapter!r}")
    return partial(_adapted, folder=ADAPTERS / adapter)


@contextmanager
def _adapted(pipe: Any, folder: Path) -> Generator[None]:  # noqa: ANN401
    from steerclear.finetune import apply

    apply(pipe, folder)
    try:
        yield
    finally:
        pipe.unload_lora_weights()
