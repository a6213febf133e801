"""Everything that steerclear raises on purpose; each message says what was expected, what was got, what to do.

::

    SteerclearError
    ├── GuardNotApplied        a step of the sampler did not reach the guard: no image is returned
    ├── UnsupportedScheduler   the scheduler has no continuous denoised estimate
    ├── UnsupportedPipeline    the pipeline's sampler space or branches could not be established
    ├── UnsoundCombination     runs, but would not do what its name says
    ├── NegationMismatch       the negation set lives in another space than the sampler
    ├── NegationFileError      a negation file that cannot be read or written
    ├── SampleRefused          a finished sample could not be certified: no image is returned
    ├── MissingExtra           an optional dependency is not installed
    └── InvalidInput           a value outside its documented range (also a ValueError)
"""


class SteerclearError(Exception):
    """Base of all errors raised on purpose by this package."""


class GuardNotApplied(SteerclearError):
    """A guard was attached and at least one step did not reach it. The call returned no image."""


class UnsupportedScheduler(SteerclearError):
    """The scheduler cannot be guarded; the message says why and names ones that can."""


class UnsupportedPipeline(SteerclearError):
    """The pipeline's latent space or its branches could not be established."""


class UnsoundCombination(SteerclearError):
    """The combination runs, but not with the meaning that its parts promise."""


class NegationMismatch(SteerclearError):
    """A negation set made in another space: other encoder, other shape, other normalisation."""


class NegationFileError(SteerclearError):
    """A negation file that is missing, truncated, hostile or cannot be written."""


class SampleRefused(SteerclearError):
    """A finished sample does not meet what a guard promises about results, and could not be brought to.

    Args:
        message: What was expected, got, and what to do.
        samples: Their rows in the batch.
    """

    def __init__(self, message: str, samples: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.samples = samples


class MissingExtra(SteerclearError):
    """An optional dependency is not installed; the message holds the pip command."""


class InvalidInput(SteerclearError, ValueError):
    """A value outside its documented range."""
