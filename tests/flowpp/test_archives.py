"""Folders and archives: their files come out as streams, hostile ones are refused before they cost anything."""

import gzip
import io
import os
import struct
import subprocess
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from flowpp.archives import members
from flowpp.images import DEFAULT_LIMITS, BadImages, Limits
from tests.cost import cost

CONTENT = {"a.png": b"first", "b/c.png": b"second", "b/long" + 150 * "x" + ".png": b"third", "größe.png": b"4"}
RANDOM = np.random.RandomState(0)


def contents(source: Path, limits: Limits = DEFAULT_LIMITS) -> dict[str, bytes]:
    return {member.name: member.read(2**20) for member in members(source, limits)}


def refused(source: Path, limits: Limits = DEFAULT_LIMITS) -> BadImages:
    with pytest.raises(BadImages) as caught:
        contents(source, limits)
    return caught.value


def write_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(
    path: Path, files: dict[str, bytes], tar_format: int = tarfile.PAX_FORMAT, mode: Literal["w", "w:gz"] = "w"
) -> Path:
    with tarfile.open(path, mode=mode, format=tar_format) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def write_tar_entry(path: Path, **fields: object) -> Path:
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("a.png")
        for field, value in fields.items():
            setattr(entry, field, value)
        archive.addfile(entry)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


WRITERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "folder": write_folder,
    "zip": write_zip,
    "stored zip": lambda path, files: write_zip(path, files, zipfile.ZIP_STORED),
    "tar pax": write_tar,
    "tar gnu": lambda path, files: write_tar(path, files, tarfile.GNU_FORMAT),
    "tar.gz": lambda path, files: write_tar(path, files, mode="w:gz"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_files_come_out_as_they_went_in(tmp_path: Path, kind: str) -> None:
    assert contents(WRITERS[kind](tmp_path / "source", CONTENT)) == CONTENT


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_folders_and_zip_files_come_sorted_by_name(tmp_path: Path, kind: str) -> None:
    source = WRITERS[kind](tmp_path / "source", dict.fromkeys(("b", "c/a", "a", "B", "10", "9"), b""))
    assert list(contents(source)) == ["10", "9", "B", "a", "b", "c/a"]


@pytest.mark.parametrize("flags", ["--format=gnu", "--format=pax", "--format=ustar", "--format=v7"])
def test_archives_of_the_tar_command_are_read(tmp_path: Path, flags: str) -> None:
    files = {"a.png": bytes(5000), "b/c.png": b"second"}
    write_folder(tmp_path / "folder", files)
    source = tmp_path / "a.tar.gz"
    subprocess.run(["tar", "czf", source, flags, "-C", tmp_path / "folder", "."], check=True)
    if flags.endswith("v7"):  # has no magic
        assert refused(source).code == "unsupported_archive"
    else:
        assert contents(source) == files


@pytest.mark.parametrize("kind", WRITERS)
def test_what_macos_and_windows_leave_behind_is_passed_over(tmp_path: Path, kind: str) -> None:
    junk = dict.fromkeys(("__MACOSX/._a.png", ".DS_Store", "b/._c.png", "Thumbs.db", ".git/x", "desktop.ini"), b"junk")
    assert contents(WRITERS[kind](tmp_path / "source", {**junk, "a.png": b"first"})) == {"a.png": b"first"}


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "folder"])
@pytest.mark.parametrize("name", ["../a.png", "b/../../a.png", "/etc/a.png", "..\\a.png", "C:\\a.png", "\\a.png"])
def test_names_that_lead_out_of_the_archive_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    error = refused(WRITERS[kind](tmp_path / "source", {"0.png": b"", name: b""}))
    assert error.code == "unsafe_archive"
    assert error.name == name


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, b"?"],
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    error = refused(write_tar_entry(tmp_path / "a.tar", type=kind, linkname="/etc/passwd"))
    assert (error.code, error.name) == ("unsafe_archive", "a.png")


def test_sparse_files_in_a_tar_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "hole.png").open("wb") as file:
        file.seek(2**30)
        file.write(b"end")
    for tar_format in ("gnu", "pax"):
        arguments = ["tar", "cSf", "a.tar", f"--format={tar_format}", "hole.png"]
        subprocess.run(arguments, check=True, cwd=tmp_path)
        assert refused(tmp_path / "a.tar").code == "unsafe_archive"


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        entry = zipfile.ZipInfo("a.png")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    error = refused(tmp_path / "a.zip")
    assert (error.code, error.name) == ("unsafe_archive", "a.png")


def test_encrypted_zip_files_are_refused(tmp_path: Path) -> None:
    data = bytearray(write_zip(tmp_path / "a.zip", {"a.png": b"secret"}).read_bytes())
    data[data.index(b"PK\3\4") + 6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    error = refused(tmp_path / "a.zip")
    assert error.code == "unsafe_archive"
    assert "encrypted" in str(error)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_compressions_that_cannot_be_read_piecewise_are_refused(tmp_path: Path, compression: int) -> None:
    assert refused(write_zip(tmp_path / "a.zip", CONTENT, compression)).code == "unsupported_archive"


def test_links_to_folders_are_refused_and_links_to_files_are_read(tmp_path: Path) -> None:
    write_folder(tmp_path, {"elsewhere/a.png": b"first", "source/b.png": b"second"})
    (tmp_path / "source/a.png").symlink_to(tmp_path / "elsewhere/a.png")
    assert contents(tmp_path / "source") == {"a.png": b"first", "b.png": b"second"}
    (tmp_path / "source/c").symlink_to(tmp_path / "elsewhere")
    assert refused(tmp_path / "source").code == "unsafe_folder"


def test_a_pipe_in_a_folder_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert refused(tmp_path).code == "not_an_image"


def test_an_archive_in_an_archive_is_refused(tmp_path: Path) -> None:
    inner = [write_zip(tmp_path / "a.zip", CONTENT), write_tar(tmp_path / "a.tar", CONTENT)]
    inner.append(write_tar(tmp_path / "a.tar.gz", CONTENT, mode="w:gz"))
    for path in inner:
        for write in (write_zip, write_tar):
            error = refused(write(tmp_path / "outer", {"x.png": path.read_bytes()}))
            assert (error.code, error.name) == ("nested_archive", "x.png")


def write_directory_of(path: Path, entries: int, *, claimed: int) -> Path:
    """A zip of so many empty entries of the same name that all share one local header, which claims another number."""
    local = b"PK\3\4" + struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0, 0, 0, 0, 5, 0) + b"a.png"
    central = b"PK\1\2" + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0) + b"a.png"
    size = entries * len(central)
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, claimed, claimed, size, len(local), 0)
    path.write_bytes(local + entries * central + end)
    return path


def refused_cheaply(source: Path, limits: Limits = DEFAULT_LIMITS, *, most: float, memory: int) -> BadImages:
    """The refusal, which may cost `most` units of `tests.cost` and take `memory` bytes."""
    tracemalloc.start()
    try:
        error = refused(source, limits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < memory
    assert cost(lambda: refused(source, limits)) < most
    return error


@pytest.mark.parametrize("claimed", [0xFFFF, 1])
def test_a_zip_of_a_million_entries_is_refused_at_once(tmp_path: Path, claimed: int) -> None:
    source = write_directory_of(tmp_path / "a.zip", 1_000_000, claimed=claimed)
    error = refused_cheaply(source, most=5, memory=2 * source.stat().st_size)
    assert error.code == "too_many_entries"


def test_the_limit_on_zip_entries_is_exact(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "a.zip", {str(i): b"" for i in range(100)})
    assert len(contents(source, Limits(max_entries=100))) == 100
    assert refused(source, Limits(max_entries=99)).code == "too_many_entries"


def test_a_zip_has_a_limit_of_its_own_which_the_refusal_names(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "a.zip", {str(i): b"" for i in range(100)})
    limits = Limits(max_zip_entries=99)
    assert "has 100 entries, more than the 99 that are accepted of a zip; send a tar" in str(refused(source, limits))
    assert len(contents(write_tar(tmp_path / "a.tar", {str(i): b"" for i in range(100)}), limits)) == 100
    with zipfile.ZipFile(source, "a") as archive:
        archive.comment = b"PK" + 60_000 * b"."
    assert "has 100 entries" in str(refused(source, limits))
    assert len(contents(source, Limits(max_zip_entries=100))) == 100


def test_the_count_of_a_zip64_is_read_before_its_directory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for index in range(70_000):  # more than 16 bits hold
            archive.writestr(str(index), b"")
    size = (tmp_path / "a.zip").stat().st_size
    error = refused_cheaply(tmp_path / "a.zip", Limits(max_zip_entries=69_999), most=1, memory=2**19)
    assert size > 2**22
    assert "has 70,000 entries" in str(error)


@pytest.mark.parametrize("length", [0, 10, 21])
def test_a_zip_that_ends_within_its_end_is_damaged(tmp_path: Path, length: int) -> None:
    data = write_zip(tmp_path / "a.zip", CONTENT).read_bytes()
    (tmp_path / "a.zip").write_bytes(data[: data.rfind(b"PK\5\6") + length])
    assert refused(tmp_path / "a.zip").code == "damaged_archive"


def test_a_zip_with_a_huge_directory_is_refused_unread(tmp_path: Path) -> None:
    size = 0xFFFFFFF0
    with (tmp_path / "a.zip").open("wb") as file:
        file.write(b"PK\3\4")
        file.seek(size)
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, size, 0, 0))
    assert refused_cheaply(tmp_path / "a.zip", most=5, memory=2**24).code == "too_many_entries"


def test_a_tar_of_too_many_entries_is_refused_in_little_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a").tobuf()
    with gzip.open(tmp_path / "a.tar.gz", "wb", compresslevel=1) as file:
        for _ in range(11):
            file.write(1000 * header)
    limits = Limits(max_entries=10_000)
    error = refused_cheaply(tmp_path / "a.tar.gz", limits, most=20, memory=2**24)
    assert error.code == "too_many_entries"


def test_too_many_files_in_a_folder_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {str(i): b"" for i in range(10)})
    assert refused(tmp_path, Limits(max_images=9)).code == "too_many_files"


def bomb(path: Path, name: str = "a.npy") -> Path:
    """A zip whose entry has 256 MiB of zeros."""
    compressor = zlib.compressobj(1, wbits=-15)
    data = b"".join(compressor.compress(bytes(2**20)) for _ in range(2**8)) + compressor.flush()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, data)
    raw = bytearray(path.read_bytes())
    for signature, method, size in ((b"PK\3\4", 8, 22), (b"PK\1\2", 10, 24)):
        at = raw.index(signature)
        raw[at + method] = 8
        raw[at + size : at + size + 4] = struct.pack("<I", 2**28)
    path.write_bytes(raw)
    return path


def drain(source: Path, limits: Limits = DEFAULT_LIMITS) -> None:
    """Reads all that comes out, in pieces."""
    for member in members(source, limits):
        while member.stream.read(2**16):
            pass


def refused_in_full(source: Path) -> None:
    with pytest.raises(BadImages):
        drain(source)


def test_a_decompression_bomb_is_stopped_early(tmp_path: Path) -> None:
    zipped = bomb(tmp_path / "a.zip")
    with gzip.open(tmp_path / "a.tar.gz", "wb", compresslevel=1) as file:
        entry = tarfile.TarInfo("a.npy")
        entry.size = 2**28
        file.write(entry.tobuf())
        for _ in range(2**4):
            file.write(bytes(2**24))
    for source in (zipped, tmp_path / "a.tar.gz"):
        with pytest.raises(BadImages) as caught:
            drain(source)
        assert caught.value.code == "decompression_bomb"
        assert cost(lambda source=source: refused_in_full(source)) < 5


def test_overlapping_zip_entries_count_each_time(tmp_path: Path) -> None:
    source = bomb(tmp_path / "a.zip")
    raw = source.read_bytes()
    directory, end = raw.index(b"PK\1\2"), raw.index(b"PK\5\6")
    size = 20 * (end - directory)
    tail = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 20, 20, size, directory, 0)
    source.write_bytes(raw[:directory] + 20 * raw[directory:end] + tail)
    limits = Limits(max_uncompressed_bytes=2**25)
    with pytest.raises(BadImages) as caught:
        drain(source, limits)
    assert caught.value.code == "too_large"


def test_huge_tar_headers_are_refused_unread(tmp_path: Path) -> None:
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        source = write_tar_entry(tmp_path / "a.tar", type=kind, size=0)
        data = bytearray(source.read_bytes())
        data[124:136] = b"77777777777\0"
        data[148:156] = b" " * 8
        data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
        with gzip.open(tmp_path / "a.tar.gz", "wb", compresslevel=1) as file:
            file.write(data[:512] + bytes(2**26))
        assert refused_cheaply(tmp_path / "a.tar.gz", most=5, memory=2**22).code == "damaged_archive"


def test_a_source_of_too_many_bytes_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", CONTENT)
    archive = write_zip(tmp_path / "a.zip", CONTENT)
    for source in (folder, archive):
        assert refused(source, Limits(max_bytes=10)).code == "too_large"


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "folder"])
def test_an_archive_cut_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    files = {name: RANDOM.bytes(300) for name in CONTENT}
    source = WRITERS[kind](tmp_path / "source", files)
    data = source.read_bytes().rstrip(b"\0") if kind.startswith("tar ") else source.read_bytes()
    (tmp_path / "cut").write_bytes(data)
    for length in range(1000, len(data) - 1, 29):
        (tmp_path / "cut").write_bytes(data[:length])
        assert refused(tmp_path / "cut").code == "damaged_archive", length


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "folder"])
def test_of_a_damaged_archive_nothing_comes_out_but_files_or_bad_images(tmp_path: Path, kind: str) -> None:
    data = WRITERS[kind](tmp_path / "source", CONTENT).read_bytes()
    random = np.random.RandomState(1)
    outcomes: set[int | str] = set()
    for _ in range(400):
        mutated = bytearray(data)
        for _ in range(random.randint(1, 4)):
            mutated[random.randint(len(mutated))] = random.randint(256)
        (tmp_path / "source").write_bytes(mutated)
        try:
            outcomes.add(len(contents(tmp_path / "source")))
        except BadImages as error:
            outcomes.add(error.code)
    assert "damaged_archive" in outcomes


def test_an_entry_that_fails_its_checksum_is_named(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "a.zip", {"a.png": b"0123456789", "b.png": b"abcdefghij"}, zipfile.ZIP_STORED)
    source.write_bytes(source.read_bytes().replace(b"abcdefghij", b"abcdefghiJ"))
    error = refused(source)
    assert (error.code, error.name) == ("damaged_archive", "b.png")


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_an_entry_without_a_name_is_refused(tmp_path: Path, write: Callable) -> None:
    source = write(tmp_path / "a", {"NAMELESS": b"data"} if write is write_zip else {"": b"data"})
    source.write_bytes(source.read_bytes().replace(b"NAMELESS", bytes(8)))  # which zipfile would not write
    assert refused(source).code == "damaged_archive"


def test_images_after_the_end_marker_of_a_tar_are_not_lost_silently(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a.tar", CONTENT).read_bytes()
    (tmp_path / "a.tar").write_bytes(data + data)
    assert refused(tmp_path / "a.tar").code == "damaged_archive"


def test_a_gzip_file_that_holds_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"hello"))
    assert refused(tmp_path / "a.gz").code == "unsupported_archive"


def test_what_does_not_exist_is_said(tmp_path: Path) -> None:
    assert refused(tmp_path / "nothing").code == "no_such_file"
