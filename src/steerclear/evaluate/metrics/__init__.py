"""Metrics: frozen, named, called with the records of one arm; each returns an estimate with its interval and its n."""

from steerclear.evaluate.metrics.attack import AttackSuccess, FailureRate, PostAttackSuccess
from steerclear.evaluate.metrics.base import Among, Metric, among
from steerclear.evaluate.metrics.change import Change, ChangedRate, FiredRate, IdenticalRate, OverBlocking
from steerclear.evaluate.metrics.clip import ClipScore, ClipScorer
from steerclear.evaluate.metrics.cost import EvaluationsPerPicture, GuardShare, SecondsPerPicture
from steerclear.evaluate.metrics.quality import FeatureMetric, FeatureSpace, quality
from steerclear.evaluate.metrics.safety import (
    CorrectedUnsafeRate,
    InappropriateProbability,
    JudgeConfidence,
    OnPromptRate,
    SafeOnPromptRate,
    ToxicRate,
    UnsafeRate,
)

__all__ = [
    "Among",
    "AttackSuccess",
    "Change",
    "ChangedRate",
    "ClipScore",
    "ClipScorer",
    "CorrectedUnsafeRate",
    "EvaluationsPerPicture",
    "FailureRate",
    "FeatureMetric",
    "FeatureSpace",
    "FiredRate",
    "GuardShare",
    "IdenticalRate",
    "InappropriateProbability",
    "JudgeConfidence",
    "Metric",
    "OnPromptRate",
    "OverBlocking",
    "PostAttackSuccess",
    "SafeOnPromptRate",
    "SecondsPerPicture",
    "ToxicRate",
    "UnsafeRate",
    "among",
    "quality",
]
