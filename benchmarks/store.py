"""How long changes to a negation store take, and how soon a running process knows of them. Prints JSON. Usage::

    python benchmarks/store.py [N ...] > benchmarks/results/store.json

Vectors of 4x16x16 in float16. Every figure is the median of its repetitions, in milliseconds of wall time. ``add`` and
``remove`` are of one item and end when it is on disk; ``follow`` is what a live set takes to know of one change made
by another connection, with the checks that a guard makes anew; ``follow nothing`` the same where nothing has changed.
Beside it: what the single file takes for one more item, and what one fsync takes on this disk at that moment: an
addition waits for two, a removal for one.
"""

import json
import os
import platform
import sqlite3
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from watch import timed

import steerclear
from steerclear.denoise import DenoiseState
from steerclear.guards import TwoSample
from steerclear.negation import NegationSet, NegationStore, Space
from steerclear.noise import NoiseLevel

SPACE = Space(encoder="pixels", shape=(4, 16, 16), name="benchmark")
REPEATS = 25
STEP = 10_000  # items added at a time
once = partial(timed, repeats=1, warm=False)


def drawn(n: int, seed: int) -> NegationSet:
    """Random items with labels, ids and digests of their own."""
    latents = torch.randn(n, *SPACE.shape, generator=torch.Generator().manual_seed(seed)).half()
    ids, labels = (tuple(f"{name}{k}" for k in range(n)) for name in (f"folder/{seed}-", "label "))
    digests = tuple(f"sha256:{seed:032x}{k:032x}" for k in range(n))
    return NegationSet(
        latents=latents, space=SPACE, ids=ids, labels=tuple(each[:7] for each in labels), digests=digests
    )


def measure(n: int, folder: Path) -> dict[str, Any]:
    """The figures at one size."""
    path, file = folder / f"{n}.negation", folder / f"{n}.safetensors"
    store = NegationStore.create(path, SPACE)
    filling = sum(once(lambda k=k: store.add(drawn(min(STEP, n - k), k))) for k in range(0, n, STEP))
    reader = NegationStore.open(path, readonly=True)
    result: dict[str, Any] = {"items": n, "add, each of many": filling / n}
    result["first look"] = once(reader.snapshot)
    live, weight = reader.live(), TwoSample(safe=drawn(1000, 10**9), bandwidth=1.0)
    x = torch.zeros(1, *SPACE.shape)

    def follow() -> None:
        weight.at(live, DenoiseState(x_t=x, level=NoiseLevel(0.8, 0.6), step=0, num_steps=1), None)

    probe = os.open(folder / "probe", os.O_WRONLY | os.O_CREAT)
    took: dict[str, list[float]] = {}
    for k in range(REPEATS):
        one = drawn(1, 10**6 + k)
        took.setdefault("add", []).append(once(lambda one=one: store.add(one)))
        took.setdefault("follow an addition", []).append(once(follow))
        took.setdefault("follow nothing", []).append(once(lambda: live.current))
        waited = once(lambda: (os.write(probe, bytes(2048)), os.fsync(probe)))
        took.setdefault("write and fsync 2 KiB", []).append(waited)
    os.close(probe)
    for k in range(REPEATS):
        took.setdefault("remove", []).append(once(lambda k=k: store.remove(f"folder/{10**6 + k}-0")))
        took.setdefault("follow a removal", []).append(once(follow))
    for k in range(3):
        store.remove(f"folder/0-{k + 1}")
        took.setdefault("compact", []).append(once(store.compact))
        took.setdefault("follow a compaction", []).append(once(follow))
        took.setdefault("verify", []).append(once(store.verify))
    store.to_set().save(file)
    for _ in range(3):
        took.setdefault("single file: add", []).append(once(lambda: NegationSet.load(file).add(drawn(1, 7)).save(file)))
    result |= {name: median(values) for name, values in took.items()}
    result["MiB on disk"] = sum(each.stat().st_blocks for each in path.iterdir()) / 2048
    return {name: round(value, 4) for name, value in result.items()}


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    sizes = [int(argument) for argument in sys.argv[1:]] or [1_000, 10_000, 100_000]
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "what": "milliseconds, medians; vectors 4x16x16 float16, one thread",
            "machine": {"processor": platform.processor() or platform.machine(), "system": platform.platform()},
            "load": [round(value, 1) for value in os.getloadavg()],
            "versions": {
                "python": platform.python_version(),
                "sqlite": sqlite3.sqlite_version,
                "torch": torch.__version__,
                "steerclear": steerclear.__version__,
            },
            "results": [measure(n, Path(folder)) for n in sizes],
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
