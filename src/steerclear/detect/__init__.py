"""Detectors: pictures in, probabilities of labels out. One detector per file; third-party ones plug in.

A package adds a detector with an entry point in the group ``steerclear.detectors``::

    [project.entry-points."steerclear.detectors"]
    my-detector = "my_package:MyDetector"
"""

from steerclear.detect.always import Always
from steerclear.detect.base import Detector, Thresholds, Verdict, available, load

__all__ = ["Always", "Detector", "Thresholds", "Verdict", "available", "load"]
