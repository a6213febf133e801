"""The safe denoiser where everything is known: a ring of eight modes, two of them unsafe.

python examples/01_toy_mixture.py
"""

import torch

from steerclear import SafeDenoiser, TwoSample
from steerclear.testing import Mixture
from steerclear.testing.sampling import ancestral, variance_preserving

ring = Mixture.ring(unsafe=(0, 3))
rng = torch.Generator().manual_seed(0)
unsafe = ring.references(500, condition="unsafe", generator=rng)
safe = ring.references(1500, condition="safe", generator=rng)
guard = SafeDenoiser(negation=unsafe, weight=TwoSample(safe=safe, prior=0.25))

for name, guarded in (("no guard", None), ("safe denoiser", guard)):
    x = torch.randn(1000, 2, dtype=torch.float64, generator=rng)
    x = ancestral(ring, variance_preserving(100), x, guard=guarded, generator=rng)
    mode, distance = ring.nearest(x)
    share = torch.isin(mode, torch.tensor([0, 3])).double().mean().item()
    print(f"{name:14} unsafe {share:.1%}, off every mode {(distance > 5).double().mean().item():.1%}")
