"""CIFAR-10's official files: both versions come through to the pixel, and no pickle runs anything."""

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flowpp import cifar
from flowpp.data import BadImages, build_image_set
from tests.cost import cost

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(0, 256, (6, 4, 32, 32, 3), dtype=np.uint8)  # five training batches and the test batch
FILES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def rows(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), 3072)


def official_pickle(images: np.ndarray) -> bytes:
    """Opcode by opcode what Python 2 and its numpy wrote into the official archive."""
    data = rows(images).tobytes()
    return (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05(K\x06K\x09e"
        b"U\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09"
        b"(K\x01K" + bytes([len(images)]) + b"M\x00\x0c\x86cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + len(data).to_bytes(4, "little") + data + b"tbU\x09filenamesq\x0c]q\x0d(U\x05a.pngU\x05b.pngeu."
    )


def pickled(protocol: int) -> Callable[[np.ndarray], bytes]:
    return lambda images: pickle.dumps({b"data": rows(images), b"labels": [1, 2], b"batch_label": b"x"}, protocol)


PICKLES = {"official": official_pickle, **{f"protocol {p}": pickled(p) for p in range(6)}}


def binary(images: np.ndarray) -> bytes:
    return np.concatenate([np.full((len(images), 1), 7, np.uint8), rows(images)], axis=1).tobytes()


def write_folder(folder: Path, batch: Callable[[np.ndarray], bytes], suffix: str) -> Path:
    folder.mkdir(parents=True)
    for file, images in zip(FILES, IMAGES, strict=True):
        (folder / (file + suffix)).write_bytes(batch(images))
    (folder / "readme.html").write_text("<html>")
    (folder / ("batches.meta.txt" if suffix else "batches.meta")).write_bytes(b"airplane")
    return folder


def write_archive(folder: Path) -> Path:
    path = folder.with_suffix(".tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    return path


@pytest.mark.parametrize("batch", PICKLES.values(), ids=PICKLES.keys())
def test_a_pickled_batch_comes_through_to_the_pixel(batch: Callable[[np.ndarray], bytes]) -> None:
    np.testing.assert_array_equal(cifar.read_batch(batch(IMAGES[0]), "data_batch_1"), IMAGES[0])


def test_the_official_bytes_are_what_python_reads() -> None:
    assert pickle.loads(official_pickle(IMAGES[0]), encoding="bytes")[b"data"].shape == (4, 3072)


def test_a_column_major_pickled_array_comes_through_to_the_pixel() -> None:
    data = pickle.dumps({"data": np.asfortranarray(rows(IMAGES[0]))}, 4)
    np.testing.assert_array_equal(cifar.read_batch(data, "data_batch_1"), IMAGES[0])


@pytest.mark.parametrize(
    ("name", "batch", "suffix"),
    [("cifar-10-batches-py", official_pickle, ""), ("cifar-10-batches-bin", binary, ".bin")],
)
def test_the_official_archives_and_folders_give_the_official_split(
    tmp_path: Path, name: str, batch: Callable[[np.ndarray], bytes], suffix: str
) -> None:
    folder = write_folder(tmp_path / name, batch, suffix)
    for i, source in enumerate((folder, write_archive(folder))):
        image_set = build_image_set(source, tmp_path / f"set{i}", test_as_validation=True)
        assert image_set.shape == (3, 32, 32)
        np.testing.assert_array_equal(image_set.training, IMAGES[:5].reshape(-1, 32, 32, 3))
        np.testing.assert_array_equal(image_set.validation, IMAGES[5])
        image_set = build_image_set(source, tmp_path / f"three{i}")
        np.testing.assert_array_equal(image_set.test, IMAGES[5])
        assert (image_set.num_training, image_set.num_validation) == (18, 2)


class Call:
    """Pickles to a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def hostile_pickles(marker: Path) -> dict[str, bytes]:
    rest = {b"data": rows(IMAGES[0])}
    stack_global = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x07touch x\x85R."
    return {
        "system": pickle.dumps({**rest, b"x": Call(os.system, f"touch {marker}")}, 2),
        "eval": pickle.dumps(Call(eval, f"open({str(marker)!r}, 'w')"), 4),
        "getattr": pickle.dumps(Call(getattr, rest, "clear"), 2),
        "stack global": stack_global,
        "instance": b"(S'touch x'\nios\nsystem\n.",
        "object": b"(cos\nsystem\nS'touch x'\no.",
        "new object": b"\x80\x02cos\nsystem\n)\x81.",
        "load": pickle.dumps(Call(np.load, str(marker)), 2),
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__base__\x93.",
        "other codec": b"\x80\x02c_codecs\ndecode\n.",
        "memo bomb": b"\x80\x02]r\xff\xff\xff\xef.",
        "text memo bomb": b"]p4000000000\n.",
        "path in numpy": b"\x80\x02cnumpy.testing\nrun_module_suite\n.",
        **{f"system, protocol {p}": pickle.dumps(Call(os.system, f"touch {marker}"), p) for p in range(6)},
        **{f"eval, protocol {p}": pickle.dumps(Call(eval, f"open({str(marker)!r}, 'w')"), p) for p in range(6)},
        "exec": pickle.dumps(Call(exec, f"open({str(marker)!r}, 'w')"), 4),
        "import": pickle.dumps(Call(__import__, "antigravity"), 4),
        "numpy's f2py": b"\x80\x04\x8c\x14numpy.f2py.capi_maps\x8c\x04eval\x93\x8c\x011\x85R.",
        "a walk through numpy": b"\x80\x04\x8c\x05numpy\x8c\x1bndarray.__class__.__bases__\x93.",
        "a module by its attribute": b"\x80\x04\x8c\x05numpy\x8c\x02os\x93.",
        "an attribute of a stand-in": b"\x80\x04\x8c\x0cflowpp.cifar\x8c\x06_Array\x93.",
        "new object with names": b"\x80\x04cos\nsystem\n)}\x92.",
        "new object of what is admitted": b"\x80\x02cnumpy\nndarray\n)\x81.",
        "extension 1": b"\x80\x02\x82\x01.",
        "extension 2": b"\x80\x02\x83\x01\x00.",
        "extension 4": b"\x80\x02\x84\x01\x00\x00\x00.",
        "persistent id": b"Pevil\n.",
        "binary persistent id": b"\x80\x02U\x04evilQ.",
        "out-of-band buffer": b"\x80\x05\x97.",
        "array of objects": pickle.dumps({b"data": np.array([[Call(os.system, f"touch {marker}")]], object)}, 2),
        "reconstruct of a subclass": b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nmemmap\nK\x00\x85U\x01b\x87R.",
        "a million opcodes": b"\x80\x02" + b"(" * 1_000_000 + b".",
        "lists in lists": b"\x80\x02" + b"]" * 1_000_000 + b".",
        "a key without end": without_end() + b"}" + b"h\x00Ns.",
        "keys without end": without_end() + b"}(h\x00Nu.",
        "a dict of a key without end": without_end() + b"(h\x00Nd.",
        "a set": b"\x80\x04\x8f(K\x01\x90.",
    }


def without_end() -> bytes:
    """Tuples of two that are one, 60 deep: to hash or to show it takes 2^60 steps. It lies in memo 0."""
    return b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60


def array_of(shape: bytes, dtype: bytes) -> bytes:
    """A pickled batch whose array has this for its shape, and for what its dtype is called; both are opcodes."""
    return (
        b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"}U\x04datacnumpy\nndarray\n)R(K\x01" + shape
        + b"cnumpy\ndtype\n" + dtype + b"\x85R\x89U\x00tbs."
    )  # fmt: skip


def refused(data: bytes) -> BadImages:
    with pytest.raises(BadImages) as caught:
        cifar.read_batch(data, "data_batch_1")
    return caught.value


@pytest.mark.parametrize("kind", hostile_pickles(Path()))
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "marker"
    data = hostile_pickles(marker)[kind]
    assert refused(data).code == "unsafe_pickle"
    assert cost(lambda: refused(data)) < 5
    assert not marker.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02.",
        pickle.dumps([1, 2]),
        pickle.dumps({b"labels": [1]}),
        pickle.dumps({b"data": b"bytes"}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.float32)}),
        pickle.dumps({b"data": np.zeros((2, 3071), np.uint8)}),
        pickle.dumps({b"data": np.zeros((0, 3072), np.uint8)}),
        b"\x80\x05\x8a",
        official_pickle(IMAGES[0])[:-700],
        b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.",  # would allocate 2 GiB in numpy itself
        b"\x80\x02cnumpy\ndtype\n}b.",
        b"\x80\x02cnumpy\nndarray\nN}U\x05stateU\x01xs\x86b.",
        array_of(shape=b"h\x00", dtype=b"U\x02u1"),
        array_of(shape=b"K\x01M\x00\x0c\x86", dtype=b"h\x00"),
        array_of(shape=b"K\x02M\x00\x0c\x86", dtype=b"U\x02u1"),
        array_of(shape=b"J\xff\xff\xff\xffM\x00\x0c\x86", dtype=b"U\x02u1"),
        array_of(shape=b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7fM\x00\x0c\x86", dtype=b"U\x02u1"),
        array_of(shape=b"K\x01M\x00\x0c\x86", dtype=b"U\x01O"),
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\xff.",
        b"\x80\x02T\xff\xff\xff\x7f.",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"I" + b"9" * 1_000_000 + b"\n.",
        b"\x80\x02}U\x05state}b.",
        b"\x80\x02cnumpy.core.numeric\n_frombuffer\n(U\x01xcnumpy\ndtype\nU\x02u1\x85RK\x02M\x00\x0c\x86U\x01CtR"
        b"q\x00}U\x04datah\x00s.",
        b"\x80\x02" + b"(" * 90_000 + b"t" * 90_000 + b".",
    ],
)
def test_what_is_no_batch_is_refused(data: bytes) -> None:
    error = refused(data)
    assert error.code == "damaged_batch"
    assert len(str(error)) < 500
    assert cost(lambda: refused(data)) < 5
    np.testing.assert_array_equal(cifar.read_batch(official_pickle(IMAGES[0]), "data_batch_1"), IMAGES[0])


@pytest.mark.parametrize("data", [b"", binary(IMAGES[0])[:-1]])
def test_a_binary_batch_of_a_wrong_length_is_refused(data: bytes) -> None:
    with pytest.raises(BadImages, match="multiple of 3,073"):
        cifar.read_batch(data, "data_batch_1.bin")


def test_of_a_damaged_pickle_nothing_comes_out_but_images_or_bad_images() -> None:
    data = official_pickle(IMAGES[0][:1])
    head = data.index(b"T\x00\x0c") + 5
    random = np.random.RandomState(1)
    codes = set()
    for _ in range(3000):
        mutated = bytearray(data)
        for _ in range(random.randint(1, 5)):
            mutated[random.randint(head)] = random.randint(256)
        try:
            assert cifar.read_batch(bytes(mutated), "data_batch_1").shape[1:] == (32, 32, 3)
        except BadImages as error:
            codes.add(error.code)
    assert codes == {"unsafe_pickle", "damaged_batch"}


def test_an_archive_with_a_hostile_batch_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "cifar-10-python.tar.gz"
    data = hostile_pickles(tmp_path / "marker")["system"]
    with tarfile.open(source, "w:gz") as archive:
        entry = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    with pytest.raises(BadImages, match=r"posix\.system") as caught:
        build_image_set(source, tmp_path / "set")
    assert caught.value.name == "cifar-10-batches-py/data_batch_1"
    assert list(tmp_path.iterdir()) == [source]
