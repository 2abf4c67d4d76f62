"""The rules of CONTRIBUTING.md that a program can check."""

import re
import subprocess
from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]


def test_imports_run_one_way_and_the_api_needs_no_torch() -> None:
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_no_file_is_a_home_for_leftovers() -> None:
    names = {path.stem for room in ("api", "flowpp", "worker", "examples") for path in (ROOT / room).rglob("*.py")}
    assert not {name for name in names if re.fullmatch(r"_?(utils?|helpers?|common|misc|managers?)", name)}


def test_nothing_is_pickled() -> None:
    pickling = re.compile(r"^\s*(import pickle|from pickle)|allow_pickle=True|weights_only=False", re.MULTILINE)
    found = {
        path.relative_to(ROOT).as_posix()
        for room in ("api", "flowpp", "worker", "examples")
        for path in (ROOT / room).rglob("*.py")
        if pickling.search(path.read_text())
    }
    assert found <= {"flowpp/cifar.py"}, "whose unpickler admits numpy arrays and nothing else"


def test_no_registry_host_is_named() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    hosts = re.compile(r"pypi\.org|pythonhosted|npmjs|download\.pytorch")
    named = [name for name in files if name != "tests/test_architecture.py" and hosts.search((ROOT / name).read_text())]
    assert not named
