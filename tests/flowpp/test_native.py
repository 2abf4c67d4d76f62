"""Building the kernels with a real compiler, once for all processes; and models where they cannot be built."""

import ctypes
import json
import logging
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowpp import levels, native
from flowpp.fused import Fusing
from flowpp.lanes import side_by_side
from flowpp.learner import Learner
from flowpp.model import FlowPP
from flowpp.native import NotBuilt
from flowpp.presets import resolve_model, resolve_training
from flowpp.processes import Processes
from tests.levels import levels_here

ROOT = Path(__file__).parents[2]

needs_compiler = pytest.mark.skipif(
    native.cannot_build("baseline") is not None, reason=native.cannot_build("baseline") or ""
)

LOG_PROB = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from flowpp.model import FlowPP
torch.manual_seed(0)
model = FlowPP("tiny").eval()
images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
with torch.no_grad():
    model.initialize(images)
    noise = model.draw_noise(4)
    print([model.log_prob(images, noise=noise).tolist() for _ in range(2)])
    model.decode(torch.zeros(1, *model.config.latent_shape))
"""


def start(arguments: list[str], cache: Path, **changes: str | None) -> subprocess.Popen:
    """Python with a cache of kernels of its own; a variable that is None is unset. The level is the highest."""
    environment = {
        **os.environ,
        levels.VARIABLE: "",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(cache),
        **changes,
    }
    environment = {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def compiler(path: Path, before: str = "", then: str = 'exec c++ "$@" -O0') -> Path:
    """A C++ compiler that does something first, and does not optimize, which takes a second instead of ten."""
    path.write_text(f"#!/bin/sh\n{before}\n{then}\n")
    path.chmod(0o755)
    return path


def loaded(dtype: torch.dtype, *usable: str) -> ctypes.CDLL | None:
    """The kernels of the first of these levels, all by default, as if nothing had been loaded before."""
    return native._loaded.__wrapped__(dtype, usable or levels.usable())


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings that were given before the test are given again."""
    monkeypatch.setattr(native, "_warned", set())


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process builds within the test, with a quick compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "quick-c++", f'echo "$*" >> {tmp_path / "log"}')))
    return tmp_path / "flowpp"


def path_of(library: ctypes.CDLL) -> Path:
    return Path(library._name)


def compilations(log: Path) -> int:
    return sum(" -c " in line for line in log.read_text().splitlines()) if log.exists() else 0


def plain_log_prob() -> list[list[float]]:
    """What `LOG_PROB` prints, in this process and by plain PyTorch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FlowPP("tiny").eval()
        model.fuse(False)
        images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        with torch.no_grad():
            model.initialize(images)
            noise = model.draw_noise(4)
            return [model.log_prob(images, noise=noise).tolist() for _ in range(2)]


def test_without_a_compiler_a_model_computes_by_pytorch_and_says_once_what_to_install(tmp_path: Path) -> None:
    code, output, errors = finish(start(["-c", LOG_PROB], tmp_path, PATH="", CXX=None))
    assert code == 0, errors
    torch.testing.assert_close(Tensor(json.loads(output)), Tensor(plain_log_prob()), rtol=1e-5, atol=1e-2)
    (warning,) = errors.splitlines()
    assert warning.startswith("WARNING models compute without CPU kernels, by plain PyTorch")
    assert "there is no C++ compiler" in warning
    assert warning.endswith("install g++")
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_a_compiler_may_be_named_with_arguments(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiler(tmp_path / "cache-c++", f'echo "$*" >> {tmp_path / "log"}', 'exec "$@" -O0')
    monkeypatch.setenv("CXX", f"'{first}' c++ -DASKED")
    assert path_of(native.load(torch.float32, "baseline")).parent == own_cache
    assert compilations(tmp_path / "log") == 1
    assert all(line.startswith("c++ -DASKED ") for line in (tmp_path / "log").read_text().splitlines())


def test_a_compiler_that_is_no_command_is_refused(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ 'half")
    with pytest.raises(NotBuilt, match="which is no command: No closing quotation"):
        native.load(torch.float32, "baseline")


@needs_compiler
def test_a_compiler_that_fails_is_quoted_and_models_do_without(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = 'case "$*" in *--version*) echo 1; exit 0;; esac'
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "failing-c++", answers, "echo bad day >&2; exit 3")))
    with caplog.at_level(logging.WARNING):
        for dtype in native.REALS:
            assert loaded(dtype) is None
    (record,) = caplog.records
    assert "models compute without CPU kernels, by plain PyTorch" in record.message
    assert "failing-c++" in record.message
    assert record.message.count("failed: bad day") == 1
    assert not list(own_cache.iterdir()), "nothing half built is left"


@needs_compiler
def test_two_processes_build_at_once_and_a_third_uses_what_they_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler waits until both have begun. The third calls it for its version only."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    wait = f"""echo "$*" >> {tmp_path / "log"}
case "$*" in *" -c "*)
    touch {meeting}/$$
    for i in $(seq 200); do [ $(ls {meeting} | wc -l) -ge 2 ] && break; sleep 0.1; done
esac"""
    cxx = str(compiler(tmp_path / "meeting-c++", wait))
    build = ["-c", "import torch, flowpp.native as native; print(native.kernels(torch.float32)._name)"]
    both = [finish(process) for process in [start(build, tmp_path, CXX=cxx) for _ in range(2)]]
    assert [code for code, _, _ in both] == [0, 0], both
    assert compilations(tmp_path / "log") == 2
    assert both[0][1] == both[1][1]
    assert [str(path) for path in (tmp_path / "flowpp").iterdir()] == [both[0][1].strip()]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", cxx)
    library = loaded(torch.float32)
    assert library is not None
    assert library._name == both[0][1].strip()
    assert compilations(tmp_path / "log") == 2


def test_the_command_that_builds_says_why_it_cannot(tmp_path: Path) -> None:
    code, output, errors = finish(start(["-m", "flowpp.native"], tmp_path, PATH="", CXX=None))
    assert (code, output) == (1, "")
    assert errors == "flowpp: there is no C++ compiler (c++, g++, clang++ or $CXX); install g++\n"


@needs_compiler
def test_sources_compiler_level_and_dtype_name_a_library(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = path_of(native.load(torch.float32, "baseline"))
    assert single.parent == own_cache
    assert path_of(native.load(torch.float32, "baseline")) == single
    assert compilations(tmp_path / "log") == 1

    changed = Path(shutil.copytree(native.SOURCES, tmp_path / "kernels"))
    monkeypatch.setattr(native, "SOURCES", changed)
    assert path_of(native.load(torch.float32, "baseline")) == single
    header = changed / "lanes.h"
    header.write_text(header.read_text() + "// another line\n")
    of_changed = path_of(native.load(torch.float32, "baseline"))
    monkeypatch.setattr(native, "SOURCES", ROOT / "flowpp" / "kernels")
    others = [path_of(native.load(torch.float32, level)) for level in levels_here() if level != "baseline"]
    double = path_of(native.load(torch.float64, "baseline"))
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "other-c++")))
    of_other = path_of(native.load(torch.float32, "baseline"))
    assert len({single, of_changed, *others, double, of_other}) == 4 + len(others)


@needs_compiler
def test_a_library_that_does_not_load_is_built_in_a_temporary_directory(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    native._built(native._compiler(), torch.float32, "baseline", native._directories()[0]).write_bytes(b"not a library")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            library = loaded(torch.float32, "baseline", "plain")
            assert library is not None
            assert path_of(library).parent == tmp_path / f"flowpp-{os.getuid()}"
    assert not caplog.records
    assert compilations(tmp_path / "log") == 2


@needs_compiler
def test_where_no_directory_serves_models_do_without(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for directory in native._directories():
        native._built(native._compiler(), torch.float32, "baseline", directory).write_bytes(b"not a library")
    with caplog.at_level(logging.WARNING):
        assert loaded(torch.float32, "baseline", "plain") is None
    assert "models compute without CPU kernels" in caplog.text
    assert "invalid ELF header" in caplog.text or "file too short" in caplog.text


MOUNTED = """
mkdir -p {cache}/flowpp && mount -t tmpfs -o {options} tmpfs {cache}/flowpp && exec {python} -c '
import torch
from flowpp import native
print(native.kernels(torch.float32)._name)'
"""


def may_mount() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


@needs_compiler
@pytest.mark.skipif(shutil.which("unshare") is None or not may_mount(), reason="only root can mount a file system")
@pytest.mark.parametrize("options", ["noexec", "ro", "size=64k"])
def test_a_cache_that_does_not_execute_or_is_read_only_or_full_gives_way_to_a_temporary_directory(
    options: str, tmp_path: Path
) -> None:
    cxx = compiler(tmp_path / "quick-c++")
    script = MOUNTED.format(cache=tmp_path / "cache", options=options, python=sys.executable)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": str(cxx), "TMPDIR": str(tmp_path)}
    environment |= {"PYTHONPATH": str(ROOT), levels.VARIABLE: "baseline"}
    command = ["unshare", "--mount", "sh", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == tmp_path / f"flowpp-{os.getuid()}"
    assert done.stderr == ""


def without(option: str) -> str:
    """Fails as an old compiler does if it gets an option that it does not know."""
    error = f"c++: error: unrecognized command-line option '{option}'"
    return f"""case " $* " in *" {option} "*) echo "{error}" >&2; exit 1;; esac"""


@needs_compiler
@pytest.mark.skipif("avx2" not in levels_here(), reason="kernels cannot be built at two levels here")
def test_a_compiler_that_lacks_a_levels_options_builds_the_next_lower_level(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "old-c++", without("-mavx2"))))
    assert native.cannot_build("baseline") is None
    reason = native.cannot_build("avx2")
    assert reason is not None
    assert "unrecognized command-line option '-mavx2'" in reason
    with caplog.at_level(logging.WARNING):
        for dtype in native.REALS:
            library = loaded(dtype, "avx2", "baseline", "plain")
            assert library is not None
            assert native.level_of(library) == "baseline"
    (record,) = caplog.records
    assert record.message.startswith("models compute with the baseline kernels, not the avx2 ones: ")
    assert "unrecognized command-line option '-mavx2'" in record.message


@needs_compiler
@pytest.mark.skipif("avx2" not in levels.levels(), reason="these are options of x86-64")
@pytest.mark.parametrize("level", levels_here())
def test_options_of_cxx_do_not_raise_the_level(
    level: str, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library of the cache must run on every processor that supports its level."""
    quick = compiler(tmp_path / "quick-c++")
    monkeypatch.setenv("CXX", f"{quick} -march=native -mtune=native")
    assert native.level_of(native.load(torch.float32, level)) == level
    monkeypatch.setenv("CXX", f"{quick} -mavx512f")
    if level in ("baseline", "avx2"):
        with pytest.raises(NotBuilt, match=r"-mavx512f builds kernels for avx512; CXX must not choose the processor"):
            native.load(torch.float32, level)


ALLOWED = {
    "baseline": r"%xmm|%st|%mm",
    "avx2": r"%[xy]mm(?:[0-9]|1[0-5])\b",
    "avx512": r"%[xyz]mm|%k[0-7]",
    "amx": r"%[xyz]mm|%k[0-7]|%tmm",
}
"""Vector, mask and tile registers that the instructions of a level use."""


@needs_compiler
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
@pytest.mark.skipif("avx2" not in levels.levels(), reason="these are registers of x86-64")
@pytest.mark.parametrize("level", levels.levels())
@pytest.mark.parametrize("dtype", native.REALS, ids=str)
def test_a_library_uses_the_registers_of_its_level_and_no_others(
    dtype: torch.dtype, level: str, tmp_path: Path
) -> None:
    """Compiled with all optimizations, the levels that this processor lacks as well: they are not run."""
    if reason := native.cannot_build(level):
        pytest.skip(reason)
    if level in levels_here():
        path = path_of(native.load(dtype, level))
    else:
        path = native._built(native._compiler(), dtype, level, tmp_path)
    code = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r"%(?:[xyz]?mm\d+|tmm\d|k[0-7]|st)\b", code))
    assert found
    assert {each for each in found if not re.fullmatch(f"(?:{ALLOWED[level]}).*", each)} == set()
    widest = {"baseline": "%xmm", "avx2": "%ymm", "avx512": "%zmm", "amx": "%zmm"}[level]
    assert any(each.startswith(widest) for each in found)
    assert any(each.startswith("%tmm") for each in found) == (level == "amx")
    assert native.level_of(ctypes.CDLL(str(path))) == level


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory; the user's cache cannot be made, since a file lies in its place."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


@needs_compiler
def test_a_cache_that_cannot_be_written_gives_way_to_a_temporary_directory(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "quick-c++")))
    library = path_of(native.load(torch.float32, "baseline"))
    assert library.parent == temporary / f"flowpp-{os.getuid()}"
    assert library.parent.stat().st_mode & 0o777 == 0o700


@needs_compiler
def test_a_user_without_a_home_builds_in_the_temporary_directory(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs under a number which no /etc/passwd knows."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "quick-c++")))
    assert path_of(native.load(torch.float32, "baseline")).parent == temporary / f"flowpp-{os.getuid()}"


@needs_compiler
def test_where_nothing_can_be_written_the_message_names_the_variable(temporary: Path) -> None:
    (temporary / f"flowpp-{os.getuid()}").touch()
    with pytest.raises(NotBuilt, match="can be written to; set XDG_CACHE_HOME"):
        native.load(torch.float32, "baseline")


@needs_compiler
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_temporary_directory_that_another_user_made_is_not_used(temporary: Path) -> None:
    """Whoever owns it could put a library of theirs there."""
    theirs = temporary / f"flowpp-{os.getuid()}"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    with pytest.raises(NotBuilt, match="can be written to"):
        native.load(torch.float32, "baseline")


def test_other_dtypes_have_no_kernels() -> None:
    assert native.kernels(torch.bfloat16) is None
    assert native.kernels(torch.float16) is None


@pytest.mark.parametrize("compiles", [True, False])
def test_a_run_without_compile_is_computed_by_plain_pytorch(compiles: bool) -> None:
    recipe = resolve_training("tiny", {} if compiles else {"compile": False})
    learner = Learner(resolve_model("tiny", {}, (3, 8, 8)), recipe, Processes(0, 1, torch.device("cpu")))
    for model in (learner.model, learner.ema):
        found = {module.fused for module in model.modules() if isinstance(module, Fusing)}
        assert found == {compiles}


@needs_compiler
def test_two_lanes_that_need_the_kernels_first_build_them_once(own_cache: Path, tmp_path: Path) -> None:
    native._loaded.cache_clear()
    torch.set_num_threads(2)
    try:
        found = side_by_side(lambda part: native.kernels(torch.float32), 4, torch.device("cpu"))
    finally:
        torch.set_num_threads(1)
        native._loaded.cache_clear()
    assert None not in found
    assert len({library._name for library in found if library}) == 1
    assert compilations(tmp_path / "log") == 1
