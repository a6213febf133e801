"""``attach``, ``apply_guard`` and ``remove_guard``: the pipeline's class swap around the scheduler's."""

import functools
import inspect
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

from steerclear.attach.coupling import COUPLINGS, Coupling
from steerclear.attach.layer import Attachment
from steerclear.attach.patch import disguise, stock_class, swapped
from steerclear.attach.readers import reader_of
from steerclear.attach.run import Run
from steerclear.attach.trace import Trace
from steerclear.errors import GuardNotApplied, InvalidInput, UnsoundCombination, UnsupportedPipeline
from steerclear.guards.base import Guard, Requires

PromptGuard = Callable[[Any, dict[str, Any]], dict[str, Any]]
"""``(pipe, arguments of the call by name) -> arguments``: rewrites prompts or embeddings before the pipeline runs."""

Pipeline = Any  # classic and modular pipelines share no typed interface

_ATTACHED: WeakKeyDictionary[object, list[Attachment]] = WeakKeyDictionary()


@contextmanager
def attach(
    pipe: Pipeline, *guards: Guard, prompts: PromptGuard | None = None, coupling: Coupling = "score"
) -> Generator[Trace]:
    r"""Guard every call of ``pipe`` inside the block.

    .. math:: o' = o + (\hat x' - \hat x)/k_o \qquad \text{where } \hat x = k_x x_t + k_o o

    at every call of the scheduler's ``step`` (``coupling="score"``; the others in :mod:`steerclear.attach.coupling`).
    Blocks nest; the outer guards act first. Between calls the scheduler is the stock one.

    Args:
        pipe: Any classic or modular diffusers pipeline with a component ``scheduler``.
        guards: Applied left to right.
        prompts: Rewrites the call's arguments first.
        coupling: How an edited estimate meets the sampler.

    Returns:
        The trace, filled call by call.

    Raises:
        UnsupportedScheduler: The scheduler cannot be guarded.
        UnsupportedPipeline: There is no scheduler, or the branches that a guard needs cannot be found.
        UnsoundCombination: A guard does not fit this scheduler, or its guidance.
        NegationMismatch: A negation set lives in another space.
        GuardNotApplied: From the pipeline's call: some step did not reach the guards, and no image is returned.

    Cost:
        Under 100 µs a step beyond the guards, at 4×64×64 on a CPU; no network evaluation, no device synchronisation.

    Equal to:
        The unguarded pipeline, bit for bit, while no guard changes anything.
    """
    attachment = _add(pipe, guards, prompts, coupling, standing=False)
    try:
        yield attachment.trace
    finally:
        _drop(pipe, [attachment])


def apply_guard(
    pipe: Pipeline, *guards: Guard, prompts: PromptGuard | None = None, coupling: Coupling = "score"
) -> Trace:
    """Guard every call of ``pipe`` from now on, as :func:`attach` does; for services. Undone by :func:`remove_guard`.

    A pipeline made from this one (``from_pipe``, a copy, a saved and loaded one) is *not* guarded.
    """
    return _add(pipe, guards, prompts, coupling, standing=True).trace


def remove_guard(pipe: Pipeline) -> None:
    """Undo every :func:`apply_guard` on ``pipe``; a block of :func:`attach` that is still open keeps its guards."""
    _drop(pipe, [attachment for attachment in _ATTACHED.get(pipe, []) if attachment.standing])


def scheduler_of(pipe: Pipeline) -> Any:  # noqa: ANN401 - any scheduler
    """The scheduler that is guarded: the component named ``scheduler``.

    Raises:
        UnsupportedPipeline: There is none.
    """
    scheduler = getattr(pipe, "components", {}).get("scheduler")
    if scheduler is None:
        raise UnsupportedPipeline(
            f"attach: expected a pipeline with a component 'scheduler', got {type(pipe).__name__} without one. "
            "Attach to the pipeline that runs the sampling loop"
        )
    return scheduler


@contextmanager
def suspended(pipe: Pipeline) -> Generator[None]:
    """Take all guards off ``pipe`` for the length of the block: for self-tests that sample with it."""
    attachments = _ATTACHED.pop(pipe, None)
    _dress(pipe)
    try:
        yield
    finally:
        if attachments:
            _ATTACHED[pipe] = attachments
        _dress(pipe)


def _add(
    pipe: Pipeline, guards: tuple[Guard, ...], prompts: PromptGuard | None, coupling: Coupling, *, standing: bool
) -> Attachment:
    if coupling not in COUPLINGS:
        raise InvalidInput(f"attach: expected coupling to be one of {', '.join(COUPLINGS)}, got {coupling!r}")
    for guard in guards:
        if not callable(guard):
            raise InvalidInput(
                f"attach: expected guards, callables (denoised, state) -> denoised or None, got {type(guard).__name__}"
            )
    attachment = Attachment(guards=guards, coupling=coupling, prompts=prompts, standing=standing)
    _check(pipe, [attachment])
    _ATTACHED.setdefault(pipe, []).append(attachment)
    _dress(pipe)
    return attachment


def _drop(pipe: Pipeline, gone: list[Attachment]) -> None:
    left = [attachment for attachment in _ATTACHED.get(pipe, []) if not any(attachment is other for other in gone)]
    if left:
        _ATTACHED[pipe] = left
    else:
        _ATTACHED.pop(pipe, None)
    _dress(pipe)


def _dress(pipe: Pipeline) -> None:
    """Give ``pipe`` the class that fits: guarded while something is attached, stock otherwise."""
    stock = stock_class(pipe)
    object.__setattr__(pipe, "__class__", _guarded_class(stock) if _ATTACHED.get(pipe) else stock)


@functools.cache
def _guarded_class(stock: Any) -> type:  # noqa: ANN401 - a pipeline class
    @functools.wraps(stock.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the pipeline's types
        attachments = _ATTACHED.get(self)
        if not attachments:
            return stock.__call__(self, *args, **kwargs)
        return _guarded_call(self, stock.__call__, list(attachments), args, kwargs)

    makers = ("from_pipe", "from_pretrained", "from_config")
    namespace: dict[str, Any] = {name: _as_stock(stock, name) for name in makers if hasattr(stock, name)}
    return disguise("Guarded" + stock.__name__, stock, {"__call__": call, **namespace})


def _as_stock(stock: Any, name: str) -> Any:  # noqa: ANN401 - a pipeline class and a class method
    """A class method that makes new pipelines makes stock ones."""
    return classmethod(lambda cls, *args, **kwargs: getattr(stock, name)(*args, **kwargs))


def _guarded_call(
    pipe: Pipeline,
    original: Callable[..., Any],
    attachments: list[Attachment],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:  # noqa: ANN401 - whatever the pipeline returns
    _check(pipe, attachments)
    for attachment in attachments:
        if attachment.prompts is not None:
            args, kwargs = (), dict(attachment.prompts(pipe, _by_name(pipe, original, args, kwargs)))
    scheduler = scheduler_of(pipe)
    with ExitStack() as stack:
        hook = _hook(pipe, attachments, stack)
        run = Run(pipe, scheduler, attachments, call=_by_name(pipe, original, args, kwargs), hook=hook)
        stack.enter_context(swapped(scheduler, run))
        stack.enter_context(run.ending.watching())
        result = original(pipe, *args, **kwargs)
        run.finish()
    if scheduler_of(pipe) is not scheduler:
        raise GuardNotApplied(
            f"{type(pipe).__name__}: expected the scheduler to stay the same during a call, got another "
            f"{type(scheduler_of(pipe)).__name__} that was not guarded. No image is returned; set it between calls"
        )
    return result


def _by_name(
    pipe: Pipeline, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The call's arguments by name; a wrong call is left for the pipeline itself to refuse."""
    try:
        bound = inspect.signature(original).bind_partial(pipe, *args, **kwargs)
    except TypeError:
        return dict(kwargs)
    named: dict[str, Any] = dict(bound.arguments)
    extra = cast("dict[str, Any]", named.pop("kwargs", {}))
    named.pop("self", None)
    return named | extra


def _hook(pipe: Pipeline, attachments: list[Attachment], stack: ExitStack) -> Any:  # noqa: ANN401 - a BranchHook
    needs = Requires()
    for attachment in attachments:
        needs |= attachment.requires
    if not needs.network:
        return None
    from steerclear.attach.branches import BranchHook

    return stack.enter_context(BranchHook(pipe, needs=needs))


def _check(pipe: Pipeline, attachments: list[Attachment]) -> None:
    """Refuse before sampling what cannot work; the pipeline stands stock meanwhile, for checks that sample."""
    scheduler = scheduler_of(pipe)
    reader = reader_of(scheduler)
    total = Requires()
    for attachment in attachments:
        total |= attachment.requires
        if attachment.requires.one_call and not reader.one_call:
            raise UnsoundCombination(
                f"{attachment.names} needs one network evaluation per step, got {type(scheduler).__name__}, which "
                "makes more. Use DDPMScheduler, DDIMScheduler or EulerAncestralDiscreteScheduler"
            )
    if total.negation:
        from steerclear.attach import space

        with suspended(pipe):
            space.check(pipe, total.negation)
