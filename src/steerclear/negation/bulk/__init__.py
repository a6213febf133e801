"""Negation sets from more pictures than one process cares to encode: folders, Parquet and tar files, on many machines.

::

    sources ─► entries, cut into chunks ─► a worker's part for each chunk ─► assemble ─► one file, or a store
    (tars, parquet)                        (reader, encoder, known parts)

Chunks depend on the source alone, and parts on the contents of a chunk, the encoder and the kind of machine; so the
set is the same whoever makes which part, and a part that is there is never made again.
"""

from steerclear.negation.bulk.build import Built, build_many

__all__ = ["Built", "build_many"]
