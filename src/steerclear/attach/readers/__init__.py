"""How each scheduler of diffusers reads its network's output; one small function per convention."""

from steerclear.attach.readers.base import Floats, Reading
from steerclear.attach.readers.registry import READERS, UNSUPPORTED, SchedulerReader, reader_of

__all__ = ["READERS", "UNSUPPORTED", "Floats", "Reading", "SchedulerReader", "reader_of"]
