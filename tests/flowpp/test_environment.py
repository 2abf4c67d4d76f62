"""A hostile environment breaks no command and changes no result."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowpp.environment import JOINING, BrokenVariable, Group, clean, group

ROOT = Path(__file__).parents[2]
OURS = {name: value for name, value in clean(os.environ).items() if name not in ("PYTHONUTF8", "PYTHONSAFEPATH")}
CLEAN = {**OURS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

NOTEBOOK = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONWARNINGS": "error",
    "PYTHONSTARTUP": "/nonexistent/startup.py",
    "FORCE_COLOR": "1",
    "TERM": "dumb",
    "COLUMNS": "5",
}
PLAIN_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
SHELL_OF_A_CLUSTER = {
    "MPLBACKEND": "nonsense",
    "PYTHONOPTIMIZE": "2",
    "PYTHONHASHSEED": "7",
    "LC_ALL": "xx_YY.nothing",
    "TMPDIR": "/nonexistent",
    "CUDA_VISIBLE_DEVICES": "GPU-none",
    "WORLD_SIZE": "1",
    "RANK": "3",
    "LOCAL_WORLD_SIZE": "many",
    "MASTER_ADDR": "nowhere.invalid",
    "SLURM_NTASKS": "8",
}


def run(*arguments: object, cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flowpp", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace")


FEW = ("--images", "tést $\\frac$")
COMMANDS = (
    ("train", "run", "--data", "images.npy", "--preset", "tiny", "--steps", "3"),
    ("likelihood", "run", *FEW, "--bits-map", "--output", "score"),
    ("gradient", "run", *FEW),
    ("sample", "run", "-n", "3"),
    ("interpolate", "run", *FEW),
    ("encode", "run", *FEW),
    ("decode", "run", "latents.npz"),
)

ONE_AFTER_ANOTHER = """
import json, os, sys
from flowpp.__main__ import main
for arguments in json.loads(sys.argv[1]):
    try:
        main([os.fsdecode(argument.encode()) for argument in arguments])
    except SystemExit as ended:
        if ended.code:
            sys.exit(f"{arguments}: {ended.code}")
"""


def every_plotting_command(cwd: Path, environment: dict[str, str]) -> dict[str, bytes]:
    """The files that the commands leave in one process, without what names a time, a speed or a path."""
    cwd.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.save(cwd / "images.npy", images)
    folder = cwd / FEW[1]
    folder.mkdir()
    for index in range(2):
        Image.fromarray(images[index]).save(folder / f"ü $\\frac$ {index}.png")
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(COMMANDS)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, check=False)
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, said
    assert "could not be drawn" not in said
    for name in ("grid.png", "samples.npz", "latents.npz", "gradient.png"):
        assert name in done.stdout.decode(errors="replace"), "the commands print the names of their files"
    found = {str(path.relative_to(cwd)): path.read_bytes() for path in cwd.rglob("*") if path.is_file()}
    found = {name: content for name, content in found.items() if not name.startswith(("run/images/", FEW[1]))}
    kept = {}
    for name, content in found.items():
        if name.endswith(".png"):
            with Image.open(cwd / name) as image:
                content = image.tobytes()
        elif name.endswith(".npz"):
            with np.load(cwd / name) as arrays:
                content = b"".join(arrays[key].tobytes() for key in sorted(arrays) if key != "names")
        elif name.endswith("likelihood.csv"):  # names depend on the locale
            content = b"".join(line.partition(b",")[2] for line in content.splitlines())
        elif name.endswith("metrics.jsonl"):
            timed = ("time", "images_per_second")
            lines = [json.loads(line) for line in content.splitlines()]
            content = repr([{k: v for k, v in line.items() if k not in timed} for line in lines]).encode()
        elif name.endswith(("manifest.json", "config.json")) or "tfevents" in name:
            content = b""  # times and paths
        kept[name] = content
    return kept


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return every_plotting_command(tmp_path_factory.mktemp("clean") / "here", CLEAN)


def hostile(name: str, tmp_path: Path) -> dict[str, str]:
    """Returns a hostile environment; its files are below `tmp_path`."""
    if name == "notebook":
        return NOTEBOOK
    if name == "plain locale":
        return PLAIN_LOCALE
    if name == "cluster":
        return SHELL_OF_A_CLUSTER
    settings = tmp_path / "config"
    (settings / "matplotlib" / "stylelib").mkdir(parents=True)
    (settings / "matplotlib" / "matplotlibrc").write_text("text.usetex: True\nfont.family: none\nfigure.dpi: 7\n")
    (settings / "matplotlib" / "stylelib" / "mine.mplstyle").write_bytes(b"\xff\xfe broken")
    if name == "broken file":
        (settings / "matplotlibrc").write_bytes(b"\xff\xfe\x00")
        return {"MATPLOTLIBRC": str(settings / "matplotlibrc"), "MPLBACKEND": "tkagg", "DISPLAY": ""}
    if name == "unwritable":
        return {"MPLCONFIGDIR": "/proc/nothing", "HOME": "/proc/nothing", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return {"XDG_CONFIG_HOME": str(settings), "QT_QPA_PLATFORM": "xcb"}


@pytest.mark.parametrize("name", ["notebook", "plain locale", "cluster", "configured", "broken file", "unwritable"])
def test_every_command_leaves_what_it_leaves_in_a_clean_environment(
    name: str, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    found = every_plotting_command(tmp_path / "here", CLEAN | hostile(name, tmp_path))
    assert found.keys() == expected.keys()
    other = [file for file in found if zlib.crc32(found[file]) != zlib.crc32(expected[file])]
    assert other == []


def test_a_matplotlibrc_where_the_command_is_run_changes_no_plot(tmp_path: Path, expected: dict[str, bytes]) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 7\nfigure.facecolor: red\n")
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    arguments = ("train", "run", "--data", "images.npy", "--preset", "tiny", "--steps", 3)
    assert run(*arguments, cwd=tmp_path, environment=CLEAN).returncode == 0
    with Image.open(tmp_path / "run" / "training_curve.png") as image:
        assert image.tobytes() == expected["run/training_curve.png"]


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        ("import sys; sys.modules['matplotlib'] = None", "ModuleNotFoundError"),
        ("import matplotlib.figure as f; f.Figure.subplots = f.Figure.add_subplot = lambda *_, **__: 1 / 0", "Zero"),
    ],
)
def test_a_plot_that_fails_is_a_warning_with_its_reason_and_costs_no_result(
    tmp_path: Path, break_it: str, reason: str
) -> None:
    """This holds for the training curve, and for the histogram and the maps of a likelihood."""
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    train = ["train", "run", "--data", "images.npy", "--preset", "tiny", "--steps", "2"]
    score = ["likelihood", "run", "--images", "images.npy", "--bits-map", "--output", "score"]
    code = f"{break_it}\n{ONE_AFTER_ANOTHER}"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([train, score])],
        cwd=tmp_path,
        env=CLEAN,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for drawn in ("training_curve.png", "likelihood.png", "bits_map.png"):
        assert f"{drawn} could not be drawn: {reason}" in done.stderr
        assert not list(tmp_path.rglob(drawn))
    left = ("run/result.json", "run/metrics.jsonl", "run/samples/step-00000002.png", "run/checkpoints/step-00000002")
    left += ("score/likelihood.json", "score/likelihood.csv", "score/bits_map.npz")
    assert [name for name in left if not (tmp_path / name).exists()] == []


def test_a_group_is_joined_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dict(zip(JOINING, ("1", "2", "1", "2", "127.0.0.1", "29500"), strict=True))

    def of(**variables: str) -> Group:
        for name in JOINING:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return group()

    assert of(**whole) == Group(size=2, local_rank=1, local_size=2)
    assert of() == of(WORLD_SIZE="") == of(WORLD_SIZE="1", RANK="7") == of(RANK="1", MASTER_ADDR="a") == Group()
    for name in JOINING:
        if name != "WORLD_SIZE":
            with pytest.raises(BrokenVariable, match=f"WORLD_SIZE=2 without {name}: "):
                of(**{key: value for key, value in whole.items() if key != name})
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        with pytest.raises(BrokenVariable, match=f"{name} must be a number"):
            of(**whole | {name: "two"})
    with pytest.raises(BrokenVariable, match="RANK must be less than WORLD_SIZE=2, not 2"):
        of(**whole | {"RANK": "2"})


def test_a_group_that_is_named_in_part_is_one_sentence(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((20, 8, 8, 3), np.uint8))
    new = ("train", "run", "--data", "images.npy", "--preset", "tiny", "--steps", 2)
    for variables in ({"WORLD_SIZE": "4"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "two"}):
        done = run(*new, cwd=tmp_path, environment=CLEAN | variables)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "run").exists()


def test_a_child_is_in_no_group_and_has_no_settings_of_the_users_python() -> None:
    group_of_a_launcher = dict.fromkeys((*JOINING, "TORCHELASTIC_RUN_ID", "PET_NNODES", "GROUP_RANK"), "1")
    python = {"PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2", "PYTHONINSPECT": "1", "PYTHONUTF8": "0"}
    others = {
        "PATH": "/bin",
        "FLOWPP_STORE": "s",
        "OTEL_SDK_DISABLED": "true",
        "PYTHONPATH": "p",
        "OMP_NUM_THREADS": "2",
    }
    assert clean(group_of_a_launcher | NOTEBOOK | python | others) == others | {
        **{"FORCE_COLOR": "1", "TERM": "dumb", "COLUMNS": "5"},
        **{"PYTHONUTF8": "1", "PYTHONSAFEPATH": "1"},
    }


@pytest.mark.parametrize("streams", ["| head -1", "2>&1 | head -1", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_nobody_who_reads_its_output_ends_a_run(tmp_path: Path, streams: str) -> None:
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    train = f"{sys.executable} -m flowpp train run --data images.npy --preset tiny --steps 25"
    script = f"set -o pipefail; {train} {streams}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=CLEAN, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "succeeded"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 26)), "nothing else was written into the file"


def test_a_directory_that_was_removed_is_one_sentence(tmp_path: Path) -> None:
    script = f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} -m flowpp train /tmp/run"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=CLEAN, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "flowpp: the current directory has been removed; change into another one"
