"""What a training goes on from: read back bit for bit, laid out as it was, and nothing taken from a stranger's file."""

import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerclear.errors import InvalidInput
from steerclear.files import states
from steerclear.files.tensors import write as write_tensors

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


def same(one, other):
    """Equal to the bit and to the type, the order of keys and the strides of tensors."""
    if isinstance(one, torch.Tensor):
        bits = [value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other)]
        return one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(*bits)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


@given(tree=TREES)
def test_any_nest_of_values_comes_back(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("states") / "state"
    states.write(path, tree)
    assert same(tree, states.read(path))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_come_back_as_they_lay(dtype, tmp_path):
    dense = (torch.arange(72).reshape(3, 2, 4, 3) % 7).to(dtype)
    tree = {
        "plain": dense,
        "channels_last": dense.contiguous(memory_format=torch.channels_last),
        "1x1": dense[:, :, :1, :1].contiguous(memory_format=torch.channels_last),
        "transposed": dense.flatten(1).T,
        "number": torch.tensor(1).to(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "a/b": dense[0],  # the names of the next two would be the same
        "a": {"b": dense[1]},
        0: [dense[2]],
        "0": [dense[0]],
        "not a number": torch.tensor([torch.nan, -0.0, torch.inf]),
    }
    states.write(tmp_path / "state", tree)
    assert same(tree, states.read(tmp_path / "state"))


def network():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.SiLU(), torch.nn.Conv2d(8, 4, 3)]
    return torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)


class Training:
    """Few steps of everything that a recipe keeps: weights, moments, an average, a schedule, two generators."""

    def __init__(self, optimiser, **settings):
        self.network = network()
        self.average = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.optimiser = optimiser(self.network.parameters(), lr=1e-2, **settings)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, 10)
        self.rng, self.step = np.random.default_rng(0), 0

    def run(self, steps):
        for _ in range(steps):
            x = torch.randn(2, 3, 8, 8) * self.rng.random()
            self.optimiser.zero_grad()
            self.network(x.contiguous(memory_format=torch.channels_last)).square().mean().backward()
            self.optimiser.step()
            self.schedule.step()
            self.step += 1
            for name, value in self.network.state_dict().items():
                self.average[name] = value.clone() if self.step == 1 else (self.average[name] + value) / 2
        return self

    def state(self):
        known = {"network": self.network, "optimiser": self.optimiser, "schedule": self.schedule}
        known = {name: dict(part.state_dict()) for name, part in known.items()}
        known |= {"average": self.average, "step": self.step}
        return known | {"numpy": self.rng.bit_generator.state, "torch": torch.get_rng_state()}

    def restore(self, state):
        for name in ("network", "optimiser", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.average, self.step = state["average"], state["step"]
        self.rng.bit_generator.state = state["numpy"]
        torch.set_rng_state(state["torch"])
        return self


@pytest.mark.parametrize(
    ("optimiser", "settings"),
    [
        (torch.optim.AdamW, {"weight_decay": 1e-2}),
        (torch.optim.AdamW, {"fused": True}),  # which needs moments laid out like the weights
        (torch.optim.Adam, {"amsgrad": True, "betas": (0.8, 0.9)}),
        (torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_going_on_equals_never_having_stopped(optimiser, settings, tmp_path):
    with torch.random.fork_rng():
        once = copy.deepcopy(Training(optimiser, **settings).run(7).state())
        state = Training(optimiser, **settings).run(3).state()
        states.write(tmp_path / "state", state)
        back = states.read(tmp_path / "state")
        assert same(state, back)
        torch.manual_seed(5)
        again = Training(optimiser, **settings).restore(back).run(4).state()
    assert same(once, again)


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return (type(self.witness).touch, (self.witness,))


def test_a_file_of_torch_is_refused_and_not_unpickled(tmp_path):
    for content in ({"step": 1, "weights": torch.ones(3)}, Bomb(tmp_path / "witness")):
        torch.save(content, tmp_path / "checkpoint.pt")
        with pytest.raises(InvalidInput, match=r"checkpoint\.pt: expected .* in safetensors, got .*remove it"):
            states.read(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "witness").exists()


def test_a_recipe_goes_on_from_what_it_stored_and_from_no_pickle(tmp_path):
    path = Path(__file__).parents[1] / "recipes" / "emoji_sd" / "checkpoints.py"
    spec = importlib.util.spec_from_file_location("checkpoints", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    new, older = tmp_path / "vae.checkpoint.safetensors", tmp_path / "vae.checkpoint.pt"
    assert recipe.resume(new) is None
    torch.save({"step": 1}, older)
    with pytest.raises(InvalidInput, match=r"vae\.checkpoint\.pt: expected .*safetensors.*torch's format.*remove it"):
        recipe.resume(new)
    recipe.store(new, {"step": 2})
    assert recipe.resume(new) == {"step": 2}


ONE = {"/a": torch.ones(2, 3)}
TAKEN = {"tensor": "/a", "order": [0, 1]}


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ("", "Expecting value"),
        ("{", "Expecting"),
        ("[" * 100_000, "recursion"),
        ("9" * 5000, "digits"),
        (" " * (states.MAX_TEXT + 1), "characters of JSON"),
        ({"dict": {}}, "no part"),
        ({"dict": [["a", 1, 2]]}, "unpack"),
        ({"dict": [[["a"], 1]]}, "keys"),
        ({"dict": [[1.5, 1]]}, "keys"),
        ({"dict": [7]}, "unpack"),
        ({"tuple": 3}, "no part"),
        ({"tensor": "/b", "order": [0]}, "no part"),
        ({"tensor": "/a"}, "no part"),
        ({"tensor": "/a", "order": [0]}, "2 dimensions"),
        ({"tensor": "/a", "order": [0, 0]}, "2 dimensions"),
        ({"tensor": "/a", "order": [0, 10**9]}, "2 dimensions"),
        ({"tensor": "/a", "order": [0, None]}, "not supported"),
        ([TAKEN, TAKEN], "no part"),
    ],
)
def test_hostile_states_are_refused(state, match, tmp_path):
    text = state if isinstance(state, str) else json.dumps(state)
    write_tensors(tmp_path / "bad", ONE, {"kind": states.KIND, "state": text})
    with pytest.raises(InvalidInput, match=match):
        states.read(tmp_path / "bad")


def test_other_files_are_refused(tmp_path):
    write_tensors(tmp_path / "bad", ONE, {"format": "pt"})
    for path, match in ((tmp_path / "bad", "no 'steerclear state 1'"), (tmp_path, "a folder")):
        with pytest.raises(InvalidInput, match=match):
            states.read(path)
    states.write(tmp_path / "cut", {"a": torch.ones(9)})
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-4])
    with pytest.raises(InvalidInput, match="damaged"):
        states.read(tmp_path / "cut")


@pytest.mark.parametrize("state", [{"a": [{1}]}, {"a": np.zeros(3)}, {(1, 2): 3}, {True: 1}, object(), 2j])
def test_what_is_no_state_is_not_written(state, tmp_path):
    with pytest.raises(InvalidInput, match="expected"):
        states.write(tmp_path / "state", state)
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "MAX_TENSORS", 2)
    with pytest.raises(InvalidInput, match="at most 2 tensors"):
        states.write(tmp_path / "state", [torch.ones(1)] * 3)
    monkeypatch.setattr(states, "MAX_TEXT", 20)
    with pytest.raises(InvalidInput, match="20 characters"):
        states.write(tmp_path / "state", list(range(20)))
