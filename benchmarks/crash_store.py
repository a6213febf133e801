"""Kills writers of a negation store with SIGKILL at random moments, and checks what is left every time.

A writer adds, removes, replaces and compacts at random and reports each operation twice: before it begins, and when it
has returned. After the kill the store must open, verify, and hold exactly what the returned operations made of it, with
the one that was under way done as a whole or not at all. Meanwhile a reader follows the store, and every vector that it
sees must be the one that belongs to its label. Prints JSON. Usage::

    python benchmarks/crash_store.py [kills] [seed] > benchmarks/results/crash_store.json

Needs a system that can fork. SIGKILL ends a process, not the power: what had been handed to the system survives it.
"""

import json
import os
import platform
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

import steerclear
from steerclear.negation import NegationSet, NegationStore, Space

SPACE = Space(encoder="pixels", shape=(4, 8, 8), name="crash test")
State = dict[str, int]
"""What a store holds: a number for every id, from which its vector is drawn."""


def vector(value: int) -> np.ndarray[Any, np.dtype[np.float16]]:
    """The vector that belongs to a number."""
    return np.random.default_rng(value).standard_normal(SPACE.shape).astype(np.float16)


def items(state: State) -> NegationSet:
    """A set of it, each label the number."""
    latents = torch.from_numpy(np.stack([vector(value) for value in state.values()]))
    return NegationSet(latents=latents, space=SPACE, ids=tuple(state), labels=tuple(map(str, state.values())))


def operation(rng: random.Random, state: State) -> tuple[str, Any]:
    """Something to do that fits the state."""
    kind = rng.choices(["add", "remove", "replace", "compact"], [5, 3, 2, 2])[0]
    values = [rng.getrandbits(40) for _ in range(rng.randint(1, 4))]
    if kind == "add" or not state:
        return "add", {f"item-{value}": value for value in values}
    some = rng.sample(sorted(state), min(len(values), len(state)))
    if kind == "replace":
        return "replace", dict(zip(some, values, strict=False))
    return (kind, some) if kind == "remove" else (kind, None)


def after(state: State, kind: str, what: Any) -> State:  # noqa: ANN401 - from JSON
    """What an operation makes of a state."""
    if kind == "remove":
        return {name: value for name, value in state.items() if name not in what}
    return state if kind == "compact" else {**state, **what}


def write(path: Path, state: State, seed: int, report: int) -> None:
    """The writer: one operation after the other, for ever."""
    rng = random.Random(seed)
    with NegationStore.open(path) as store:
        while True:
            kind, what = operation(rng, state)
            os.write(report, json.dumps([kind, what]).encode() + b"\n")
            if kind == "compact":
                store.compact()
            elif kind == "remove":
                store.remove(what)
            else:
                (store.add if kind == "add" else store.replace)(items(what))
            os.write(report, b"done\n")
            state = after(state, kind, what)


def killed(path: Path, state: State, rng: random.Random, check: Any) -> list[str]:  # noqa: ANN401 - a function
    """What a writer reported until it was killed."""
    read, report = os.pipe()
    seed, patience = rng.getrandbits(32), rng.uniform(0.005, 0.12)
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            write(path, state, seed, report)
        except BaseException as error:  # whatever it is, the parent must hear of it
            os.write(report, json.dumps(["error", repr(error)]).encode() + b"\n")
        finally:
            os._exit(1)
    os.close(report)
    end = time.monotonic() + patience
    while time.monotonic() < end:
        check()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as pipe:
        return pipe.read().decode().splitlines()


def held(store: NegationStore) -> State:
    """What a store holds, told from its vectors."""
    now = store.snapshot()
    for label, latent in zip(now.labels, now.latents.numpy(), strict=True):
        if not np.array_equal(latent, vector(int(label))):
            raise AssertionError(f"another vector than that of {label}")
    return dict(zip(now.ids, map(int, now.labels), strict=True))


def main(kills: int, seed: int) -> dict[str, Any]:
    """The result; raises at the first thing that is not as it should be."""
    rng, state, begun = random.Random(seed), State(), time.monotonic()
    under_way, done, looks = Counter[str](), Counter[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "crash.negation"
        NegationStore.create(path, SPACE).close()
        for kill in range(kills):
            follower = NegationStore.open(path, readonly=True)

            def check(follower: NegationStore = follower) -> None:
                nonlocal looks
                held(follower)
                looks += 1

            lines = killed(path, state, rng, check)
            pending: tuple[str, Any] | None = None
            for line in lines:
                if line == "done" and pending is not None:
                    state, pending = after(state, *pending), None
                    continue
                pending = tuple(json.loads(line))
                if pending[0] == "error":
                    raise AssertionError(f"kill {kill}: {pending[1]}")
                done[pending[0]] += 1
            allowed = [state] if pending is None else [state, after(state, *pending)]
            under_way["nothing" if pending is None else pending[0]] += 1
            with NegationStore.open(path) as store:
                report = store.verify()
                found = held(store)
                if found not in allowed or report.items != len(found):
                    raise AssertionError(f"kill {kill}, seed {seed}: expected one of {allowed}, got {found}")
            if held(follower) != found:
                raise AssertionError(f"kill {kill}: a reader that was open sees something else")
            follower.close()
            state = found
    return {
        "survived": f"{kills}/{kills}",
        "seed": seed,
        "killed during": dict(under_way.most_common()),
        "operations begun": dict(done.most_common()),
        "snapshots checked meanwhile": looks,
        "seconds": round(time.monotonic() - begun, 1),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "steerclear": steerclear.__version__,
        },
    }


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    print(json.dumps(main(*(arguments + [200, 0][len(arguments) :])), indent=1))
