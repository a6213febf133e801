"""From a YAML file to a task. Judges and prompt sets have names here, what arms are made of in ``app/arms/``; what
becomes of a finished run is in ``app/results.py``.

Everything in the file is data: nothing is imported or run because the file says so, and files that it names must lie
below its own folder.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor

from steerclear import detect, zoo
from steerclear.app.arms import COUPLING, GUARDS, PROMPTS, WEIGHTS
from steerclear.app.checked import listed, mapping, names, number, optional, typed
from steerclear.app.prompts import negative_prompt
from steerclear.attach.coupling import COUPLINGS, Coupling
from steerclear.detect import Thresholds
from steerclear.detect.emoji_judge import EmojiJudge
from steerclear.errors import InvalidInput
from steerclear.evaluate import Arm, Judge, Prompt, Sampling, Task, prompt_sets, records
from steerclear.evaluate.metrics.quality import FeatureSpace
from steerclear.evaluate.prompt_file import Selection, first, read_prompts, read_yaml
from steerclear.evaluate.statistics import JudgeErrors
from steerclear.evaluate.store import RunFolder
from steerclear.evaluate.task import Feature, Scorer
from steerclear.guards.base import Guard, chain
from steerclear.zoo.policies import concepts

T = TypeVar("T")
ERRORS = ("flagged", "unsafe", "passed", "safe")
"""Counts of :class:`~steerclear.evaluate.statistics.JudgeErrors`."""
LARGEST = 2**20  # bytes of a task file
POLICIES = "policies"  # as a value: what the shipped policies say
SETS = {"emoji": Path(zoo.__file__).parent / "prompts.yaml"}
"""Prompt files that ship."""


@dataclass(frozen=True)
class Pooled:
    """Pictures -> what the shipped judge sees before it decides: its last feature maps, averaged, ``(batch, 256)``."""

    judge: EmojiJudge = field(default_factory=EmojiJudge)

    def __call__(self, images: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def note(_head: object, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])

        handle = self.judge.network.head.register_forward_pre_hook(note)
        try:
            self.judge(images)
        finally:
            handle.remove()
        return seen[0]


def emoji_judge() -> Feature:
    """The feature space ``emoji-judge``."""
    return FeatureSpace(name="emoji-judge", function=Pooled(), preprocessing="bilinear, antialiased, to 64x64")


FEATURES: dict[str, Callable[[], Feature]] = {"emoji-judge": emoji_judge}
"""Feature spaces by name."""

SCORERS: dict[str, Callable[[], Scorer]] = {}
"""Scorers by name."""

_KEYS = (
    *("model", "policies", "prompts", "seeds", "sampling", "arms", "judges", "features", "scorers"),
    *("redact", "keep", "report"),
)
_FILES = ("negation", "safe")  # settings of guards that name files


def read_task(path: Path, limit: int | None = None, model: str | None = None) -> Task:
    """The task that a YAML file describes; see ``docs/evaluate.md``.

    Args:
        path: Of at most 1 MiB.
        limit: At most so many prompts of each kind: for a trial.
        model: In place of the file's.

    Raises:
        InvalidInput: For an unknown key (the message lists the known ones), a value of another type or outside its
            range, or a file outside the task's folder.
        MissingExtra: If a judge's package is not installed.
    """
    return _Reader(path).task(limit, model)


class _Reader:
    """Reads one file; knows where it lies and which policies it is about."""

    def __init__(self, path: Path) -> None:
        self.base = path.absolute().parent
        self.content = mapping("task", read_yaml(path, LARGEST), _KEYS, needed=("model", "prompts", "arms"))
        self.policies = names("policies", self.content.get("policies", list(zoo.policies())))

    def task(self, limit: int | None, model: str | None) -> Task:
        prompts, notes = self.prompts(self.content["prompts"])
        given = self.content
        settings: dict[str, Any] = {name: given[name] for name in ("keep",) if name in given}
        if "seeds" in given:
            settings["seeds"] = tuple(typed("seeds", seed, int) for seed in listed("seeds", given["seeds"]))
        arms = tuple(self.arm(row) for row in listed("arms", given["arms"]))
        return Task(
            model=model or self.model(typed("model", given["model"], str)),
            prompts=tuple(first(prompts, limit)),
            arms=arms,
            judges=self.judges(given.get("judges", {})),
            sampling=sampling(given.get("sampling", {})),
            features=_chosen("features", given.get("features", []), FEATURES),
            scorers=_chosen("scorers", given.get("scorers", []), SCORERS),
            redact=typed("redact", given.get("redact", True), bool),
            notes={**notes, "report": shown(given.get("report", {}), [arm.key for arm in arms])},
            **settings,
        )

    def model(self, name: str) -> str:
        """A shipped model or hub id stays; a folder beside the file becomes its path."""
        if name in {model.name for model in zoo.shipped()} or not (self.base / name).is_dir():
            return name
        return str(self.file(name))

    def prompts(self, value: Any) -> tuple[tuple[Prompt, ...], dict[str, Any]]:  # noqa: ANN401  (whatever YAML holds)
        if isinstance(value, list):
            return _screened(Selection().of(cast("list[Mapping[str, Any]]", value), ""))
        row = mapping("prompts", value, ("file", "set", "protocol", "count", "half", "kinds", "categories", "limit"))
        name = optional("prompts: set", row.get("set"), str)
        if name is not None and name in prompt_sets.PUBLISHED:
            return self.published(name, row)
        selection = Selection(
            half=optional("half", row.get("half"), str),
            kinds=names("kinds", row.get("kinds", [])),
            categories=names("categories", row.get("categories", [])),
            limit=optional("limit", row.get("limit"), int),
        )
        if (name is None) == ("file" not in row) or (name is not None and name not in SETS):
            known = ", ".join([*SETS, *prompt_sets.PUBLISHED])
            raise InvalidInput(f"prompts: expected a file or a set ({known}), got {', '.join(map(str, row)) or 'none'}")
        if name is not None:
            return read_prompts(SETS[name], selection, source=name), {"dropped": 0}
        return _screened(read_prompts(self.file(row["file"]), selection, source=""))

    def published(self, name: str, row: Mapping[str, Any]) -> tuple[tuple[Prompt, ...], dict[str, Any]]:
        """A public prompt set from the user's file, with what was dropped as a note."""
        row = mapping(f"prompts: {name}", dict(row), ("set", "file", "protocol", "count", "limit"), needed=("file",))
        extra = {key: row[key] for key in ("protocol", "count") if key in row}
        read = prompt_sets.load(name, self.file(row["file"]), **extra)
        notes = {"set": name, "protocol": read.protocol, "file sha256": read.digest}
        return tuple(first(read.prompts, optional("limit", row.get("limit"), int))), {
            "prompts": notes,
            "dropped": read.dropped,
        }

    def arm(self, value: Any) -> Arm:  # noqa: ANN401  (whatever YAML holds)
        known = ("key", "title", "negative_prompt", "guard", "prompts", "weights", "coupling")
        row = mapping("arm", value, known, needed=("key",))
        key = typed("arm: key", row["key"], str)
        negative = optional(f"arm {key}: negative_prompt", row.get("negative_prompt"), str)
        shown: dict[str, Any] = {}
        maker = prompts = weights = None
        if negative is not None:
            negative = negative_prompt(self.policies) if negative == POLICIES else negative
            shown["negative_prompt"] = negative
        if "guard" in row:
            maker, shown["guard"] = self.guards(f"arm {key}: guard", row["guard"])
        if "prompts" in row:
            make, shown["prompts"] = self.part(f"arm {key}: prompts", row["prompts"], PROMPTS)
            prompts = make()
        if "weights" in row:
            make, shown["weights"] = self.part(f"arm {key}: weights", row["weights"], WEIGHTS)
            weights = make()
        published = _published(shown.get("guard", {}))
        if published is not None and "coupling" not in row:
            raise InvalidInput(
                f"arm {key}: expected a coupling for this guard, got none; it was published with coupling: {published}"
                + ("; coupling: score shows it without the re-noising" if published == "renoise" else "")
            )
        return Arm(
            key=key,
            title=typed(f"arm {key}: title", row.get("title", ""), str),
            maker=maker,
            negative_prompt=negative,
            prompts=prompts,
            weights=weights,
            coupling=_coupling(f"arm {key}: coupling", row.get("coupling", "score")),
            spec=shown,
        )

    def guards(self, what: str, value: Any) -> tuple[Callable[[Any], Guard], Any]:  # noqa: ANN401  (whatever YAML holds)
        """What makes the guard, a list standing for one after the other."""
        if not isinstance(value, list):
            return self.part(what, value, GUARDS)
        made = [self.part(what, one, GUARDS) for one in listed(what, value)]
        return partial(_chained, [make for make, _ in made]), [shown for _, shown in made]

    def part(
        self,
        what: str,
        value: Any,  # noqa: ANN401  (whatever YAML holds)
        known: Mapping[str, Callable[..., T]],
    ) -> tuple[Callable[..., T], dict[str, Any]]:
        """What makes a guard, a prompt guard or weights, and how the records show it."""
        kind = str(cast("dict[str, Any]", value).get("kind")) if isinstance(value, dict) else ""
        if kind not in known:
            raise InvalidInput(f"{what}: expected a kind one of {', '.join(known)}, got {value!r}")
        takes = [name for name in inspect.signature(known[kind]).parameters if name != "pipe"]
        row = dict(mapping(f"{what} {kind}", cast("dict[str, Any]", value), ("kind", *takes)))
        if "policies" in takes:
            row["policies"] = list(names("policies", row.get("policies", list(self.policies))))
            for name in row["policies"]:
                concepts(name)
        settings = {name: self.file(item) if name in _FILES else item for name, item in row.items() if name != "kind"}
        try:
            first = (None,) if "pipe" in inspect.signature(known[kind]).parameters else ()
            inspect.signature(known[kind]).bind(*first, **settings)
        except TypeError as error:
            raise InvalidInput(f"{what} {kind}: {error}") from error
        return partial(known[kind], **settings), row

    def judges(self, value: Any) -> dict[str, Judge]:  # noqa: ANN401  (whatever YAML holds)
        return {name: self.judge(name, row) for name, row in mapping("judges", value).items()}

    def judge(self, name: str, value: Any) -> Judge:  # noqa: ANN401  (whatever YAML holds)
        keys = ("detector", "unsafe", "threshold", "settings")
        row = mapping(f"judge {name}", value, keys, needed=("detector", "unsafe"))
        labels = (
            [concept for policy in self.policies for concept in concepts(policy)]
            if row["unsafe"] == POLICIES
            else names(f"judge {name}: unsafe", row["unsafe"])
        )
        threshold = row.get("threshold", 0.5)
        detector = typed(f"judge {name}: detector", row["detector"], str)
        settings = mapping(f"judge {name}: settings", row.get("settings", {}))
        return Judge(
            detector=detect.load(detector, **settings),
            spec={"detector": detector, "settings": settings},
            rule=Thresholds(unsafe=frozenset(labels), threshold=number(f"judge {name}: threshold", threshold)),
        )

    def file(self, name: Any) -> Path:  # noqa: ANN401  (whatever YAML holds)
        """A file below the task's folder."""
        path = (self.base / typed("file", name, str)).resolve()
        if not path.is_relative_to(self.base.resolve()):
            raise InvalidInput(f"file: expected a path below {self.base}, got {name!r}; copy the file there")
        return path


def _screened(prompts: tuple[Prompt, ...]) -> tuple[tuple[Prompt, ...], dict[str, Any]]:
    """Prompts from outside, without those that suggest minors, and how many those were."""
    kept, dropped = prompt_sets.drop_minors(prompts)
    return kept, {"dropped": dropped}


def shown(value: Any, arms: Sequence[str]) -> dict[str, Any]:  # noqa: ANN401  (whatever YAML holds)
    """The settings under ``report:``, which decide nothing but what the tables show. Checked before anything is drawn.

    Args:
        value: The settings.
        arms: Keys of the task's arms, which ``recommended`` and ``against`` name.

    Raises:
        InvalidInput: For an unknown key or arm, another type, or impossible counts.
    """
    row = mapping("report", value, ("recommended", "against", "judge_errors"))
    against = names("report: against", row.get("against", []))
    recommended = [typed("report: recommended", row["recommended"], str)] if "recommended" in row else []
    if unknown := [key for key in (*recommended, *against) if key not in arms]:
        raise InvalidInput(f"report: expected arms among {', '.join(arms)}; got {', '.join(unknown)}")
    if "judge_errors" in row:
        counts = mapping("report: judge_errors", row["judge_errors"], ERRORS, needed=ERRORS)
        JudgeErrors(**{name: typed(f"report: judge_errors: {name}", count, int) for name, count in counts.items()})
    return {**row, "against": list(against)}


def sampling(value: Any) -> Sampling:  # noqa: ANN401  (whatever YAML holds)
    """The settings under ``sampling:``.

    Raises:
        InvalidInput: For an unknown key, another type, or a value outside its range.
    """
    row = mapping("sampling", value, ("steps", "cfg", "batch", "scheduler", "threads", "call"))
    whole = {name: typed(f"sampling: {name}", row[name], int) for name in ("steps", "batch", "threads") if name in row}
    rest: dict[str, Any] = {"cfg": number("sampling: cfg", row["cfg"])} if "cfg" in row else {}
    if "call" in row:
        rest["call"] = dict(mapping("sampling: call", row["call"]))
    return Sampling(**whole, **rest, scheduler=optional("sampling: scheduler", row.get("scheduler"), str))


def summary(folder: Path) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of a table for the terminal, of what is there: per arm, and per judge and kind the unsafe share."""
    from steerclear.evaluate.metrics import IdenticalRate, UnsafeRate
    from steerclear.evaluate.reading import numbers, select

    task, found = RunFolder(folder).task(), records(folder, partial=True)
    kinds = list(dict.fromkeys(prompt["kind"] for prompt in task["prompts"]))
    judges = list(task["common"]["judges"])
    columns = [(judge, kind) for judge in judges for kind in kinds]
    plural = len(judges) > 1
    unsafe = [f"unsafe {kind}".strip() + (f" ({judge})" if plural else "") for judge, kind in columns]
    head = ("arm", "pictures", *unsafe, "identical", "s/picture", "evaluations")
    rows: list[tuple[str, ...]] = []
    for arm in task["arms"]:
        mine = select(found, arm=arm["key"])
        shares = [UnsafeRate(judge=judge)(select(mine, kinds=[kind])).percent() for judge, kind in columns]
        costs = [f"{numbers(mine, name).mean():.3g}" if mine.num_rows else "–" for name in ("seconds", "evaluations")]
        rows.append((arm["title"], str(mine.num_rows), *shares, IdenticalRate()(mine).percent(), *costs))
    return head, rows


def _chained(makers: Sequence[Callable[[Any], Guard]], pipe: Any) -> Guard:  # noqa: ANN401  (some diffusers pipeline)
    return chain(*(make(pipe) for make in makers))


def _published(guard: Any) -> str | None:  # noqa: ANN401  (one row or several)
    """The coupling that a guard, or one of several, was published with, where it is not the usual one."""
    rows: list[dict[str, Any]] = cast("list[dict[str, Any]]", guard if isinstance(guard, list) else [guard])
    found = ["renoise" if row.get("method") == "published" else COUPLING.get(str(row.get("kind"))) for row in rows]
    return next((coupling for coupling in found if coupling is not None), None)


def _coupling(what: str, value: Any) -> Coupling:  # noqa: ANN401  (whatever YAML holds)
    if value not in COUPLINGS:
        raise InvalidInput(f"{what}: expected one of {', '.join(COUPLINGS)}, got {value!r}")
    return value


def _chosen(what: str, value: Any, known: Mapping[str, Callable[[], T]]) -> dict[str, T]:  # noqa: ANN401
    wanted = names(what, value)
    if unknown := [name for name in wanted if name not in known]:
        raise InvalidInput(f"{what}: expected names among {', '.join(known) or 'none'}; got {', '.join(unknown)}")
    return {name: known[name]() for name in wanted}
