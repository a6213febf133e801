"""Files of every kind: written whole or not at all, and tensors in files that are not trusted.

:mod:`~steerclear.files.atomic` writes; :mod:`~steerclear.files.tensors` is the one way in which this package writes
safetensors files and reads those of others, with :mod:`~steerclear.files.scan` for their text;
:mod:`~steerclear.files.states` keeps what a training goes on from.
"""

from steerclear.files.atomic import sync_folder, write_atomic

__all__ = ["sync_folder", "write_atomic"]
