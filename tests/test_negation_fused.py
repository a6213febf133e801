"""The compiled kernels against the equations typed in NumPy float64, at every storage precision and odd size."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from steerclear.negation import NegationSet, Space
from steerclear.negation.posterior import posterior, squared_distances
from steerclear.noise import NoiseLevel

fused = pytest.importorskip("steerclear.negation.fused", reason="needs Numba: pip install 'steerclear[fast]'")
#: Relative error of the mean that each storage allows, against the values before they were stored.
STORED = {torch.float32: 1e-5, torch.float16: 3e-4, torch.bfloat16: 2e-3}
LEVELS = {"exact": (1.0, 0.02), "late": (0.99, 0.15), "middle": (0.7, 0.7), "early": (0.07, 1.0), "ve": (1.0, 14.6)}


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Small sets too, and threads of their own for every few rows."""
    monkeypatch.setattr(fused, "LEAST", 0)
    monkeypatch.setattr(fused, "SHARE", 1)


def brute_force(x, y, w, alpha, sigma):
    """Mean and log-evidence from all distances at once, in float64."""
    x, y, w = (np.asarray(v, dtype=np.float64) for v in (x, y, w))
    squared = ((x[:, None] - np.asarray(alpha).reshape(-1, 1, 1) * y) ** 2).sum(2)
    sigma = np.broadcast_to(np.asarray(sigma, dtype=np.float64), len(x))
    with np.errstate(divide="ignore"):
        logits = np.log(w / w.sum()) - squared / (2 * sigma[:, None] ** 2)
    top = logits.max(1, keepdims=True)
    weights = np.exp(logits - top)
    evidence = top[:, 0] + np.log(weights.sum(1)) - x.shape[1] * np.log(2 * np.pi * sigma**2) / 2
    return weights @ y / weights.sum(1, keepdims=True), evidence


def problem(rng, n, dim, batch, level, spread=1.0):
    """Points near one centre, as close as the noise, so that many share the posterior."""
    alpha, sigma = level
    near = spread * sigma / max(alpha, 0.05) / math.sqrt(dim)
    y = torch.randn(1, dim, generator=rng) + near * torch.randn(n, dim, generator=rng)
    w = torch.rand(n, generator=rng) + 0.1
    x = alpha * y[torch.randint(n, (batch,), generator=rng)] + sigma * torch.randn(batch, dim, generator=rng)
    return x, y, w


@pytest.mark.parametrize("dim", [64, 1024])
def test_the_mean_of_copies_is_the_copy(dim, rng):
    """Thousands of equal summands: where float32 sums are at their worst."""
    row = 3.0 * torch.randn(1, dim, generator=rng)
    got = posterior(row, row.repeat(9000, 1), torch.ones(9000), NoiseLevel(0.1, 1.0))
    assert float((got.mean - row).norm() / row.norm()) < 1e-5


@pytest.mark.parametrize("dtype", STORED, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize(("n", "dim", "batch"), [(1, 64, 1), (67, 1024, 1), (203, 2048, 3), (50, 64 * 37, 5)])
def test_equals_the_equations(dtype, kind, n, dim, batch, rng):
    level = LEVELS[kind]
    x, y, w = problem(rng, n, dim, batch, level, spread=3.0)
    stored = y.to(dtype)
    mean, evidence = posterior(x, stored, w, NoiseLevel(*level))
    expected, expected_evidence = brute_force(x, stored.float(), w, *level)
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(evidence, expected_evidence, rtol=0, atol=2e-3)
    assert (mean.dtype, evidence.dtype) == (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", STORED, ids=lambda d: str(d).removeprefix("torch."))
def test_a_stored_precision_costs_what_it_promises(dtype, rng):
    """Against the values before rounding, where the posterior is shared by many points."""
    level = (0.3, 0.95)
    y = torch.randn(1, 1024, generator=rng) + 0.1 * torch.randn(400, 1024, generator=rng)
    x = level[0] * y[:2] + level[1] * torch.randn(2, 1024, generator=rng)
    mean, _ = posterior(x, y.to(dtype), torch.ones(400), NoiseLevel(*level))
    expected, _ = brute_force(x, y, np.ones(400), *level)
    error = np.linalg.norm(mean.numpy() - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < STORED[dtype]


def test_distances_do_not_cancel_far_from_the_origin():
    y = torch.full((2, 4096), 1000.0) + torch.tensor([[0.0], [1 / 128]])
    assert squared_distances(y[:1], y, torch.ones(1, 1)).tolist() == [[0.0, 4096 / 128**2]]


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17])
def test_distances_of_every_odd_size(batch, n, rng):
    x, y, a = torch.randn(batch, 192, generator=rng), torch.randn(n, 192, generator=rng), torch.rand(batch, 1)
    expected = ((x.double()[:, None] - a.double()[:, None] * y.double()) ** 2).sum(2)
    torch.testing.assert_close(squared_distances(x, y, a), expected, rtol=1e-6, atol=1e-6)


def test_levels_may_differ_per_sample(rng):
    x, y, w = torch.randn(3, 128, generator=rng), torch.randn(40, 128, generator=rng), torch.rand(40, generator=rng)
    alpha, sigma = torch.tensor([1.0, 0.8, 0.0]), torch.tensor([2.0, 0.6, 1.0])
    mean, evidence = posterior(x, y, w, NoiseLevel(alpha, sigma))
    expected, expected_evidence = brute_force(x, y, w, alpha.double(), sigma.double())
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(evidence, expected_evidence, atol=1e-3)


def test_a_weight_of_zero_is_an_absent_row(rng):
    x, y, w = torch.randn(2, 128, generator=rng), torch.randn(70, 128, generator=rng), torch.rand(70, generator=rng)
    w[[0, 5, 69]] = 0.0
    w[16:48] = 0.0  # whole blocks
    level = NoiseLevel(0.3, 0.95)
    mean, evidence = posterior(x, y, w, level)
    expected, expected_evidence = brute_force(x, y[w > 0], w[w > 0], 0.3, 0.95)
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(evidence, expected_evidence, atol=1e-3)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_spoils_only_itself(spoilt, rng):
    x, y, w = problem(rng, 60, 128, 4, (0.8, 0.6))
    clean = posterior(x, y, w, NoiseLevel(0.8, 0.6))
    x[1, 7] = spoilt
    got = posterior(x, y, w, NoiseLevel(0.8, 0.6))
    assert bool(got.mean[1].isnan().all())
    assert torch.equal(got.mean[[0, 2, 3]], clean.mean[[0, 2, 3]])
    assert torch.equal(got.log_evidence[[0, 2, 3]], clean.log_evidence[[0, 2, 3]])


@pytest.mark.parametrize("batch", [2, 3, 6])
def test_changing_one_sample_never_changes_another(batch, rng):
    x, y, w = problem(rng, 5000, 256, batch, (0.5, 0.85))
    before = posterior(x, y, w, NoiseLevel(0.5, 0.85))
    x[1:] = 100.0 * torch.randn(batch - 1, 256, generator=rng)
    after = posterior(x, y, w, NoiseLevel(0.5, 0.85))
    assert torch.equal(after.mean[0], before.mean[0])
    assert torch.equal(after.log_evidence[0], before.log_evidence[0])


def test_a_long_flat_sum_keeps_its_digits(rng):
    """Some ten thousand equal weights: float32 alone would lose a digit a decade."""
    y = torch.randn(30_000, 64, generator=rng) + 5.0
    mean, _ = posterior(torch.randn(1, 64, generator=rng), y, torch.ones(len(y)), NoiseLevel(0.0, 1.0))
    np.testing.assert_allclose(mean[0], y.double().mean(0), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_into_one_graph(dtype, rng):
    x, y, w = problem(rng, 40, 128, 2, (0.8, 0.6))
    whole = torch.compile(lambda x: posterior(x, y.to(dtype), w, NoiseLevel(0.8, 0.6)), fullgraph=True, backend="eager")
    expected = posterior(x, y.to(dtype), w, NoiseLevel(0.8, 0.6))
    assert torch.equal(whole(x).mean, expected.mean)
    assert torch.equal(whole(x).log_evidence, expected.log_evidence)


def test_tensor_operations_agree(monkeypatch, rng):
    x, y, w = problem(rng, 100, 256, 3, (0.5, 0.85))
    compiled = posterior(x, y, w, NoiseLevel(0.5, 0.85))
    monkeypatch.setattr(fused, "fits", lambda x, y: False)
    plain = posterior(x, y, w, NoiseLevel(0.5, 0.85))
    torch.testing.assert_close(compiled.mean, plain.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled.log_evidence, plain.log_evidence, rtol=1e-9, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize("kernels", [True, False], ids=["compiled", "tensor operations"])
def test_a_mapped_set_is_summed_where_it_lies(kernels, tmp_path, rng):
    """A set of 128 MiB, in a process that may not have more than 48 MiB beyond what it has before."""
    path = tmp_path / "big.safetensors"
    latents = torch.randn(65_536, 1024, generator=rng)
    names = tuple(map(str, range(len(latents))))
    space = Space(encoder="x", shape=(1024,))
    NegationSet(latents=latents, space=space, ids=names, digests=names).save(path)
    script = f"""
import resource, torch
from steerclear.negation import NegationSet
from steerclear.noise import NoiseLevel
torch.set_num_threads(1)
from steerclear.negation.posterior import posterior
level = NoiseLevel(0.5, 0.9)
if not {kernels}:
    import steerclear.negation.posterior as module
    module._compiled = lambda x, y: None
items = NegationSet.load({str(path)!r}, mapped=True)
posterior(torch.randn(2, 1024), torch.randn(2048, 1024).half(), torch.ones(2048), level)  # whatever is loaded late
status = dict(line.split(":") for line in open("/proc/self/status"))
now = int(status["VmData"].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (now + (48 << 20), now + (48 << 20)))
print(float(items.posterior(torch.zeros(2, 1024), level).log_evidence[0]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    squared = latents.half().double().square().sum(1) * 0.25
    expected = (-squared / (2 * 0.81)).logsumexp(0) - math.log(65_536) - 512 * math.log(2 * math.pi * 0.81)
    assert float(done.stdout) == pytest.approx(float(expected), abs=1e-3)


def test_machine_code_is_made_again_when_any_of_its_sources_changed(tmp_path):
    """Numba would keep what was compiled of a function until the function's own file changes."""
    script = """
import numpy as np
from steerclear.negation import kernels
one = np.ones((1, 1, 4), np.float32)
kernels.add_some(one[0, 0, :1], one, np.zeros(1, np.int64), one[0])
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def index() -> Path:
        subprocess.run([sys.executable, "-c", script], env=environment, check=True)
        (found,) = tmp_path.rglob("*.add_some-*.nbi")
        return found

    made = index().stat().st_mtime_ns
    assert index().stat().st_mtime_ns == made
    os.utime(index(), (0, 0))
    assert index().stat().st_mtime_ns >= made
