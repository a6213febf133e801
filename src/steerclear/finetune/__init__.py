"""Guards that live in weights: SafeGen.

>>> pipe = steerclear.load("emoji-sd")
>>> policy = zoo.policy("weapons")
>>> triplets = Triplets.of_sets(policy.negation, policy.safe, pipe)
>>> train(pipe, triplets, SafeGen.small(form="lora"))
>>> save(pipe, "no-weapons")
"""

from steerclear.finetune.adapter import apply, as_adapter, save
from steerclear.finetune.boxes import Boxes, pixelate, whole_object, whole_picture
from steerclear.finetune.safegen import SafeGen
from steerclear.finetune.training import Trained, train
from steerclear.finetune.triplets import Triplets

__all__ = [
    "Boxes",
    "SafeGen",
    "Trained",
    "Triplets",
    "apply",
    "as_adapter",
    "pixelate",
    "save",
    "train",
    "whole_object",
    "whole_picture",
]
