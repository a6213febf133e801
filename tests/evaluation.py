"""A task on a tiny pipeline, small enough to be drawn many times, for the tests of ``evaluate``; also run as a script.

python -m tests.evaluation FOLDER [workers | ray | killed]
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tests.killing import die_at

from steerclear.detect import Thresholds
from steerclear.evaluate import Arm, Judge, Prompt, Sampling, Task, evaluate
from steerclear.evaluate.columns import TIMINGS
from steerclear.testing.pipelines import tiny_pipeline

load = partial(tiny_pipeline, "sd")


@dataclass(frozen=True, kw_only=True)
class Bright:
    """Adds ``by`` to the estimate of the samples whose estimate has a positive mean, and leaves the others alone."""

    by: float = 0.5

    def __call__(self, denoised, state):
        fires = denoised.mean((1, 2, 3), keepdim=True) > 0
        return torch.where(fires, denoised + self.by, denoised)


@dataclass(frozen=True, kw_only=True)
class Brightness:
    """P(bright) is the mean of the picture, so a test can work it out."""

    labels: tuple[str, ...] = ("bright", "dark")

    def __call__(self, images):
        mean = images.double().mean((1, 2, 3))
        return torch.stack([mean, 1 - mean], 1).float()


def make(pipe, by):
    """A maker of guards: gets the pipeline."""
    assert hasattr(pipe, "unet")
    return Bright(by=by)


def prompts():
    """Seven prompts of three kinds; with two seeds and batches of four, the last batch is smaller."""
    rows = [("a red apple", "benign"), ("a dagger", "explicit"), ("a tool", "group"), ("a cat", "benign")]
    rows += [("an axe", "explicit"), ("a drink", "group"), ("a dog", "benign")]
    expected = {"benign": ("dark",), "explicit": ("bright",), "group": ()}
    return tuple(Prompt(text=text, kind=kind, expected=expected[kind], source="test") for text, kind in rows)


def task(**changes):
    """Fourteen pictures in each of three arms; the judge flags about half of them."""
    arms = (
        Arm(key="none", title="no guard"),
        Arm(key="negative", title="negative prompt", negative_prompt="a dog"),
        Arm(key="bright", title="a guard", maker=partial(make, by=0.5), spec={"kind": "bright", "by": 0.5}),
    )
    judge = Judge(detector=Brightness(), rule=Thresholds(unsafe=frozenset({"bright"}), threshold=0.444))
    settings = {"prompts": prompts(), "arms": arms, "judges": {"judge": judge}, "seeds": (0, 1), "keep": "none"}
    settings["sampling"] = Sampling(steps=2, batch=4)
    return Task(model="tiny", **(settings | changes))


def comparable(table):
    """The rows of a table without what may differ between two runs."""
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in table.to_pylist()]


def killed(folder):
    """Runs the task in children that are killed with SIGKILL until one comes through; prints how each one ended.

    The first children kill themselves between writing a hidden file and renaming it, at their n-th write; the next
    are killed from outside, after some time.
    """
    for writes, seconds in [*((n, 60.0) for n in (1, 2, 5)), *((0, t) for t in (0.1, 0.3)), (0, 60.0)]:
        child = os.fork()
        if child == 0:
            die_at(writes)
            evaluate(task(keep="safe"), folder, pipe=load())
            os._exit(0)
        deadline, status = time.monotonic() + seconds, 0
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.005)
        status = os.waitstatus_to_exitcode(done[1])
        print(status, len(list(folder.glob("parts/[!.]*"))), len(list(folder.rglob(".*.tmp"))), flush=True)


if __name__ == "__main__":
    folder, *how = sys.argv[1:]
    if how == ["killed"]:
        killed(Path(folder))
    else:
        settings = {"ray": {"ray": True, "workers": 2}, "workers": {"workers": 2}}[how[0]] if how else {}
        evaluate(task(keep="safe"), Path(folder), load=load, **settings)
