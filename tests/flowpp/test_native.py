"""Building the kernels with a real compiler, once for all processes; and models where they cannot be built."""

import json
import logging
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowpp import native
from flowpp.fused import Fusing
from flowpp.lanes import side_by_side
from flowpp.learner import Learner
from flowpp.model import FlowPP
from flowpp.native import NotBuilt
from flowpp.presets import resolve_model, resolve_training
from flowpp.processes import Processes

ROOT = Path(__file__).parents[2]

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

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
    """Python with a cache of kernels of its own; a variable that is None is unset."""
    environment = {
        **os.environ,
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


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process builds within the test, with a quick compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "quick-c++", f'echo "$*" >> {tmp_path / "log"}')))
    return tmp_path / "flowpp"


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
    assert native.build(torch.float32).parent == own_cache
    assert compilations(tmp_path / "log") == 1
    assert all(line.startswith("c++ -DASKED ") for line in (tmp_path / "log").read_text().splitlines())


def test_a_compiler_that_is_no_command_is_refused(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ 'half")
    with pytest.raises(NotBuilt, match="which is no command: No closing quotation"):
        native.build(torch.float32)


@needs_compiler
def test_a_compiler_that_fails_is_quoted_and_models_do_without(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = 'case "$*" in *--version*) echo 1; exit 0;; esac'
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "failing-c++", answers, "echo bad day >&2; exit 3")))
    with caplog.at_level(logging.WARNING):
        assert native._loaded.__wrapped__(torch.float32) is None
    (record,) = caplog.records
    assert "models compute without CPU kernels, by plain PyTorch" in record.message
    assert "failing-c++" in record.message
    assert record.message.endswith("failed: bad day")
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
    build = ["-c", "import torch, flowpp.native as native; print(native.build(torch.float32))"]
    both = [finish(process) for process in [start(build, tmp_path, CXX=cxx) for _ in range(2)]]
    assert [code for code, _, _ in both] == [0, 0], both
    assert compilations(tmp_path / "log") == 2
    assert both[0][1] == both[1][1]
    assert [str(path) for path in (tmp_path / "flowpp").iterdir()] == [both[0][1].strip()]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", cxx)
    library = native._loaded.__wrapped__(torch.float32)
    assert library is not None
    assert library._name == both[0][1].strip()
    assert compilations(tmp_path / "log") == 2


def test_the_command_that_builds_says_why_it_cannot(tmp_path: Path) -> None:
    code, output, errors = finish(start(["-m", "flowpp.native"], tmp_path, PATH="", CXX=None))
    assert (code, output) == (1, "")
    assert errors == "flowpp: there is no C++ compiler (c++, g++, clang++ or $CXX); install g++\n"


@needs_compiler
def test_sources_and_compiler_name_a_library(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single = native.build(torch.float32)
    assert single.parent == own_cache
    assert native.build(torch.float32) == single
    assert compilations(tmp_path / "log") == 1

    changed = Path(shutil.copytree(native.SOURCES, tmp_path / "kernels"))
    monkeypatch.setattr(native, "SOURCES", changed)
    assert native.build(torch.float32) == single
    header = changed / "lanes.h"
    header.write_text(header.read_text() + "// another line\n")
    of_changed = native.build(torch.float32)
    assert of_changed != single
    monkeypatch.setattr(native, "SOURCES", ROOT / "flowpp" / "kernels")
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "other-c++")))
    assert native.build(torch.float32) not in (single, of_changed)


@needs_compiler
def test_a_library_that_does_not_load_is_done_without(own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    native.build(torch.float32).write_bytes(b"not a library")
    with caplog.at_level(logging.WARNING):
        assert native._loaded.__wrapped__(torch.float32) is None
    assert "models compute without CPU kernels" in caplog.text


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
    library = native.build(torch.float32)
    assert library.parent == temporary / f"flowpp-{os.getuid()}"
    assert library.parent.stat().st_mode & 0o777 == 0o700
    assert native._loaded.__wrapped__(torch.float32) is not None


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
    assert native.build(torch.float32).parent == temporary / f"flowpp-{os.getuid()}"


@needs_compiler
def test_where_nothing_can_be_written_the_message_names_the_variable(temporary: Path) -> None:
    (temporary / f"flowpp-{os.getuid()}").touch()
    with pytest.raises(NotBuilt, match="can be written to; set XDG_CACHE_HOME"):
        native.build(torch.float32)


@needs_compiler
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_temporary_directory_that_another_user_made_is_not_used(temporary: Path) -> None:
    """Whoever owns it could put a library of theirs there."""
    theirs = temporary / f"flowpp-{os.getuid()}"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    with pytest.raises(NotBuilt, match="can be written to"):
        native.build(torch.float32)


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
    assert compilations(tmp_path / "log") == 1
