"""Every command that a document, an error or a help text names exists, with its verbs and options."""

import ast
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import api.cli
import flowpp.__main__

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
SOURCES = sorted(
    path
    for package in ("api", "flowpp", "worker", "docs", "examples", "benchmarks")
    for path in (ROOT / package).rglob("*")
    if path.suffix in (".py", ".js", ".html")
)
SHELLS = ("bash", "sh", "console", "")
HISTORY = {ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "RESULTS.md"}
"""They name commands of their time."""

FLOWPP: Any = typer.main.get_command(api.cli.app)
PYTHON_FLOWPP: Any = typer.main.get_command(flowpp.__main__.app)
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"].keys()


def spans(text: str) -> Iterator[str]:
    """The inline code of a text."""
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))


def of_document(text: str) -> Iterator[str]:
    """Inline code, and each line of blocks that a shell runs, fenced or indented."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    for language, block in fence.findall(text):
        if language in SHELLS:
            yield from block.replace("\\\n", " ").splitlines()
    rest = fence.sub("", text)
    yield from (line.strip() for line in rest.splitlines() if line.startswith("    "))
    yield from spans(rest)


def of_source(path: Path) -> Iterator[str]:
    """Yields the inline code of all strings of a module, X in place of formatted values, or of the text of a script."""
    if path.suffix != ".py":
        yield from spans(path.read_text(encoding="utf-8"))
        return
    inside = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            yield from spans("".join(str(getattr(part, "value", "")) if isinstance(part, ast.Constant) else "X"
                                     for part in node.values))  # fmt: skip
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield from spans(node.value)


def commands(line: str) -> Iterator[list[str]]:
    """The commands of ours in a line of a shell, as words without prefixes such as `env NAME=VALUE`."""
    text = re.sub(r"\$\(([^)]*)\)", r" ; \1 ; ", line)
    for part in re.split(r"\s*(?:;|&&|\|\|?|\s#\s.*$)\s*", text):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:
            words = part.split()
        names = [re.sub(r"^\.venv/bin/", "", word) for word in words]
        start = next((index for index, name in enumerate(names) if is_ours(names[index:])), None)
        if start is not None and all(is_prefix(name) for name in names[:start]):
            yield names[start:]


def is_ours(words: list[str]) -> bool:
    """Returns True if words begin with a command that this project has."""
    return words[0] in ("flowpp", "make", "pip") or (words[0] in ("python", "python3") and words[1:2] == ["-m"])


def is_prefix(word: str) -> bool:
    """Returns True if a word may precede a command: a variable, a keyword of the shell, or a part of `docker run`."""
    return "=" in word or word in {"!", "until", "while", "if", "do", "then", "env", "docker", "compose", "run", "exec",
                                   "--rm", "api", "sudo", "$"}  # fmt: skip


def fault(words: list[str]) -> str | None:
    """Why a command cannot be run, or None."""
    if words[0] == "make":
        named = [word for word in words[1:] if re.fullmatch(r"[a-z][a-z-]*", word)]
        return next((f"make has no target {word}" for word in named if word not in TARGETS), None)
    if words[0] == "pip" or words[1:3] == ["-m", "pip"]:
        bad = [word for word in words if word.startswith("flowpp")]
        unknown = [extra for word in words for extra in re.findall(r"\[(\w+)\]", word) if extra not in EXTRAS]
        return f"the package index has no {bad[0]}" if bad else f"there is no extra {unknown[0]}" if unknown else None
    if words[0] == "flowpp":
        return fault_of(FLOWPP, words[1:])
    module = words[2] if len(words) > 2 else ""
    if module == "flowpp":
        return fault_of(PYTHON_FLOWPP, words[3:])
    if module == "torch.distributed.run" and "flowpp" in words:
        return fault_of(PYTHON_FLOWPP, words[words.index("flowpp") + 1 :])
    return None if importlib.util.find_spec(module) else f"there is no module {module}"


def fault_of(command: Any, words: list[str]) -> str | None:
    """Returns the verb or the option that the command does not have, or None."""
    for index, word in enumerate(words):
        if hasattr(command, "commands") and re.fullmatch(r"[a-z][a-z-]*", word):
            if word not in command.commands:
                return f"{command.name} has no command {word}"
            return fault_of(command.commands[word], words[index + 1 :])
        options = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        name = word.partition("=")[0]
        if re.fullmatch(r"-[a-zA-Z]|--[a-z-]+", name) and name not in options | {"--help"}:
            return f"{command.name} has no option {name}"
    return None


def test_a_fault_is_found_where_there_is_one() -> None:
    lines = [
        ("flowpp import FILE.npz", "no command import"),
        ("JOB=$(.venv/bin/flowpp train $DATASET --preset tiny --stepz 60)", "no option --stepz"),
        ("python -m flowpp score run", "no command score"),
        ("python -m torch.distributed.run --nproc-per-node 2 -m flowpp trane run", "no command trane"),
        ("pip install 'flowpp[tracing]'", "the package index has no flowpp"),
        ("python -m pip install -e '.[traces]'", "no extra traces"),
        ("FLOWPP_URL=x flowpp jobs lst", "no command lst"),
        ("make tests", "no target tests"),
        ("python -m examples.nothing", "no module"),
    ]
    for line, expected in lines:
        (words,) = commands(line)
        assert expected in (fault(words) or ""), line
    for right in (
        "flowpp",
        "flowpp --version",
        "flowpp jobs watch JOB",
        "make test # runs all",
        "python -m flowpp import F",
    ):
        (words,) = commands(right)
        assert fault(words) is None, right


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path not in HISTORY], ids=lambda path: path.name)
def test_every_command_of_a_document_exists(path: Path) -> None:
    found = [words for line in of_document(path.read_text(encoding="utf-8")) for words in commands(line)]
    assert [(shlex.join(words), why) for words in found if (why := fault(words))] == []


def test_every_command_of_an_error_or_a_help_text_exists() -> None:
    found = [(path, words) for path in SOURCES for line in of_source(path) for words in commands(line)]
    assert len(found) > 30
    assert [(path.name, shlex.join(words), why) for path, words in found if (why := fault(words))] == []
