"""Levels of the CPU kernels: what each needs of a processor, which one is used, and how one sets a lower one."""

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flowpp import levels, native
from flowpp.levels import UnsupportedLevel, at, lacking, supported, usable
from flowpp.model import FlowPP
from tests.levels import in_words, levels_here

ROOT = Path(__file__).parents[2]

AVX2 = "fpu sse4_2 avx f16c fma avx2 bmi1 bmi2"
AVX512 = f"{AVX2} avx512f avx512dq avx512cd avx512bw avx512vl"
PROCESSORS = {
    "x86-64-v2": ("fpu sse4_2 popcnt", ["baseline"]),
    "Haswell, Zen 2": (AVX2, ["baseline", "avx2"]),
    "a hypervisor that masks FMA": (AVX2.replace("fma ", ""), ["baseline"]),
    "Knights Landing": (f"{AVX2} avx512f avx512cd avx512er avx512pf", ["baseline", "avx2"]),
    "Skylake-X, Zen 4": (AVX512, ["baseline", "avx2", "avx512"]),
    "a hypervisor that masks AVX512BW": (AVX512.replace("avx512bw ", ""), ["baseline", "avx2"]),
    "AMX without bfloat16": (f"{AVX512} avx512_bf16 amx_tile amx_int8", ["baseline", "avx2", "avx512"]),
}
"""A processor's features, and the levels of kernels that it supports."""


@pytest.fixture
def fresh() -> Iterator[None]:
    """The machine and its environment are read again within the test, and afterwards."""
    caches = (levels.lacking, levels._up_to, levels.of_environment)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def x86(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(levels.VARIABLE, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(levels, "CPUINFO", tmp_path / "cpuinfo")
    return tmp_path / "cpuinfo"


@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_processor_supports_the_levels_whose_features_it_has(processor: str, cpuinfo: Path) -> None:
    features, expected = PROCESSORS[processor]
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: {processor}\nflags\t\t: {features}\nbugs\t\t: amx_bf16\n\n" * 2)
    assert supported() == ["plain", *expected]
    assert usable() == tuple(reversed(supported()))
    assert set(lacking()) == set(levels.levels()) - set(expected)


@pytest.mark.usefixtures("x86")
def test_matrix_tiles_need_linuxs_permission_as_well(cpuinfo: Path) -> None:
    cpuinfo.write_text(f"flags\t\t: {AVX512} avx512_bf16 amx_tile amx_bf16\n")
    assert ("amx" in supported()) == levels._tiles_permitted()
    if "amx" in lacking():
        assert lacking() == {"amx": "Linux does not permit this process to use the processor's matrix tiles"}


@pytest.mark.usefixtures("x86")
def test_without_cpuinfo_the_baseline_is_supported(cpuinfo: Path) -> None:
    assert supported() == ["plain", "baseline"]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("machine", ["aarch64", "arm64", "riscv64", ""])
def test_other_architectures_have_the_baseline(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(levels.VARIABLE, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert supported() == ["plain", "baseline"]
    with pytest.raises(
        UnsupportedLevel, match=r"'avx2', which is not a level of the CPU kernels\. This machine supports"
    ):
        at("avx2").__enter__()


@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize(
    ("value", "expected"), [("plain", ["plain"]), ("AVX2 ", ["avx2", "baseline", "plain"]), ("", None), (" ", None)]
)
def test_the_variable_sets_the_highest_level(
    value: str, expected: list[str] | None, cpuinfo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo.write_text(f"flags\t\t: {AVX512}\n")
    monkeypatch.setenv(levels.VARIABLE, value)
    assert usable() == tuple(expected or ["avx512", "avx2", "baseline", "plain"])


@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("avx512", "is 'avx512': the processor has no avx512f, avx512bw, avx512cd, avx512dq, avx512vl."),
        ("amx", "is 'amx': the processor has no avx512f, "),
        ("avx3", "is 'avx3', which is not a level of the CPU kernels."),
        ("avx2,avx512", "is 'avx2,avx512', which is not a level of the CPU kernels."),
        ("0", "is '0', which is not a level of the CPU kernels."),
    ],
)
def test_an_unsupported_level_is_refused_with_those_that_are_supported(
    value: str, why: str, cpuinfo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo.write_text(f"flags\t\t: {AVX2}\n")
    monkeypatch.setenv(levels.VARIABLE, value)
    for use in (usable, lambda: native.kernels(torch.float32)):
        with pytest.raises(UnsupportedLevel) as refused:
            use()
        assert str(refused.value).startswith(f"FLOWPP_KERNELS {why}")
        assert str(refused.value).endswith(". This machine supports plain, baseline, avx2")


def level_now() -> str:
    library = native.kernels(torch.float32)
    return "plain" if library is None else native.level_of(library)


def test_inside_a_block_every_thread_computes_at_its_level(level: str) -> None:
    assert level_now() == level
    with at("plain"):
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(level_now()))
        thread.start()
        thread.join()
        assert [level_now(), *found] == ["plain", "plain"]
        assert native.kernels(torch.float64) is None
    assert level_now() == level


def test_the_level_is_set_back_after_an_exception_and_a_refusal() -> None:
    before = usable()
    with pytest.raises(ZeroDivisionError), at("plain"):
        raise ZeroDivisionError
    with pytest.raises(UnsupportedLevel), at("plain"), at("no level"):
        pass
    assert usable() == before


def test_a_models_numbers_are_the_same_at_every_level_but_for_rounding(level: str) -> None:
    torch.manual_seed(0)
    model = FlowPP("tiny").double().eval()
    images = torch.randint(0, 256, (4, *model.config.image_shape), dtype=torch.uint8)
    found = []
    with torch.no_grad():
        model.initialize(images)
        noise = model.draw_noise(4).double()
        for each in (level, "plain"):
            with at(each):
                found.append(model.log_prob(images, noise=noise))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-9)


COMMANDS = (
    ("-m", "flowpp", "train", "run", "--data", "images"),
    ("-m", "flowpp.native"),
    ("-m", "worker", "training"),
    ("-c", "from api.cli import main; main()", "serve", "--data", "data", "--port", "0"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[1:3]))
def test_each_command_refuses_a_wrong_level_in_one_sentence(command: tuple[str, ...], tmp_path: Path) -> None:
    environment = {**os.environ, levels.VARIABLE: "fastest", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (1, 2)
    sentence = (
        "FLOWPP_KERNELS is 'fastest', which is not a level of the CPU kernels. This machine supports plain, baseline"
    )
    assert done.stderr.count("\n") == 1
    assert sentence in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_process_computes_at_the_level_of_its_environment(level: str) -> None:
    script = "import torch; from flowpp import native; print(native.level_of(native.kernels(torch.float32)))"
    environment = {**os.environ, levels.VARIABLE: level, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == f"{level}\n"


def test_make_test_prints_every_level_with_the_reasons_for_those_left_out() -> None:
    line = in_words()
    assert line.startswith("kernel levels: plain")
    assert all(name in line for name in levels.levels())
    assert {"plain", *levels_here()} <= {*usable()}
