"""Exact tests, intervals that know what the independent unit is, and corrections for a fallible judge."""

from steerclear.evaluate.statistics.bootstrap import bootstrap
from steerclear.evaluate.statistics.bounds import binomial_p, hoeffding_bentkus_p, prompts_needed
from steerclear.evaluate.statistics.judge import JudgeErrors, corrected_rate, rogan_gladen, unsafe_at_most
from steerclear.evaluate.statistics.paired import McNemar, Paired, mcnemar, paired, sign_flip
from steerclear.evaluate.statistics.rates import Clusters, clustered_rate

__all__ = [
    "Clusters",
    "JudgeErrors",
    "McNemar",
    "Paired",
    "binomial_p",
    "bootstrap",
    "clustered_rate",
    "corrected_rate",
    "hoeffding_bentkus_p",
    "mcnemar",
    "paired",
    "prompts_needed",
    "rogan_gladen",
    "sign_flip",
    "unsafe_at_most",
]
