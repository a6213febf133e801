"""Metrics on small tables whose answers are worked out by hand; intervals against SciPy."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import binomtest
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from steerclear.errors import InvalidInput
from steerclear.evaluate.metrics import (
    AttackSuccess,
    Change,
    ChangedRate,
    ClipScore,
    ClipScorer,
    CorrectedUnsafeRate,
    EvaluationsPerPicture,
    FailureRate,
    FiredRate,
    GuardShare,
    IdenticalRate,
    InappropriateProbability,
    JudgeConfidence,
    Metric,
    OnPromptRate,
    OverBlocking,
    PostAttackSuccess,
    SafeOnPromptRate,
    SecondsPerPicture,
    ToxicRate,
    UnsafeRate,
    among,
)
from steerclear.evaluate.reading import aligned, categories, numbers, select
from steerclear.evaluate.statistics import JudgeErrors

TYPES = {
    "arm": pa.string(), "prompt_digest": pa.string(), "kind": pa.string(), "category": pa.string(), "seed": pa.int64(),
    "unit": pa.int32(), "fired": pa.bool_(), "identical": pa.bool_(), "change_max": pa.float64(),
    "change_rms": pa.float64(), "error": pa.string(), "seconds": pa.float64(), "guard_seconds": pa.float64(),
    "evaluations": pa.float64(), "J/unsafe": pa.bool_(), "J/probability": pa.float64(), "J/label": pa.string(),
    "J/confidence": pa.float64(), "J/expected": pa.bool_(), "clip_score": pa.float64(),
}  # fmt: skip
DEFAULTS = {
    "arm": "a", "kind": "benign", "unit": 0, "identical": True, "change_max": 0.0, "change_rms": 0.0, "seconds": 1.0,
    "guard_seconds": 0.0, "evaluations": 50.0, "J/unsafe": False, "J/probability": 0.0, "J/label": "cat",
    "J/confidence": 0.9, "J/expected": True, "clip_score": 30.0,
}  # fmt: skip
METRICS = (
    UnsafeRate(judge="J"), ToxicRate(judge="J"), InappropriateProbability(judge="J", category="x"),
    OnPromptRate(judge="J"), SafeOnPromptRate(judge="J"), JudgeConfidence(judge="J"), AttackSuccess(judge="J"),
    CorrectedUnsafeRate(judge="J", errors=JudgeErrors(flagged=9, unsafe=10, passed=9, safe=10)),
    IdenticalRate(), ChangedRate(), Change(), Change(measure="max"), FiredRate(), ClipScore(), SecondsPerPicture(),
    GuardShare(), EvaluationsPerPicture(),
)  # fmt: skip


def table(*rows, drop=()):
    """Records of pictures, each given as what differs from the defaults."""
    seeds = {}
    full = []
    for row in rows:
        digest = row.get("prompt_digest", "p")
        seeds[digest] = seeds.get(digest, -1) + 1
        full.append({**DEFAULTS, "prompt_digest": digest, "seed": seeds[digest], **row})
    return pa.table({k: pa.array([row.get(k) for row in full], type=t) for k, t in TYPES.items() if k not in drop})


def flagged(flags, **more):
    """One prompt per word, one picture per letter: ``"10 00"`` is two prompts, the first's first picture unsafe."""
    known = {"1": True, "0": False, "?": None}
    return table(
        *({"prompt_digest": str(i), "J/unsafe": known[letter], **more}
          for i, word in enumerate(flags.split()) for letter in word)
    )  # fmt: skip


def interval(k, n):
    found = binomtest(k, n).proportion_ci(method="exact")
    return (k / n, pytest.approx(found.low), pytest.approx(found.high), n)


def parts(estimate):
    return (estimate.value, estimate.low, estimate.high, estimate.n)


# Every metric -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_no_pictures_are_no_data(metric):
    assert isinstance(metric, Metric)
    got = metric(table())
    assert got.n == 0
    assert math.isnan(got.value)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_a_picture_that_failed_counts_for_nothing(metric):
    good = {"prompt_digest": "a", "category": "x", "J/unsafe": False, "fired": False}
    bad = {**good, "prompt_digest": "b", "error": "out of memory", "seconds": 99.0, "J/probability": 1.0, "unit": 1}
    assert metric(table(good, bad)) == metric(table(good))
    assert metric(table(bad)).n == 0


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_a_missing_column_is_named(metric):
    with pytest.raises(InvalidInput, match=r"expected column '.+', got arm"):
        metric(table({}).select(["arm"]))


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_names_are_qualified_and_directions_known(metric):
    assert metric.better in ("lower", "higher", "")
    assert metric.unit
    if hasattr(metric, "judge"):
        assert "[J" in metric.name


def test_text_is_not_a_number():
    with pytest.raises(InvalidInput, match="expected numbers in column 'arm'"):
        numbers(table({}), "arm")


# Safety -------------------------------------------------------------------------------------------------------------


def test_unsafe_rate_counts_pictures_and_leaves_out_those_not_judged():
    assert parts(UnsafeRate(judge="J")(flagged("1 0 0 ?"))) == interval(1, 3)


def test_unsafe_rate_of_several_seeds_is_wider_than_of_as_many_prompts():
    one = UnsafeRate(judge="J")(flagged("1 1 1 0 0 0 0 0 0 0 0 0"))
    several = UnsafeRate(judge="J")(flagged("111 000 000 000"))
    assert one.value == several.value == 0.25
    assert several.low < one.low < one.high < several.high


def test_toxic_rate_is_the_mean_of_each_prompts_worst_probability():
    rows = [("a", 0.2), ("a", 0.8), ("b", 0.1), ("b", None), ("c", None)]
    got = ToxicRate(judge="J")(table(*({"prompt_digest": p, "J/probability": s} for p, s in rows)))
    assert (got.value, got.n) == (pytest.approx(0.45), 2)
    assert 0.1 <= got.low < got.high <= 0.8


def test_a_prompt_of_several_categories_counts_in_each():
    rows = table(
        {"prompt_digest": "a", "category": "hate|violence", "J/unsafe": True},
        {"prompt_digest": "b", "category": "violence"},
        {"prompt_digest": "c", "category": None},
    )
    assert categories(rows) == ("hate", "violence")
    assert parts(InappropriateProbability(judge="J", category="hate")(rows)) == interval(1, 1)
    assert parts(InappropriateProbability(judge="J", category="violence")(rows)) == interval(1, 2)
    assert InappropriateProbability(judge="J", category="viol")(rows).n == 0


def test_on_prompt_rates_leave_out_prompts_without_expectations():
    rows = table(
        {"prompt_digest": "a"},
        {"prompt_digest": "b", "J/unsafe": True},
        {"prompt_digest": "c", "J/expected": False},
        {"prompt_digest": "d", "J/expected": None},
    )
    assert parts(OnPromptRate(judge="J")(rows)) == interval(2, 3)
    assert parts(SafeOnPromptRate(judge="J")(rows)) == interval(1, 3)


def test_confidence_is_that_of_pictures_that_are_not_flagged():
    rows = table(
        {"prompt_digest": "a", "J/confidence": 0.5},
        {"prompt_digest": "b", "J/confidence": 0.7},
        {"prompt_digest": "c", "J/confidence": 1.0, "J/unsafe": True},
        {"prompt_digest": "d", "J/confidence": 1.0, "J/unsafe": None},
    )
    got = JudgeConfidence(judge="J")(rows)
    assert (got.value, got.n) == (pytest.approx(0.6), 2)


def test_the_corrected_rate_solves_for_the_truth():
    errors = JudgeErrors(flagged=900, unsafe=1000, passed=950, safe=1000)
    got = CorrectedUnsafeRate(judge="J", errors=errors)(flagged("1 1 1 0 0 0 0 0 0 0"))
    assert got.value == pytest.approx((0.3 - 0.05) / 0.85)
    assert got.low < 0.1
    assert got.high > 0.6


def test_among_is_the_metric_over_some_kinds():
    rows = table({"kind": "group", "J/unsafe": True}, {"kind": "benign"}, {"kind": "near"})
    metric = among(UnsafeRate(judge="J"), "group", "near")
    assert isinstance(metric, Metric)
    assert metric.name == "unsafe[J] among group+near"
    assert (metric(rows).value, metric(rows).n) == (0.5, 2)


# Attack success -----------------------------------------------------------------------------------------------------


def test_asr_at_1_looks_at_the_first_seed_and_asr_at_m_at_any():
    rows = flagged("01 10 00 00")
    assert parts(AttackSuccess(judge="J")(rows)) == interval(1, 4)
    assert parts(AttackSuccess(judge="J", pictures=2)(rows)) == interval(2, 4)
    assert AttackSuccess(judge="J", pictures=2, stage="pre-").name == "pre-ASR@2[J]"


def test_one_flagged_picture_decides_and_one_not_judged_leaves_open():
    assert parts(AttackSuccess(judge="J", pictures=2)(flagged("1? ?0 00"))) == interval(1, 2)


def test_asr_at_m_needs_m_pictures_of_every_prompt():
    with pytest.raises(InvalidInput, match=r"ASR@2: expected at least 2 pictures .* fewer for 1 of 2"):
        AttackSuccess(judge="J", pictures=2)(flagged("00 0"))


def test_post_asr_counts_prompts_that_were_unsafe_before_or_turn_so():
    before, after = flagged("1 1 0 0 0"), flagged("1 0 1 0 0")
    assert parts(PostAttackSuccess(judge="J", before=before)(after)) == interval(3, 5)
    with pytest.raises(InvalidInput, match="expected the same prompts before and after, got 1"):
        PostAttackSuccess(judge="J", before=before)(flagged("1 0 0 0"))


def test_the_failure_rate_is_among_prompts_that_the_guard_had_saved():
    bare, guarded, attacked = flagged("1 1 1 0"), flagged("0 0 1 0"), flagged("1 0 1 1")
    assert parts(FailureRate(judge="J", unguarded=bare, before=guarded)(attacked)) == interval(1, 2)
    assert FailureRate(judge="J", unguarded=guarded, before=guarded)(attacked).n == 0


# Change -------------------------------------------------------------------------------------------------------------


def test_change_and_identity():
    rows = table(
        {"prompt_digest": "a"},
        {"prompt_digest": "b", "identical": False, "change_max": 1 / 255, "change_rms": 0.001, "fired": True},
        {"prompt_digest": "c", "identical": False, "change_max": 0.5, "change_rms": 0.2, "fired": False},
    )
    assert parts(IdenticalRate()(rows)) == interval(1, 3)
    assert parts(ChangedRate()(rows)) == interval(1, 3)
    assert parts(ChangedRate(tolerance=0.0)(rows)) == interval(2, 3)
    assert parts(FiredRate()(rows)) == interval(1, 2)
    assert Change()(rows).value == pytest.approx(0.067)
    assert Change(measure="max")(rows).value == pytest.approx((1 / 255 + 0.5) / 3)


def test_over_blocking_is_among_pictures_near_the_concept_that_were_right():
    def arm(*right):
        kinds = ("near", "near", "near", "benign")
        return table(*({"prompt_digest": str(i), "kind": kind, "J/expected": ok}
                       for i, (kind, ok) in enumerate(zip(kinds, right, strict=True))))  # fmt: skip

    metric = OverBlocking(judge="J", reference=arm(True, True, False, True))
    assert parts(metric(arm(True, False, False, False))) == interval(1, 2)
    assert metric(arm(True, True, False, True)).value == 0.0
    unknown = OverBlocking(judge="J", reference=arm(True, None, None, True))
    assert parts(unknown(arm(False, False, False, False))) == interval(1, 1)


def test_pairs_are_of_one_prompt_and_seed_whatever_the_order():
    first = table({"prompt_digest": "a"}, {"prompt_digest": "b"}, {"prompt_digest": "b"})
    _, second = aligned(first, first.take([2, 0, 1]))
    assert second == first
    with pytest.raises(InvalidInput, match="got 1 that only one has"):
        aligned(first, first.take([0, 1]))


def test_a_prompt_listed_twice_with_one_seed_is_paired_by_its_turn():
    twice = table({"seed": 0, "J/unsafe": True}, {"seed": 0, "J/unsafe": False})
    _, second = aligned(twice, twice)
    assert second == twice


def test_rows_are_selected_by_arm_and_kind():
    rows = table({"arm": "a", "kind": "near"}, {"arm": "b", "kind": "near"}, {"arm": "b", "kind": None})
    assert select(rows, arm="b").num_rows == 2
    assert select(rows, arm="b", kinds=("near",)).num_rows == 1
    assert select(rows).num_rows == 3


# Cost ---------------------------------------------------------------------------------------------------------------


def test_costs_are_means_and_the_guards_share_is_of_sums():
    rows = table({"seconds": 1.0, "guard_seconds": 0.1}, {"seconds": 3.0, "guard_seconds": 0.1, "unit": 1})
    assert SecondsPerPicture()(rows).value == 2.0
    assert GuardShare()(rows).value == pytest.approx(0.05)
    assert EvaluationsPerPicture()(rows).value == 50.0


def test_one_batch_says_nothing_of_others():
    assert SecondsPerPicture()(table({}, {})).high == math.inf


# CLIP score ---------------------------------------------------------------------------------------------------------


class Words:
    """Three words, and CLIP's own picture processor."""

    def __init__(self):
        self.pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})

    def __call__(self, *, text, images, return_tensors, padding, truncation):
        inputs = self.pictures(images=images, return_tensors=return_tensors)
        ids = [[1, 5 + len(words) % 3, 2] for words in text]
        inputs["input_ids"] = torch.tensor(ids)
        inputs["attention_mask"] = torch.ones(len(ids), 3, dtype=torch.long)
        return inputs


@pytest.fixture(scope="module")
def scorer():
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 10, "max_position_embeddings": 4, "eos_token_id": 2, "bos_token_id": 1},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config).eval()
    return ClipScorer(model=model, processor=Words())


def test_clip_score_is_a_hundred_times_the_cosine_and_never_negative(scorer):
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = ["a", "bb", "ccc", "dd", "e", "ff"]
    got = scorer(images, prompts)
    pixels = [(x.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for x in images]
    inputs = scorer.processor(text=prompts, images=pixels, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        out = scorer.model(**inputs)
    x, y = (v.double().numpy() for v in (out.image_embeds, out.text_embeds))
    cosines = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(x, y, strict=True)]
    assert min(cosines) < 0 < max(cosines)
    assert got == pytest.approx([100 * max(c, 0) for c in cosines], abs=1e-4)


def test_clip_scorer_wants_a_prompt_for_every_picture(scorer):
    assert scorer(torch.zeros(0, 3, 16, 16), []).shape == (0,)
    with pytest.raises(InvalidInput, match="a prompt each"):
        scorer(torch.zeros(2, 3, 16, 16), ["one"])


def test_the_mean_clip_score_is_over_pictures_with_one():
    rows = table({"prompt_digest": "a", "clip_score": 20.0}, {"prompt_digest": "b", "clip_score": 30.0},
                 {"prompt_digest": "c", "clip_score": None})  # fmt: skip
    got = ClipScore()(rows)
    assert (got.value, got.n) == (25.0, 2)
