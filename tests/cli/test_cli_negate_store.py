"""``steerclear negate`` and ``generate`` over a store, in the place of a file."""

import json

import pytest
import torch

from steerclear.negation import NegationSet, NegationStore


@pytest.fixture
def bad(steerclear, model_folder, picture_folder, tmp_path):
    store = tmp_path / "bad.negation"
    words = ("--model", model_folder, "--licence", "CC0")
    steerclear("negate", "build", picture_folder, "-o", store, *words)
    return store


def test_build_makes_a_store_that_knows_where_things_come_from(steerclear, bad, model_folder, picture_folder, tmp_path):
    facts = json.loads(steerclear("negate", "inspect", bad, "--json").stdout)
    assert [item["id"] for item in facts["items"]] == [f"noise-{i}.png" for i in range(6)]
    assert {item["provenance"] for item in facts["items"]} == {str(picture_folder)}
    assert facts["licences"] == {"CC0": 6}
    assert facts["labels"] == {"noise": 6}
    text = steerclear("negate", "inspect", bad, "--items").stdout
    for word in ("6 items", "licence   CC0 6", f"source    {picture_folder} 6", "after 1 changes", "noise-3.png"):
        assert word in text
    file = tmp_path / "bad.safetensors"
    steerclear("negate", "build", picture_folder, "-o", file, "--model", model_folder)
    with NegationStore.open(bad) as store:
        assert torch.equal(store.to_set().latents, NegationSet.load(file).latents.half())
    again = steerclear("negate", "build", picture_folder, "-o", bad, "--model", model_folder, code=2)
    assert "steerclear negate add" in again.stderr


def test_a_store_is_changed_verified_compacted_and_exported(steerclear, bad, model_folder, picture_folder, tmp_path):
    text = steerclear("negate", "remove", bad, "noise-0.png", "noise-4.png").stdout
    assert "4 items" in text
    assert "steerclear negate compact" in text
    assert "2 removed ones and 0 orphaned bytes" in steerclear("negate", "verify", bad).stdout
    added = steerclear(
        "negate", "add", bad, picture_folder / "noise-4.png", "--model", model_folder, "--provenance", "request 7"
    )  # fmt: skip
    assert "5 items" in added.stdout
    items = json.loads(steerclear("negate", "inspect", bad, "--json").stdout)["items"]
    assert (items[-1]["provenance"], items[-1]["licence"]) == ("request 7", "")
    freed = json.loads(steerclear("negate", "compact", bad, "--json").stdout)["freed"]
    assert freed == 2 * (len(next(iter(NegationStore.open(bad).to_set().latents.flatten(1)))) * 2)
    assert "0.00 MiB" in steerclear("negate", "compact", bad).stdout
    checked = json.loads(steerclear("negate", "verify", bad, "--model", model_folder, "--json").stdout)
    assert (checked["ok"], checked["removed"], checked["orphans"]) == (True, 0, 0)
    assert {"database", "sha256 of every latent", "space"} <= set(checked["checked"])
    file, back = tmp_path / "out.safetensors", tmp_path / "back.negation"
    steerclear("negate", "export", bad, "-o", file, "--label", "noise")
    steerclear("negate", "import", file, "-o", back, "--precision", "float32")
    with NegationStore.open(bad) as one, NegationStore.open(back) as other:
        assert one.ids() == other.ids() == NegationSet.load(file).ids
        assert torch.equal(one.to_set().latents.float(), other.to_set().latents)
    steerclear("negate", "add", back, bad)  # one store into another: all are there already
    assert json.loads(steerclear("negate", "inspect", back, "--json").stdout)["labels"] == {"noise": 5}
    sheet = tmp_path / "sheet.png"
    steerclear("negate", "inspect", bad, "--sheet", sheet, "--images", picture_folder)
    assert sheet.exists()
    steerclear("negate", "inspect", bad, "--sheet", tmp_path / "decoded.png", "--model", model_folder)
    assert (tmp_path / "decoded.png").exists()


def test_a_damaged_store_does_not_verify(steerclear, bad):
    with (bad / "vectors-000001.bin").open("r+b") as file:
        file.write(b"\x01\x02")
    assert "another vector for 'noise-0.png' than was stored" in steerclear("negate", "verify", bad, code=1).stderr


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (("remove", "bad.negation", "nobody"), "nobody", 2),
        (("remove", "bad.negation", "noise-0.png", "-o", "x.safetensors"), "negate export", 2),
        (("verify", "bad.negation", "--sha256", "00"), "export it", 2),
        (("verify", "missing.negation"), "negate build", 2),
        (("inspect", "."), "negate build", 2),
        (("compact", "missing.negation"), "negate build", 2),
        (("export", "bad.negation", "-o", "x.safetensors", "--label", "cats"), "cats", 2),
        (("import", "missing.safetensors", "-o", "x.negation"), "missing.safetensors", 2),
        (("build", ".", "-o", "x.safetensors", "--licence", "CC0"), "a single file keeps no provenance", 2),
    ],
)
def test_wrong_input_is_one_clear_line(steerclear, bad, monkeypatch, words, said, code):
    monkeypatch.chdir(bad.parent)
    result = steerclear("negate", *words, code=code)
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    with NegationStore.open(bad) as store:
        assert len(store) == 6


def test_an_emptied_store_is_shown_and_not_drawn_with(steerclear, bad, model_folder, tmp_path):
    steerclear("negate", "remove", bad, *[f"noise-{i}.png" for i in range(6)])
    assert "0 items" in steerclear("negate", "inspect", bad).stdout
    assert "0 items" in steerclear("negate", "verify", bad).stdout
    words = ("--model", model_folder, "--negation", bad, "--guard", "dynamic", "--out", tmp_path / "out")
    assert "at least one item" in steerclear("generate", "a drink", *words, code=2).stderr


def test_generate_takes_stores(steerclear, bad, model_folder, tmp_path):
    file, safe = tmp_path / "bad.safetensors", tmp_path / "safe.negation"
    steerclear("negate", "export", bad, "-o", file)
    steerclear("negate", "build", "--prompt", "a cat", "-n", 2, "--steps", 2, "--model", model_folder, "-o", safe)
    pictures = []
    for name, negation in (("store", bad), ("file", file)):
        words = ("--model", model_folder, "--negation", negation, "--safe", safe, "--bandwidth", 20.0, "--steps", 3)
        steerclear("generate", "a drink", *words, "--seed", 1, "--out", tmp_path / name)
        pictures += [path.read_bytes() for path in sorted((tmp_path / name).rglob("*.png"))]
    assert len(pictures) == 2
    assert pictures[0] == pictures[1]
