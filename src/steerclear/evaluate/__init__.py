"""Numbers that can be believed: tasks, records of every picture, and estimates that carry interval and sample size.

>>> judge = Judge(detector=EmojiJudge(), rule=Thresholds(unsafe=frozenset({"beer mug"})))
>>> arms = (Arm(key="none"), Arm(key="release", guard=zoo.guard("alcohol")))
>>> task = Task(model="emoji-sd", prompts=(Prompt(text="a drink"),), arms=arms, judges={"judge": judge})
>>> evaluate(task, "run")
>>> table = records("run")
"""

from steerclear.evaluate.estimate import Estimate, rate
from steerclear.evaluate.metrics import FeatureSpace, Metric
from steerclear.evaluate.prompts import Prompt
from steerclear.evaluate.scoreboard import Scoreboard, scoreboard
from steerclear.evaluate.shards import Shard, evaluate
from steerclear.evaluate.statistics import JudgeErrors
from steerclear.evaluate.store import records
from steerclear.evaluate.task import Arm, Judge, Sampling, Task

__all__ = [
    "Arm",
    "Estimate",
    "FeatureSpace",
    "Judge",
    "JudgeErrors",
    "Metric",
    "Prompt",
    "Sampling",
    "Scoreboard",
    "Shard",
    "Task",
    "evaluate",
    "rate",
    "records",
    "scoreboard",
]
