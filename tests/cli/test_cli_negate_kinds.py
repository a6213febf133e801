"""Every ``steerclear negate`` command, and ``generate``, over everything that a path may name: it works, or one line
says what was expected, what is there and what to do, before any model is loaded and with nothing changed."""

import json
import shutil

import pytest
import torch

from steerclear.negation import NegationSet, NegationStatistics, NegationStore, Space

SPACE = Space(encoder="sha256:" + "ab" * 32, shape=(2, 3), name="a tiny encoder")
SET, STORE, STATISTICS = "set.safetensors", "store.negation", "statistics.safetensors"
PICTURES = ("folder", "text.txt")  # as a source, they may hold pictures
NONE = (
    *PICTURES,
    "missing.safetensors",
    "missing.negation",
    "empty.negation",
    "cut.safetensors",
    "cut-statistics.safetensors",
    "text.safetensors",
    "text.negation",
    "nothing.safetensors",
    "other.safetensors",
)
MODEL = ("--model", "no such model")


def latents(n, seed=0):
    return torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A folder with a set, a store, statistics, and much that is none of them."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("kinds")
    items = NegationSet(latents=latents(12), space=SPACE, labels=("axe",) * 12)
    items.save(folder / "set.safetensors")
    NegationStore.from_set(folder / "store.negation", items).close()
    NegationStatistics.of(items, rank=2).save(folder / "statistics.safetensors")
    more = NegationSet(latents=latents(3, 1), space=SPACE, ids=("a", "b", "c"))
    more.save(folder / "more.safetensors")
    for name in ("folder", "empty.negation"):
        (folder / name).mkdir()
    (folder / "folder" / "notes.txt").write_text("nothing")
    for name, of in (("cut", "set"), ("cut-statistics", "statistics")):
        (folder / f"{name}.safetensors").write_bytes((folder / f"{of}.safetensors").read_bytes()[:-20])
    for name in ("text.txt", "text.safetensors", "text.negation"):
        (folder / name).write_text("a text of some length, and nothing else")
    (folder / "nothing.safetensors").write_bytes(b"")
    save_file({"weight": torch.zeros(2)}, folder / "other.safetensors")
    return folder


@pytest.fixture
def fresh(everything, tmp_path, monkeypatch):
    """A new copy of the folder at every call, and to work in."""

    def copy(name):
        shutil.copytree(everything, tmp_path / name)
        monkeypatch.chdir(tmp_path / name)
        return tmp_path / name

    return copy


def content(folder):
    """Of every file but SQLite's own, beside a store that was read."""
    paths = [path for path in folder.rglob("*") if not path.name.endswith(("-shm", "-wal"))]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def refused(steerclear, folder, *words):
    """What a command says that changes nothing and ends in one clear line."""
    before = content(folder)
    said = steerclear(*words, code=2).stderr
    assert said.startswith("error: "), said
    assert said.count("\n") == 1
    assert "expected" in said
    assert "got" in said or "found" in said
    assert ";" in said
    assert content(folder) == before
    return said


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        ("inspect {}", (SET, STORE, STATISTICS)),
        ("inspect {} --items", (SET, STORE)),
        ("add {} more.safetensors", (SET, STORE)),
        ("add {} more.safetensors -o new.safetensors", (SET,)),
        ("add more.safetensors {}", (SET, STORE)),
        ("add store.negation more.safetensors {}", (SET, STORE)),
        ("remove {} item-3", (SET, STORE)),
        ("remove {} item-3 -o new.safetensors", (SET,)),
        ("summarise {} -o new.safetensors", (SET, STORE)),
        ("summarise set.safetensors -o {}", (STATISTICS, "missing.safetensors")),
        ("compact {}", (STORE,)),
        ("export {} -o new.safetensors", (STORE,)),
        ("export store.negation -o {}", (SET, "missing.safetensors")),
        ("import {} -o new.negation", (SET,)),
        ("import set.safetensors -o {}", ("missing.negation",)),
    ],
)
def test_every_command_takes_what_it_can_and_refuses_the_rest(steerclear, fresh, words, taken):
    names = dict.fromkeys((SET, STORE, STATISTICS, "missing.safetensors", "missing.negation"))
    if "-o {}" not in words:  # a target that is no set may be replaced
        names |= dict.fromkeys(NONE)
    if words.startswith("add") and not words.startswith("add {}"):
        names = {name: None for name in names if name not in PICTURES}
    for name in names:
        folder, line = fresh(name), ["negate", *words.format(name).split()]
        if name in taken:
            steerclear(*line)
        elif name == STORE and words.endswith("-o new.safetensors"):
            assert "negate export" in steerclear(*line, code=2).stderr
        else:
            assert name in refused(steerclear, folder, *line)


@pytest.mark.parametrize("name", NONE)
def test_verify_says_whether_all_is_well(steerclear, fresh, name):
    """Exit code 1 is its answer; 2 is for a path at which there is nothing."""
    fresh("here")
    for well in (SET, STORE, STATISTICS):
        assert ": ok" in steerclear("negate", "verify", well).stdout
    said = steerclear("negate", "verify", name, code=2 if "missing" in name else 1).stderr
    assert said.startswith(f"error: {name}: expected")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"add {STATISTICS} folder", "give the set that they were made of"),
        (f"add {SET} folder {STATISTICS}", "give the set that they were made of"),
        (f"add {SET} folder nowhere", "nowhere: expected pictures or a negation set, found nothing"),
        (f"add {SET} folder -o {STATISTICS}", "to replace, got statistics"),
        (f"add {SET} folder -o new.negation", "got that of a store"),
        (f"add {SET} folder -o missing/new.safetensors", "create it first"),
        ("add cut.safetensors folder", "restore the file from a copy"),
        (f"build {SET} -o new.safetensors", "expected pictures, got a negation set"),
        (f"build {STORE} -o new.safetensors", "expected pictures, got a store"),
        (f"build {STATISTICS} -o new.safetensors", "expected pictures, got statistics"),
        (f"build folder -o {STATISTICS}", "to replace, got statistics"),
        (f"build folder -o {STORE}", f"steerclear negate add {STORE} SOURCE"),
        ("build folder -o empty.negation", "choose another name"),
        ("build --prompt x -o missing/new.negation", "create the folder first"),
        (f"inspect {STATISTICS} --sheet s.png", "leave out --items and --sheet"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(steerclear, fresh, words, said):
    assert said in refused(steerclear, fresh("here"), "negate", *words.split(), *MODEL)


@pytest.mark.parametrize("name", NONE)
@pytest.mark.parametrize("words", [(), ("--safe", SET), ("--guard", "published")])
def test_generate_looks_at_sets_before_a_model_is_loaded(steerclear, fresh, name, words):
    assert name in refused(steerclear, fresh("here"), "generate", "a drink", "--negation", name, *words, *MODEL)
    assert name in refused(steerclear, fresh("too"), "generate", "a drink", "--negation", SET, "--safe", name, *MODEL)


@pytest.mark.parametrize("name", [*NONE, STATISTICS])
def test_finetune_looks_at_sets_before_a_model_is_loaded(steerclear, fresh, name):
    words = ("finetune", "safegen", "-o", "out", *MODEL)
    assert name in refused(steerclear, fresh("here"), *words, "--negation", name, "--safe", SET)
    assert name in refused(steerclear, fresh("too"), *words, "--negation", SET, "--safe", name)


def test_a_store_is_never_made_where_something_is(steerclear, fresh):
    folder = fresh("here")
    assert f"negate add {STORE} {SET}" in refused(steerclear, folder, "negate", "import", SET, "-o", STORE)
    for name in ("empty.negation", "text.negation", "text.txt"):
        assert "another name" in refused(steerclear, folder, "negate", "import", SET, "-o", name)
    assert "NAME.negation" in refused(steerclear, folder, "negate", "import", SET, "-o", "new.safetensors")


def test_sources_are_added_to_a_store_all_or_none(steerclear, fresh):
    folder = fresh("here")
    NegationSet(latents=latents(1, 2), space=SPACE, ids=("a",)).save(folder / "clash.safetensors")
    with NegationStore.open(STORE) as store:
        steerclear("negate", "add", STORE, "more.safetensors", "clash.safetensors", code=2)
        assert len(store) == 12
        steerclear("negate", "add", STORE, "more.safetensors", SET)
        assert {item.provenance for item in store.items()} == {"", "more.safetensors"}
        assert len(store) == 15


def test_a_set_of_another_encoder_is_refused_before_a_model_is_loaded(steerclear, fresh):
    folder = fresh("here")
    other = Space(encoder="sha256:" + "cd" * 32, shape=(2, 3), name="another encoder")
    NegationSet(latents=latents(2, 3), space=other, ids=("x", "y")).save(folder / "foreign.safetensors")
    words = ("negate", "add", SET, "foreign.safetensors", "folder")
    assert "another encoder" in refused(steerclear, folder, *words, *MODEL)


def test_add_names_the_model_that_is_wanted_before_it_encodes(steerclear, fresh, model_folder, monkeypatch):
    folder = fresh("here")
    monkeypatch.setattr(NegationSet, "encode", None)
    said = refused(steerclear, folder, "negate", "add", SET, "folder", "--model", model_folder)
    assert "a tiny encoder" in said
    assert "--model" in said


def test_a_build_without_a_picture_leaves_nothing_behind(steerclear, fresh, model_folder):
    folder = fresh("here")
    assert "notes.txt" in steerclear(
        "negate", "build", "folder", "-o", "new.safetensors", "--model", model_folder, code=2
    ).stderr  # fmt: skip
    assert not list(folder.glob("new*"))


@pytest.mark.parametrize("words", [("--guard", "dynamic", "--scheduler", "ddpm"), ("--safe", "safe.safetensors")])
def test_generate_takes_statistics(steerclear, model_folder, picture_folder, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    model = ("--model", model_folder)
    steerclear("negate", "build", picture_folder, "-o", SET, *model)
    steerclear("negate", "build", "--prompt", "a cat", "-n", 2, "--steps", 2, "-o", "safe.safetensors", *model)
    steerclear("negate", "summarise", SET, "-o", STATISTICS, "--least", 2)
    call = ("generate", "a drink", "--bandwidth", 20, "--steps", 3, "--json", *model, *words)
    of = {name: json.loads(steerclear(*call, "--negation", name).stdout)["pictures"][0] for name in (SET, STATISTICS)}
    assert of[STATISTICS]["guard"]["steps"] == 3
    assert of[STATISTICS]["guard"]["fired"] > 0
    assert of[STATISTICS]["settings"]["guard"] != of[SET]["settings"]["guard"]
    published = steerclear("generate", "a drink", "--negation", STATISTICS, "--guard", "published", *model, code=2)
    assert "use --guard safe-denoiser or dynamic" in published.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"add {SET} more.safetensors --label x", "--label is for pictures"),
        (f"inspect {SET} --images folder", "give both"),
        ("build folder --steps 3 -o new.safetensors", "--steps would do nothing with SOURCE"),
        ("build --prompt x --ray --skipped l -o new.safetensors", "--ray, --skipped would do nothing with --prompt"),
    ],
)
def test_options_that_would_do_nothing_are_refused(steerclear, fresh, words, said):
    folder = fresh("here")
    before = content(folder)
    assert said in steerclear("negate", *words.split(), code=2).stderr
    assert content(folder) == before


def test_generate_names_the_model_that_is_wanted(steerclear, fresh, model_folder):
    folder = fresh("here")
    words = ("a drink", "--negation", SET, "--scheduler", "ddpm", "--model", model_folder, "--steps", 2)
    said = steerclear("generate", *words, code=2).stderr
    assert "give the --model that made the set" in said
    assert not (folder / "pictures").exists()
