"""What a pipeline is called with, for the three kinds of generation: from text, from a class label, from nothing."""

import inspect
from collections.abc import Sequence
from typing import Any

from steerclear.errors import InvalidInput, UnsupportedPipeline
from steerclear.evaluate.prompts import Prompt


def request(
    pipe: Any,  # noqa: ANN401  (some diffusers pipeline)
    prompts: Sequence[Prompt],
    *,
    cfg: float | None,
    negative: str | None = None,
) -> dict[str, Any]:
    """The arguments that say what to draw, one picture per prompt.

    Args:
        pipe: A pipeline that takes ``prompt``, or ``class_labels`` (a prompt's text is then the name of a class), or a
            ``batch_size`` alone (texts are then empty).
        prompts: What to draw.
        cfg: Scale of classifier-free guidance; ``None`` is the pipeline's own, and so is any scale where it has none.
        negative: A negative prompt for all.

    Raises:
        InvalidInput: For a text that is no class, a text or a negative prompt where the pipeline reads none.
        UnsupportedPipeline: For a pipeline that takes none of the three.
    """
    takes = inspect.signature(pipe.__call__).parameters
    scale = {"guidance_scale": cfg} if cfg is not None and "guidance_scale" in takes else {}
    texts = [prompt.text for prompt in prompts]
    if "prompt" in takes:
        beside = {} if negative is None else {"negative_prompt": [negative] * len(texts)}
        return {"prompt": texts, **beside, **scale}
    if negative is not None:
        raise InvalidInput(f"{type(pipe).__name__} reads no negative prompt; leave that arm out")
    if "class_labels" in takes:
        return {"class_labels": _classes(pipe, texts), **scale}
    if "batch_size" not in takes:
        raise UnsupportedPipeline(
            f"{type(pipe).__name__}: expected a pipeline that takes prompt, class_labels or batch_size, got "
            f"{', '.join(takes)}; evaluate a text-to-image, class-conditional or unconditional one"
        )
    if any(texts):
        raise InvalidInput(f"{type(pipe).__name__} draws without a prompt, got {texts[0]!r}; give prompts with text ''")
    return {"batch_size": len(texts), **scale}


def _classes(pipe: Any, names: Sequence[str]) -> list[int]:  # noqa: ANN401
    known: dict[str, int] = getattr(pipe, "labels", {})
    if unknown := [name for name in names if name not in known]:
        raise InvalidInput(f"expected classes among {', '.join(known)}; got {', '.join(dict.fromkeys(unknown))}")
    return [known[name] for name in names]
