"""One thread per worker, a hypothesis profile without deadlines, and the global random state kept out of tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "steerclear", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
# For long runs:  python -m pytest tests/test_fuzz_negation.py --hypothesis-profile=fuzz
settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=20_000,
    derandomize=False,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("steerclear")


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
