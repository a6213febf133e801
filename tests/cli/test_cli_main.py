"""The shell around the commands: help, errors, speed, ``python -m``, and ``models``."""

import json
import re
import shlex
import subprocess
import sys

import click
import pytest

from steerclear.app.cli import main

HEAVY = {"torch", "diffusers", "transformers", "numpy", "PIL", "pyarrow", "jinja2", "safetensors"}


def commands(group=main, path=()):
    for name, command in group.commands.items():
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_command_teaches(steerclear, path):
    text = steerclear(*path, "--help").stdout
    command = main
    for name in path:
        command = command.commands[name]
    assert command.epilog
    assert command.help
    if not isinstance(command, click.Group):
        assert f"steerclear {' '.join(path)}" in text
    assert all(option.help for option in command.params if isinstance(option, click.Option))


@pytest.mark.parametrize("group", [(), ("negate",), ("evaluate",), ("finetune",)], ids=" ".join)
def test_no_command_is_described_by_half_a_sentence(steerclear, group):
    text = steerclear(*group, "--help", terminal_width=80).stdout
    assert "..." not in text.partition("Commands:")[2]


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_the_examples_parse(path):
    """Every example line of a command's help is a command line that the parser accepts."""
    command, parent = main, main
    for name in path:
        command, parent = command.commands[name], command
    lines = re.findall(rf"^  (?:.*\| )?steerclear {' '.join(path)}\b(.*)$", command.epilog or "", re.MULTILINE)
    assert lines or isinstance(command, click.Group)
    for line in lines:
        words = re.split(r"   +|  > ", line)[0].split(" > ")[0].strip()
        arguments = shlex.split(words)
        if "prompts.txt" in arguments:
            continue  # opens the file at once
        command.make_context(path[-1], arguments, parent=click.Context(parent))


def test_help_is_light_and_m_works():
    """A real process: nothing heavy is imported for the help, neither by the entry point nor by ``python -m``."""
    code = (
        "import sys; sys.argv = ['steerclear', '--help']\n"
        "from steerclear.app.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    done = subprocess.run([sys.executable, "-m", "steerclear", "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"steerclear, version \d+\.\d+\.\d+", done.stdout.strip())


def test_help_is_fast():
    """The time that Python itself needs is subtracted; the limit is generous for a busy machine."""

    def cpu_seconds(*words):
        code = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
        program = f"import sys; sys.argv = ['x', '--help']\n{words[0]}\n{code}"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return float(done.stdout.strip().splitlines()[-1])

    shell = "from steerclear.app.cli import main\ntry: main()\nexcept SystemExit: pass"
    assert min(cpu_seconds(shell) for _ in range(2)) < 0.6


def test_debug_shows_the_traceback(steerclear):
    quiet = steerclear("negate", "verify", "missing.safetensors", code=2)
    assert quiet.stderr.startswith("error: missing.safetensors")
    loud = steerclear("--debug", "negate", "verify", "missing.safetensors", code=1)
    assert type(loud.exception).__name__ == "InvalidInput"


def test_unknown_words_are_usage_errors(steerclear):
    assert "No such command" in steerclear("nonsense", code=2).stderr
    assert "No such option" in steerclear("generate", "--nonsense", code=2).stderr


def test_models(steerclear, shipped):
    text = steerclear("models").stdout
    assert "emoji-sd" in text
    assert "weapons" in text
    listed = json.loads(steerclear("models", "--json").stdout)
    assert [model["name"] for model in listed["models"]] == ["emoji-sd", "emoji-dit", "avatars-ddpm"]
    assert listed["models"][0]["installed"]
    assert "dagger" in listed["policies"]["weapons"]
