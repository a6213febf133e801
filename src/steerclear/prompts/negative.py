"""A negative prompt given to the pipeline itself, the form that costs nothing; and texts cut to what encoders read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from steerclear.errors import InvalidInput, UnsoundCombination, UnsupportedPipeline
from steerclear.prompts.encoders import parameters

Pipeline = Any  # classic and modular pipelines share no typed interface

NAMES = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")


@dataclass(frozen=True, kw_only=True, eq=False)
class NegativeText:
    """Adds a text to the negative prompt of every call: ``attach(pipe, prompts=NegativeText(text="a gun"))``.

    Guidance then takes the prediction under it in place of the one without a prompt, from the first step to the last,
    with a push of ``guidance_scale - 1``. For another strength, or a window, use
    :class:`~steerclear.guards.NegativePrompt`, which costs an evaluation a step.

    Args:
        text: What is not wanted; or one text per prompt of the call, of which empty ones add nothing.

    Call:
        pipe: The pipeline.
        arguments: Of the call, by name; not changed.

    Returns:
        The arguments with ``negative_prompt`` as ``"text, the user's own"``: ours first, as encoders cut the end. A
        negative prompt for a second or third encoder, where the call has one, gets the text too.

    Raises:
        InvalidInput: For a text that names nothing, that is longer than the pipeline's encoders read, or of which there
            is not one per prompt; for a call that gives its negative prompt as embeddings.
        UnsupportedPipeline: If the pipeline takes no negative prompt.
        UnsoundCombination: If the call runs without classifier-free guidance, where a negative prompt has no effect.

    Cost:
        None; on guidance-distilled models (Flux), whose true guidance needs a negative prompt, that of the guidance.
    """

    text: str | Sequence[str]

    def __post_init__(self) -> None:
        given: list[Any] = [self.text] if isinstance(self.text, str) else list(self.text)
        if not all(isinstance(each, str) for each in given) or not any(each.strip() for each in given):
            raise InvalidInput(
                f"NegativeText: expected a text that names what is not wanted, or one per prompt, got {self.text!r}"
            )

    def __call__(self, pipe: Pipeline, arguments: dict[str, Any]) -> dict[str, Any]:
        known = parameters(pipe)
        if "negative_prompt" not in known:
            raise UnsupportedPipeline(
                f"NegativeText: expected a pipeline that takes a negative_prompt, got {type(pipe).__name__}, which "
                "does not; use a guard over images, such as SafeDenoiser"
            )
        if arguments.get("negative_prompt_embeds") is not None:
            raise InvalidInput(
                "NegativeText: expected a negative prompt as text, got negative_prompt_embeds, to which none can be "
                "added; pass negative_prompt, or use the guard NegativePrompt"
            )
        _check_guidance(pipe, known | arguments)
        for each in (self.text,) if isinstance(self.text, str) else self.text:
            require_whole(pipe, each, known | arguments)
        size = _prompts(arguments)
        changed = {name: self._joined(arguments[name], size) for name in NAMES if arguments.get(name) is not None}
        return arguments | {"negative_prompt": self._joined(None, size)} | changed

    def _joined(self, own: str | Sequence[str] | None, size: int | None) -> str | list[str]:
        """Our text and the user's own; a list where the call has a list of prompts, as pipelines insist on."""
        count = 1 if size is None else size
        lists = [[text] * count if isinstance(text, str) else list(text) for text in (self.text, own or "")]
        for one in lists:
            if len(one) != count:
                raise InvalidInput(
                    f"NegativeText: expected one text per prompt, got {len(one)} for {count} prompts; a single string "
                    "is for all of them"
                )
        joined = [_join(text, other) for text, other in zip(*lists, strict=True)]
        return joined[0] if size is None else joined


def pieces(pipe: Pipeline, terms: Iterable[str]) -> list[str]:
    """``terms`` as comma-separated texts, as few as the pipeline's text encoders can read whole, in the given order.

    For guards on texts, one per piece: ``chain(*(NegativePrompt(prompt=text) for text in pieces(pipe, terms)))``.

    Args:
        pipe: The pipeline.
        terms: What is not wanted, one thing each.

    Raises:
        InvalidInput: Without a term, or if one alone is too long.
    """
    texts: list[str] = []
    for term in terms:
        longer = _join(texts[-1], term) if texts else term
        if texts and not unread(pipe, longer, {}):
            texts[-1] = longer
        else:
            require_whole(pipe, term, {})
            texts.append(term)
    if not texts:
        raise InvalidInput("pieces: expected at least one term that names what is not wanted, got none")
    return texts


def _join(text: str, other: str) -> str:
    return ", ".join(part for part in (text, other) if part.strip())


def _prompts(arguments: dict[str, Any]) -> int | None:
    """How many prompts the call has, if it has a list of them."""
    prompt = arguments.get("prompt")
    if prompt is None and arguments.get("prompt_embeds") is not None:
        return len(arguments["prompt_embeds"])
    return len(prompt) if isinstance(prompt, list | tuple) else None


def _check_guidance(pipe: Pipeline, call: dict[str, Any]) -> None:
    distilled = getattr(getattr(getattr(pipe, "unet", None), "config", None), "time_cond_proj_dim", None) is not None
    name = "true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale"
    scale = call.get(name)
    if scale is None:
        scale = getattr(getattr(pipe, "guider", None), "guidance_scale", None)
    if distilled or (isinstance(scale, int | float) and scale <= 1.0):
        got = "a guidance-distilled model" if distilled else f"{name}={scale}"
        raise UnsoundCombination(
            f"NegativeText: expected classifier-free guidance ({name} > 1), got {got}, with which "
            f"{type(pipe).__name__} reads no negative prompt; turn guidance on, or use SafeDenoiser, which needs none"
        )


def require_whole(pipe: Pipeline, text: str, call: dict[str, Any]) -> None:
    """Refuse a text of a guard's that the pipeline's encoders would cut: the guard would not act on its end.

    Raises:
        InvalidInput: If it is too long even for the encoder that reads most.
    """
    lost = unread(pipe, text, call)
    if lost:
        raise InvalidInput(
            f"the text of a guard: expected one that {type(pipe).__name__}'s text encoders read whole, got one {lost} "
            f"tokens too long, whose end would be cut without a word: {text!r}. Shorten it, or chain one guard "
            "(NegativePrompt, SLD) per text of prompts.pieces(pipe, terms)"
        )


def unread(pipe: Pipeline, text: str, call: dict[str, Any]) -> int:
    """How many tokens of a text even the pipeline's encoder that reads most would not see."""
    over: list[int] = []
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is None or getattr(pipe, name.replace("tokenizer", "text_encoder"), None) is None:
            continue
        limit = tokenizer.model_max_length
        if "CLIP" not in type(tokenizer).__name__:
            limit = call.get("max_sequence_length") or parameters(pipe).get("max_sequence_length") or limit
        over.append(len(tokenizer(text, verbose=False).input_ids) - limit)
    return max(0, min(over, default=0))
