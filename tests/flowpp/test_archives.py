"""Folders and archives: their files come out as streams, hostile ones are refused before they cost anything."""

import bz2
import gzip
import io
import lzma
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
from flowpp.images import DEFAULT_LIMITS, BadImages, Limits, displayed
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


def zip_entry(name: str, *, system: int = 0, attributes: int = 0x20) -> zipfile.ZipInfo:
    """An entry as another system writes it."""
    entry = zipfile.ZipInfo("x")
    entry.filename, entry.create_system, entry.external_attr = name, system, attributes
    return entry


def zip_of_names(path: Path, *names: bytes, flags: int = 0, extra: bytes = b"") -> Path:
    """A zip of stored entries of these names as bytes, their numbers as content; zipfile can write no such names."""
    content, central = b"", b""
    for index, name in enumerate(names):
        data = str(index).encode()
        common = struct.pack("<HHHHIIIHH", flags, 0, 0, 0, zlib.crc32(data), 1, 1, len(name), len(extra))
        central += b"PK\1\2" + struct.pack("<HH", 20, 20) + common
        central += struct.pack("<HHHII", 0, 0, 0, 0x20, len(content)) + name + extra
        content += b"PK\3\4" + struct.pack("<H", 20) + common + name + extra + data
    end = struct.pack("<HHHHIIH", 0, 0, len(names), len(names), len(central), len(content), 0)
    path.write_bytes(content + central + b"PK\5\6" + end)
    return path


@pytest.mark.parametrize(
    "folder",
    [
        zip_entry("train\\", attributes=0x10),
        zip_entry("train", attributes=0x10),
        zip_entry("train\\", attributes=0),
        zip_entry("a\\train\\", attributes=0x20),
        zip_entry("train/", attributes=0),
        zip_entry("train", system=3, attributes=0o040755 << 16),
        zip_entry("train/", system=3, attributes=0o040755 << 16 | 0x10),
    ],
)
def test_folders_of_a_zip_are_no_files_however_they_are_marked(tmp_path: Path, folder: zipfile.ZipInfo) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(folder, b"")
        archive.writestr(zip_entry("train\\a.png"), b"first")
        archive.writestr(zip_entry("train/sub\\b.png", attributes=0x10), b"second")  # a file, because it has content
    assert contents(tmp_path / "a.zip") == {"train/a.png": b"first", "train/sub/b.png": b"second"}


def test_names_in_a_zip_are_read_by_their_mark_or_by_what_they_can_be(tmp_path: Path) -> None:
    """Names without a mark are UTF-8 from macOS and code page 437 from Windows; other encodings lose nothing."""
    for names, encoding in (
        (["größe.png", "画像.png", "plain.png"], "utf-8"),
        (["größe.png", "é.png", "plain.png"], "cp437"),
    ):
        source = zip_of_names(tmp_path / "a.zip", *(name.encode(encoding) for name in names))
        assert set(contents(source)) == set(names)
    for encoding in ("cp932", "gbk", "cp1252", "koi8-r"):
        text = {"cp932": "画像", "gbk": "图片", "cp1252": "éü", "koi8-r": "фото"}[encoding]
        names = [f"{text}{index}.png".encode(encoding) for index in range(3)]
        assert sorted(contents(zip_of_names(tmp_path / "a.zip", *names)).values()) == [b"0", b"1", b"2"]


def test_a_zip_whose_names_are_wrongly_marked_as_utf8_is_read(tmp_path: Path) -> None:
    names = [b"caf\xe9.png", "größe.png".encode(), b"\xff\xfe.png"]
    found = contents(zip_of_names(tmp_path / "a.zip", *names, flags=0x800))
    assert sorted(found.values()) == [b"0", b"1", b"2"]
    assert "größe.png" in found


def test_the_unicode_path_of_info_zip_is_the_name_if_it_is_of_this_name(tmp_path: Path) -> None:
    content = struct.pack("<BI", 1, zlib.crc32(b"???.png")) + "画像.png".encode()
    extra = struct.pack("<HHH", 0xCAFE, 2, 0) + struct.pack("<HH", 0x7075, len(content)) + content
    source = zip_of_names(tmp_path / "a.zip", b"???.png", b"renamed.png", extra=extra)
    assert contents(source) == {"画像.png": b"0", "renamed.png": b"1"}


LIKE_NAMES = [
    "e\u0301.png",
    "\u00e9.png",
    "E\u0301.png",
    "a.png",
    "A.png",
    "a.png ",
    "a.png.",
    "a\nb.png",
    "a\u202egnp.png",
    "a b.png",
    "a%20b.png",
    "CON.png",
    "x:y/z.png",
]


@pytest.mark.parametrize("kind", WRITERS)
def test_names_that_look_alike_stay_different(tmp_path: Path, kind: str) -> None:
    files = {name: str(index).encode() for index, name in enumerate(LIKE_NAMES)}
    assert contents(WRITERS[kind](tmp_path / "source", files)) == files
    assert len({displayed(name) for name in files}) == len(files)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_in_a_tar_are_bytes_of_any_encoding(tmp_path: Path, tar_format: int) -> None:
    """A backslash is a character of a name, and none comes of an escape."""
    raw = [
        b"caf\xe9.png",
        b"caf\\xe9.png",
        b"caf/xe9.png",
        "图片.png".encode("gbk"),
        "größe.png".encode(),
        b"a\xff" * 60,
    ]
    with tarfile.open(
        tmp_path / "a.tar", "w", format=tar_format, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for index, name in enumerate(raw[: 5 if tar_format == tarfile.USTAR_FORMAT else 6]):
            entry = tarfile.TarInfo(os.fsdecode(name))
            entry.size = 1
            archive.addfile(entry, io.BytesIO(str(index).encode()))
    found = contents(tmp_path / "a.tar")
    assert [os.fsencode(name) for name in found] == raw[: len(found)]
    assert len(found) >= 5
    assert len({displayed(name) for name in found}) == len(found)
    assert all(displayed(name).encode() for name in found)


def test_names_in_a_folder_are_bytes_of_any_encoding(tmp_path: Path) -> None:
    raw = [b"caf\xe9.png", b"caf\\xe9.png", b"caf\\udce9.png", "图片.png".encode("gbk"), "图片.png".encode()]
    for name in raw:
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    found = contents(tmp_path)
    assert {os.fsencode(name): content for name, content in found.items()} == {name: name for name in raw}
    assert len({displayed(name) for name in found}) == len(raw)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_two_entries_of_one_name_are_two_files(tmp_path: Path, kind: str) -> None:
    if kind == "zip":
        source = zip_of_names(tmp_path / "a.zip", b"a.png", b"b.png", b"a.png")
    else:
        source = tmp_path / "a.tar"
        with tarfile.open(source, "w") as archive:
            for index, name in enumerate(("a.png", "b.png", "a.png")):
                entry = tarfile.TarInfo(name)
                entry.size = 1
                archive.addfile(entry, io.BytesIO(str(index).encode()))
    assert sorted(member.read(9) for member in members(source, DEFAULT_LIMITS)) == [b"0", b"1", b"2"]


def test_a_name_with_a_nul_keeps_what_is_behind_it(tmp_path: Path) -> None:
    found = contents(zip_of_names(tmp_path / "a.zip", b"a\0b.png", b"a\0c.png"))
    assert found == {"a\0b.png": b"0", "a\0c.png": b"1"}


OTHER_ARCHIVES: dict[str, tuple[bytes, str]] = {
    "images.tar.xz": (lzma.compress(bytes(2000)), "xz"),
    "images.tar.lzma": (lzma.compress(bytes(2000), lzma.FORMAT_ALONE), "lzma"),
    "images.tar.bz2": (bz2.compress(bytes(2000)), "bzip2"),
    "empty.bz2": (bz2.compress(b""), "bzip2"),
    "images.tar.zst": (b"\x28\xb5\x2f\xfd\x04\0", "Zstandard"),
    "images.7z": (b"7z\xbc\xaf\x27\x1c\0\4", "7z"),
    "images.rar": (b"Rar!\x1a\x07\x01\0", "rar"),
    "images.tar.Z": (b"\x1f\x9d\x90", "compress"),
    "images.tar.lz4": (b"\x04\x22\x4d\x18", "LZ4"),
    "images.z01": (b"PK\x07\x08PK\3\4", "part of a zip"),
    "images.cab": (b"MSCF\0\0\0\0", "cab"),
}


@pytest.mark.parametrize("name", OTHER_ARCHIVES)
def test_archives_of_other_kinds_are_named(tmp_path: Path, name: str) -> None:
    data, kind = OTHER_ARCHIVES[name]
    (tmp_path / "a.zip").write_bytes(data)  # the suffix means nothing
    error = refused(tmp_path / "a.zip")
    assert error.code == "unsupported_archive"
    assert kind in str(error)
    assert ".zip, .tar and .tar.gz" in str(error)
    nested = refused(write_zip(tmp_path / "outer.zip", {name: data}))
    assert (nested.code, nested.name) == ("nested_archive", name)
    assert refused(write_folder(tmp_path / "folder", {name: data})).code == "nested_archive"


def test_gzip_of_a_single_file_is_named(tmp_path: Path) -> None:
    for content, kind in ((b"\x89PNG\r\n\x1a\n", "PNG"), (b"hello", "no tar archive"), (b"%PDF-1.7", "a PDF document")):
        (tmp_path / "a.png.gz").write_bytes(gzip.compress(content))
        error = refused(tmp_path / "a.png.gz")
        assert error.code == "unsupported_archive"
        assert f"is gzip of a file that is {kind}; send the file itself" in str(error)


def test_compressions_of_a_zip_are_named(tmp_path: Path) -> None:
    data = bytearray(write_zip(tmp_path / "a.zip", {"a.png": b"first"}).read_bytes())
    for method, name in ((9, "deflate64"), (93, "zstd"), (77, "method 77"), (14, "lzma")):
        data[data.index(b"PK\3\4") + 8] = data[data.index(b"PK\1\2") + 10] = method
        (tmp_path / "a.zip").write_bytes(data)
        error = refused(tmp_path / "a.zip")
        assert error.code == "unsupported_archive"
        assert f"is compressed by {name}" in str(error)


def test_a_zip_of_a_later_version_is_not_called_damaged(tmp_path: Path) -> None:
    data = bytearray(write_zip(tmp_path / "a.zip", {"a.png": b"first"}).read_bytes())
    data[data.index(b"PK\1\2") + 6] = 99
    (tmp_path / "a.zip").write_bytes(data)
    assert refused(tmp_path / "a.zip").code == "unsupported_archive"


@pytest.mark.parametrize("name", ["C:a.png", "c:/a.png", "\\\\server\\share\\a.png", "a\\..\\..\\b.png", "..", "a/.."])
def test_names_that_are_absolute_on_windows_are_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(zip_entry(name), b"data")
    assert refused(tmp_path / "a.zip").code == "unsafe_archive"


class Pipe(io.RawIOBase):
    """Takes bytes and cannot seek, so that zipfile writes sizes behind the content (data descriptors)."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:  # type: ignore[no-untyped-def]  # any buffer
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def test_a_zip_written_to_a_pipe_and_a_zip64_are_read(tmp_path: Path) -> None:
    with Pipe(tmp_path / "a.zip") as pipe, zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in CONTENT.items():
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(data)
    assert contents(tmp_path / "a.zip") == CONTENT


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
