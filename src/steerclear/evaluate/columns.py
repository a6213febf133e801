"""The columns of every record; ``docs/evaluate.md`` says what they mean."""

import pyarrow as pa

BASE: dict[str, pa.DataType] = {
    "arm": pa.string(),
    "guard": pa.string(),
    "prompt_digest": pa.string(),
    "prompt": pa.string(),
    "source": pa.string(),
    "kind": pa.string(),
    "category": pa.string(),
    "seed": pa.int64(),
    "unit": pa.int32(),
    "fired": pa.bool_(),
    "identical": pa.bool_(),
    "change_max": pa.float64(),
    "change_rms": pa.float64(),
    "digest": pa.string(),
    "image": pa.string(),
    "error": pa.string(),
    "seconds": pa.float64(),
    "guard_seconds": pa.float64(),
    "evaluations": pa.float64(),
}
"""Of every run."""

JUDGE: dict[str, pa.DataType] = {
    "unsafe": pa.bool_(),
    "probability": pa.float64(),
    "label": pa.string(),
    "confidence": pa.float64(),
    "expected": pa.bool_(),
}
"""Of every judge, after its name and a slash."""

TIMINGS = ("seconds", "guard_seconds")
"""The only columns in which two runs of one task may differ."""
