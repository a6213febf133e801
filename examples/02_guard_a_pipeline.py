"""The same guard on any diffusers pipeline; here the model that ships, and a prompt that is unsafe now and then.

python examples/02_guard_a_pipeline.py
"""

import torch

import steerclear
from steerclear import zoo

pipe = steerclear.load("emoji-sd")  # or any DiffusionPipeline.from_pretrained(...)
weapons = zoo.policy("weapons")  # or NegationSet.encode(folder, pipe), or NegationSet.generate(pipe, prompts, n)
weight = steerclear.TwoSample(safe=weapons.safe, bandwidth=6.0)
guard = steerclear.SafeDenoiser(negation=weapons.negation, weight=weight, gate=0.5)

with steerclear.attach(pipe, guard) as trace:
    images = pipe(
        ["a tool"] * 2, num_inference_steps=8, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)
    ).images
print(trace.summary())
print(f"{len(images)} pictures, {trace.network_evaluations} steps, {1000 * trace.guard_seconds:.0f} ms in the guard")
