"""A negation set of one's own: from pictures, kept in one file, changed by id; and a service that stays guarded.

python examples/03_own_negation_set.py
"""

import tempfile
from pathlib import Path

import torch

import steerclear

pipe = steerclear.load("emoji-sd")
call = {"num_inference_steps": 4, "guidance_scale": 3.0}
bombs = steerclear.NegationSet.generate(pipe, ["a bomb"], 3, progress=False, **call)
apples = steerclear.NegationSet.generate(pipe, ["a red apple", "a cat face"], 3, progress=False, **call)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "bombs.safetensors"
    bombs.save(path)
    bombs = steerclear.NegationSet.load(path).remove(bombs.ids[0])
print(bombs)

guard = steerclear.SafeDenoiser(negation=bombs, weight=steerclear.TwoSample(safe=apples, bandwidth=6.0))
trace = steerclear.apply_guard(pipe, guard)  # every call from now on, until remove_guard
pipe("a bomb", generator=torch.Generator().manual_seed(1), **call)
steerclear.remove_guard(pipe)
print(trace.summary())
