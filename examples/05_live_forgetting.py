"""A service that forgets one picture while it runs: added by id, the next request keeps away from it; removed, it is
as if it had never been there. Another process does the removing.

python examples/05_live_forgetting.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import steerclear
from steerclear.negation import NegationSet, NegationStore, encoder_of

pipe = steerclear.load("emoji-sd")
pipe.set_progress_bar_config(disable=True)
RADIUS = 12.0  # in latent units: apples that this model draws are 7 to 15 apart


def draw() -> np.ndarray:
    """One request: the same one every time."""
    generator = torch.Generator().manual_seed(3)
    return pipe("a red apple", num_inference_steps=8, generator=generator, output_type="np").images[0]


with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "forgotten.negation"
    store = NegationStore.create(path, encoder_of(pipe).space)

    # The service: guarded once, for as long as it lives; nothing is to be forgotten yet.
    protected = store.live(allow_empty=True)
    guard = steerclear.SPELL(shields=(steerclear.Shield(negation=protected, radius=RADIUS),))
    trace = steerclear.apply_guard(pipe, guard)
    before = draw()

    # Somebody asks for this very picture to be forgotten.
    picture = torch.from_numpy(before).permute(2, 0, 1)
    store.add(NegationSet.encode([picture], pipe, ids=["apple-3"], progress=False), provenance="a request by e-mail")
    kept_away = draw()
    distance = float(trace.calls[-1].steps[-1].notes["final distance"])
    print(f"protected: the sample is {distance:.2f} away from apple-3; certified {RADIUS}")

    # Another process takes the request back.
    command = [sys.executable, "-m", "steerclear", "negate", "remove", str(path), "apple-3"]
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - our own words
    after = draw()
    print(f"changed while it was there: {not np.array_equal(before, kept_away)}")
    print(f"bit-identical after its removal: {np.array_equal(before, after)}")
    store.close()
