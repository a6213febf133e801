"""What a negation set accepts, and how it is changed; every refusal says what was expected, got, and what to do."""

import math

import pytest
import torch

from steerclear.errors import InvalidInput, NegationMismatch
from steerclear.negation import NegationSet, Skip, Space

SPACE = Space(encoder="sha256:" + "ab" * 32, shape=(2, 3), name="a tiny encoder")


def make(n=4, seed=0, space=SPACE, prefix="item", **fields):
    latents = torch.randn(n, *space.shape, generator=torch.Generator().manual_seed(seed))
    names = tuple(f"{prefix}-{i}" for i in range(n))
    labels = tuple("ab"[i % 2] for i in range(n))
    return NegationSet(**{"latents": latents, "space": space, "ids": names, "labels": labels} | fields)


def test_what_is_left_out_gets_sensible_values():
    items = NegationSet(latents=torch.zeros(2, 2, 3, dtype=torch.float16), space=SPACE)
    assert items.latents.dtype == torch.float16  # as given: sums are wide whatever the storage
    assert items.weights.tolist() == [1.0, 1.0]
    assert items.ids == ("item-0", "item-1")
    assert items.labels == ("", "")
    assert all(d.startswith("sha256:") and len(d) == 71 for d in items.digests)
    assert (len(items), items.shape, items.skipped) == (2, (2, 3), ())


def test_float64_stays_float64():
    assert make(latents=torch.zeros(4, 2, 3, dtype=torch.float64)).latents.dtype == torch.float64


def test_equal_latents_have_equal_digests_and_others_do_not():
    latents = torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1, 1).expand(3, 2, 3)
    digests = NegationSet(latents=latents, space=SPACE).digests
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latents": torch.zeros(4, 2, 4)}, r"shape \(n, 2, 3\), got torch.float32 \(4, 2, 4\)"),
        ({"latents": torch.zeros(4, 2, 3, dtype=torch.int64)}, r"expected floating latents .* got torch.int64"),
        ({"latents": torch.zeros(())}, r"shape \(n, 2, 3\), got"),
        ({"latents": torch.zeros(0, 2, 3), "ids": (), "labels": ()}, "at least one item, got none"),
        ({"latents": torch.full((4, 2, 3), math.nan)}, r"NaN or inf in items \[0, 1, 2, 3\]; encode"),
        ({"latents": torch.tensor([0, 0, math.inf, 0]).reshape(4, 1, 1).expand(4, 2, 3)}, r"in items \[2\]"),
        ({"weights": torch.ones(3)}, r"4 positive finite weights, got shape \(3,\)"),
        ({"weights": torch.ones(4, 1)}, r"4 positive finite weights, got shape \(4, 1\)"),
        ({"weights": torch.tensor([1.0, 0.0, 1.0, 1.0])}, "smallest 0; leave items out with remove"),
        ({"weights": torch.tensor([1.0, -2.0, 1.0, 1.0])}, "smallest -2"),
        ({"weights": torch.tensor([1.0, math.nan, 1.0, 1.0])}, "positive finite weights"),
        ({"weights": torch.tensor([1.0, math.inf, 1.0, 1.0])}, "positive finite weights"),
        ({"ids": ("a", "b", "c")}, "expected 4 strings as ids, got 3"),
        ({"labels": ("a",) * 5}, "expected 4 strings as labels, got 5"),
        ({"digests": ("a", "b", "c", 4)}, "expected 4 strings as digests"),
        ({"ids": ("a", "b", "a", "c")}, r"unique, non-empty ids, got repeated \['a'\]; rename"),
        ({"ids": ("a", "b", "", "c")}, "unique, non-empty ids"),
    ],
)
def test_invalid_fields_are_refused_with_a_sentence(fields, message):
    with pytest.raises(InvalidInput, match=message):
        make(**fields)


@pytest.mark.parametrize("shape", [(), (0, 3), (2, -1), (2.0, 3), (True, 3), ("2", 3)])
def test_a_space_has_a_shape_of_positive_integers(shape):
    with pytest.raises(InvalidInput, match="positive integers"):
        Space(encoder="pixels", shape=shape)


def test_a_space_has_a_fingerprint():
    with pytest.raises(InvalidInput, match="fingerprint"):
        Space(encoder="", shape=(1,))


def test_spaces_agree_whatever_they_are_called():
    SPACE.require(Space(encoder=SPACE.encoder, shape=SPACE.shape, name="another name"))


@pytest.mark.parametrize(
    "other", [Space(encoder="pixels", shape=(2, 3)), Space(encoder=SPACE.encoder, shape=(3, 2), name="wide")], ids=str
)
def test_other_spaces_are_refused_naming_both(other):
    with pytest.raises(NegationMismatch, match=r"of a tiny encoder \(2×3, sha256:abab.* got latents of .* encode"):
        SPACE.require(other)


def test_add_joins_two_sets_in_order():
    first, second = make(2), make(3, seed=1, prefix="more", weights=torch.tensor([2.0, 3.0, 4.0]))
    both = first.add(second)
    assert torch.equal(both.latents, torch.cat([first.latents, second.latents]))
    assert both.weights.tolist() == [1, 1, 2, 3, 4]
    assert both.ids == ("item-0", "item-1", "more-0", "more-1", "more-2")
    assert both.labels == ("a", "b", "a", "b", "a")
    assert both.digests == first.digests + second.digests
    assert len(first) == 2


def test_add_lists_what_is_there_already():
    first = make(3)
    more = NegationSet(
        latents=torch.cat([first.latents[1:2], torch.ones(1, 2, 3)]),
        space=SPACE,
        ids=("again", "new"),
        skipped=(Skip(source="x.png", reason="corrupt"),),
    )
    both = first.add(more)
    assert both.ids == ("item-0", "item-1", "item-2", "new")
    assert both.skipped == (more.skipped[0], Skip(source="again", reason="already in the set"))
    assert first.add(first).ids == first.ids


def test_add_refuses_another_picture_of_the_same_name():
    with pytest.raises(InvalidInput, match=r"unique, non-empty ids, got repeated \['item-0', 'item-1'\]"):
        make(2).add(make(2, seed=1))


def test_add_refuses_another_space():
    with pytest.raises(NegationMismatch, match="encode the pictures again"):
        make(2).add(make(2, space=Space(encoder="pixels", shape=(2, 3)), prefix="b"))


def test_add_needs_a_pipeline_for_pictures():
    with pytest.raises(InvalidInput, match="the pipeline to encode them with"):
        make(2).add([torch.zeros(3, 8, 8)])


def test_remove_takes_out_by_id():
    items = make(4, weights=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    left = items.remove(["item-2", "item-0"])
    assert left.ids == ("item-1", "item-3")
    assert torch.equal(left.latents, items.latents[[1, 3]])
    assert left.weights.tolist() == [2, 4]
    assert left.labels == ("b", "b")
    assert left.digests == (items.digests[1], items.digests[3])
    assert items.remove("item-1").ids == ("item-0", "item-2", "item-3")
    assert len(items) == 4


def test_remove_undoes_add():
    first, second = make(2), make(2, seed=1, prefix="more")
    back = first.add(second).remove(second.ids)
    assert torch.equal(back.latents, first.latents)
    assert back.ids == first.ids


def test_remove_refuses_unknown_ids_and_an_empty_rest():
    with pytest.raises(InvalidInput, match=r"ids of this set, got \['nobody'\]; the set begins with"):
        make(2).remove(["item-0", "nobody"])
    with pytest.raises(InvalidInput, match="keep at least one of 2 items, got none"):
        make(2).remove(["item-0", "item-1"])


def test_select_keeps_labels_in_order():
    items = make(4)
    assert items.select(labels="b").ids == ("item-1", "item-3")
    assert items.select(labels=["b", "a"]).ids == items.ids
    with pytest.raises(InvalidInput, match=r"labels among \['a', 'b'\], got \['c'\]"):
        items.select(labels=["a", "c"])
    with pytest.raises(InvalidInput, match="at least one of 4 items"):
        items.select(labels=[])


def test_to_moves_both_tensors():
    moved = make(2).to(torch.device("cpu"))
    assert moved.latents.device == moved.weights.device == torch.device("cpu")


def test_a_set_is_frozen_and_describes_itself():
    items = make(2)
    with pytest.raises(AttributeError):
        items.ids = ()
    assert repr(items).startswith("NegationSet(2 items in a tiny encoder (2×3, sha256:abab")
