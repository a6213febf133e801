"""A process that ends as if the power went, for the tests of what it leaves on the disk."""

import os
import signal


def die_at(writes):
    """Makes the n-th flush to the disk the last thing that this process does, just before it; at 0 it lives on."""
    flush, left = os.fsync, [writes]

    def fsync(handle):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(handle)

    os.fsync = fsync
