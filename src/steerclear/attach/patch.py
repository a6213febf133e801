"""The scheduler's class swap: ``step`` of one instance goes through the guards for the length of a pipeline call.

The stand-in class keeps the name, module and signature of the original, so that pipelines that probe ``step`` for
``eta`` or ``generator``, ``isinstance``, ``save_pretrained``, ``pickle`` and ``from_config`` see the stock scheduler.
Which guards belong to an instance is kept beside the instances, never on them.
"""

import copy
import copyreg
import functools
import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from steerclear.attach.readers import reader_of

Step = Callable[..., Any]


class Interceptor(Protocol):
    """What the swapped methods report to."""

    def step(self, scheduler: Any, original: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...  # noqa: ANN401

    def restarted(self, scheduler: object) -> None: ...

    def copied(self, scheduler: object, original: object) -> None: ...

    def bypassed(self, method: str) -> None: ...


_INTERCEPTORS: WeakKeyDictionary[object, list[Interceptor]] = WeakKeyDictionary()

# Methods that advance a sample without ``step``: a pipeline that uses one did not reach the guard.
_BYPASSES = ("batch_step_no_noise",)


@contextmanager
def swapped(scheduler: Any, interceptor: Interceptor) -> Generator[None]:  # noqa: ANN401 - any scheduler
    """Send the steps of ``scheduler``, and what its copies do, through ``interceptor`` until the block ends.

    Nests: the interceptor that came first acts first.
    """
    stack = _INTERCEPTORS.setdefault(scheduler, [])
    stock = stock_class(scheduler)
    stack.append(interceptor)
    _set_class(scheduler, stand_in(stock))
    try:
        yield
    finally:
        stack.remove(interceptor)
        for instance in [other for other, its in _INTERCEPTORS.items() if its is stack] if not stack else []:
            _set_class(instance, stock_class(instance))
            del _INTERCEPTORS[instance]


def stock_class(instance: object) -> type:
    """The class of ``instance`` behind the stand-in, if there is one."""
    return getattr(type(instance), "_steerclear_stock", type(instance))


def disguise(name: str, stock: type, namespace: dict[str, Any]) -> type:
    """A subclass of ``stock`` that goes by its name; ``name`` is for error messages while it is made."""
    outward = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    marks = {"_steerclear_stock": stock, "__reduce_ex__": _reduce_as_stock, "__slots__": ()}
    made = type(name, (stock,), outward | marks | namespace)
    made.__name__ = stock.__name__
    return made


def plain(instance: Any) -> Any:  # noqa: ANN401 - any object with a __dict__
    """A shallow copy of ``instance`` with its stock class."""
    stock = stock_class(instance)
    twin = object.__new__(stock)
    twin.__dict__.update(instance.__dict__)
    return twin


@functools.cache
def stand_in(stock: type) -> type:
    """The class that stands in for the scheduler class ``stock``."""
    method = reader_of(object.__new__(stock)).method
    namespace: dict[str, Any] = {
        method: _through(stock, method),
        "set_timesteps": _restarting(stock),
        "__deepcopy__": _deep_copy,
        "__copy__": _shallow_copy,
        "from_config": classmethod(lambda cls, *a, **k: stock.from_config(*a, **k)),
        "from_pretrained": classmethod(lambda cls, *a, **k: stock.from_pretrained(*a, **k)),
    }
    namespace |= {name: _bypass(stock, name) for name in _BYPASSES if hasattr(stock, name)}
    return disguise("Guarded" + stock.__name__, stock, namespace)


def parameters_of(step: Step) -> tuple[str, ...]:
    """Names of the parameters of ``step`` behind ``self``: schedulers order them differently."""
    return tuple(inspect.signature(step).parameters)[1:]


def _through(stock: Any, method: str) -> Step:  # noqa: ANN401 - a scheduler class
    original = getattr(stock, method)

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the original's types
        run = original
        for interceptor in reversed(_INTERCEPTORS.get(self, ())):
            run = functools.partial(_intercept, interceptor, run)
        return run(self, *args, **kwargs)

    return step


def _intercept(interceptor: Interceptor, run: Step, scheduler: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    return interceptor.step(scheduler, run, args, kwargs)


def _restarting(stock: Any) -> Step:  # noqa: ANN401 - a scheduler class
    original = stock.set_timesteps

    @functools.wraps(original)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the original's types
        for interceptor in _INTERCEPTORS.get(self, ()):
            interceptor.restarted(self)
        return original(self, *args, **kwargs)

    return set_timesteps


def _bypass(stock: Any, name: str) -> Step:  # noqa: ANN401 - a scheduler class
    original = getattr(stock, name)

    @functools.wraps(original)
    def bypass(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the original's types
        for interceptor in _INTERCEPTORS.get(self, ()):
            interceptor.bypassed(name)
        return original(self, *args, **kwargs)

    return bypass


def _deep_copy(self: Any, memo: dict[int, Any]) -> Any:  # noqa: ANN401 - any scheduler
    twin = copy.deepcopy(plain(self), memo)
    memo[id(self)] = twin
    return _adopt(twin, self)


def _shallow_copy(self: Any) -> Any:  # noqa: ANN401 - any scheduler
    return _adopt(plain(self), self)


def _adopt(twin: object, original: object) -> object:
    """A copy shares the guards of its original, and everyone is told that it is a copy."""
    stack = _INTERCEPTORS.get(original)
    if stack:
        _INTERCEPTORS[twin] = stack
        _set_class(twin, type(original))
        for interceptor in stack:
            interceptor.copied(twin, original)
    return twin


def _reduce_as_stock(self: Any, protocol: Any) -> Any:  # noqa: ANN401 - the pickle protocol
    # Not the usual __newobj__, whose class pickle compares with that of the instance.
    return vars(copyreg)["_reconstructor"], (stock_class(self), object, None), dict(vars(self))


def _set_class(instance: object, cls: type) -> None:
    # Past any __setattr__ of the instance's own: diffusers' pipelines record assignments in their config.
    object.__setattr__(instance, "__class__", cls)
