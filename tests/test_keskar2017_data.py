"""Original files, written by the test byte by byte, and what is wrong with others."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch

from sharpness_plugins.experiments.keskar2017 import originals
from sharpness_plugins.experiments.keskar2017.originals import DataFileError, read_cifar, read_features, read_mnist
from sharpness_plugins.experiments.keskar2017.sources import checksum, load

PIXELS = np.arange(3 * 32 * 32, dtype=np.uint32)


def image(seed):
    return ((PIXELS * 7 + 13 * seed) % 256).astype(np.uint8)


# --- MNIST


def idx(array):
    array = np.asarray(array, np.uint8)
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, *, mark="-", packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    made = {}
    for half, count in (("train", 5), ("t10k", 3)):
        images, labels = rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)
        made[half] = images, labels
        for part, kind, array in (("images", "idx3", images), ("labels", "idx1", labels)):
            content = idx(array)
            name = f"{half}-{part}{mark}{kind}-ubyte"
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return made


@pytest.mark.parametrize(("place", "mark", "packed"), [("", "-", False), ("MNIST/raw", "-", True), ("raw", ".", False)])
def test_mnist_is_read_from_idx_files(tmp_path, place, mark, packed):
    made = write_mnist(tmp_path / place, mark=mark, packed=packed)
    split = read_mnist(tmp_path, verify=False)
    for half, key in ((split.train, "train"), (split.test, "t10k")):
        images, labels = made[key]
        assert half.inputs.shape == (len(labels), 1, 28, 28)
        assert torch.equal((half.inputs[:, 0] * 255).round().int(), torch.from_numpy(images).int())
        assert half.labels.tolist() == labels.tolist()


def test_mnist_is_verified_by_what_is_in_it_not_by_how_it_was_packed(tmp_path, monkeypatch):
    write_mnist(tmp_path, packed=True)
    with pytest.raises(DataFileError, match=r"train-images-idx3-ubyte.gz is not the original.*--no-checksum"):
        read_mnist(tmp_path)
    known = {}
    for part, (kind, _) in originals._MNIST.items():
        content = gzip.decompress((tmp_path / f"{part}-{kind}-ubyte.gz").read_bytes())
        known[part] = kind, hashlib.md5(content).hexdigest()
    monkeypatch.setattr(originals, "_MNIST", known)
    assert len(read_mnist(tmp_path).train) == 5


def test_broken_mnist_files_are_named(tmp_path):
    with pytest.raises(DataFileError, match="there is no train-images-idx3-ubyte"):
        read_mnist(tmp_path)
    write_mnist(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    whole = labels.read_bytes()
    for content, message in (
        (whole[:-1], "cut off"),
        (b"\x00\x00\x0d\x01" + whole[4:], "00 00 0d 01 instead of 00 00 08 01"),
        (b"", "nothing"),
        (whole[:-1] + b"\x0c", "0 to 9"),
        (idx([1, 2]), r"\(2,\) labels for 3"),
    ):
        labels.write_bytes(content)
        with pytest.raises(DataFileError, match=message):
            read_mnist(tmp_path, verify=False)
    (tmp_path / "train-images-idx3-ubyte").rename(tmp_path / "train-images-idx3-ubyte.gz")
    with pytest.raises(DataFileError, match="not a whole gzip file"):
        read_mnist(tmp_path, verify=False)


# --- CIFAR


def cifar_files(classes, version, counts=(2, 3)):
    """Name -> bytes, and the labels and images in order."""
    names = {
        (10, "binary"): ([f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin"),
        (10, "python"): ([f"data_batch_{i}" for i in range(1, 6)], "test_batch"),
        (100, "binary"): (["train.bin"], "test.bin"),
        (100, "python"): (["train"], "test"),
    }[classes, version]
    files, labels, seed = {}, {"train": [], "test": []}, 0
    for half, half_names, count in (("train", names[0], counts[0]), ("test", [names[1]], counts[1])):
        for name in half_names:
            seeds = list(range(seed, seed + count))
            own = [s % classes for s in seeds]
            labels[half] += own
            pixels = [image(s) for s in seeds]
            seed += count
            if version == "binary":
                head = [bytes([label]) if classes == 10 else bytes([0, label]) for label in own]
                files[name] = b"".join(h + p.tobytes() for h, p in zip(head, pixels, strict=True))
            else:
                key = b"labels" if classes == 10 else b"fine_labels"
                files[name] = pickle.dumps({b"data": np.stack(pixels), key: own, b"batch_label": b"made"}, protocol=2)
    return files, labels


FOLDERS = {
    (10, "binary"): "cifar-10-batches-bin",
    (10, "python"): "cifar-10-batches-py",
    (100, "binary"): "cifar-100-binary",
    (100, "python"): "cifar-100-python",
}


def write_cifar(folder, classes, version, *, archive, counts=(2, 3)):
    files, labels = cifar_files(classes, version, counts)
    inside = FOLDERS[classes, version]
    if not archive:
        (folder / inside).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / inside / name).write_bytes(content)
    else:
        with tarfile.open(folder / f"cifar-{classes}-{version}.tar.gz", "w:gz") as members:
            for name, content in files.items():
                member = tarfile.TarInfo(f"{inside}/{name}")
                member.size = len(content)
                members.addfile(member, io.BytesIO(content))
    return labels


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize(("classes", "version"), FOLDERS)
def test_cifar_is_read_from_each_version(tmp_path, classes, version, archive):
    labels = write_cifar(tmp_path, classes, version, archive=archive)
    split = read_cifar(tmp_path, classes, verify=False)
    assert split.train.labels.tolist() == labels["train"]
    assert split.test.labels.tolist() == labels["test"]
    expected = torch.from_numpy(image(1).reshape(3, 32, 32)).float() / 255  # red, green and blue planes, row by row
    assert torch.equal(split.train.inputs[1], expected)
    assert list(tmp_path.rglob("*.bin")) == [] or not archive  # nothing is unpacked on disk


def test_the_folder_itself_may_be_named(tmp_path):
    write_cifar(tmp_path, 10, "python", archive=False)
    assert len(read_cifar(tmp_path / FOLDERS[10, "python"], 10, verify=False).train) == 10


def test_altered_cifar_is_refused_unless_asked(tmp_path):
    write_cifar(tmp_path, 10, "python", archive=False)
    with pytest.raises(DataFileError, match=r"data_batch_1 is not the original file: its MD5 is .*c99cafc.*--no-checksum"):
        read_cifar(tmp_path, 10)
    write_cifar(tmp_path, 100, "binary", archive=True)
    with pytest.raises(DataFileError, match=r"cifar-100-binary.tar.gz is not the original file"):
        read_cifar(tmp_path, 100)
    write_cifar(tmp_path, 100, "binary", archive=False)  # without known checksums of its files, the number of images tells
    with pytest.raises(DataFileError, match="should hold 50000 images, and hold 2"):
        read_cifar(tmp_path, 100)


class Intruder:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_pickle_that_calls_anything_is_refused(tmp_path, capsys):
    write_cifar(tmp_path, 100, "python", archive=False)
    for harm, message in ((Intruder(), r"__builtin__\.print"), (np.float64(1), "scalar")):
        (tmp_path / FOLDERS[100, "python"] / "train").write_bytes(pickle.dumps({b"data": harm}, protocol=2))
        with pytest.raises(DataFileError, match=message):
            read_cifar(tmp_path, 100, verify=False)
    assert "this ran" not in capsys.readouterr().out


def test_a_pickle_of_python_3_in_an_old_protocol_is_read(tmp_path):
    write_cifar(tmp_path, 100, "python", archive=False)
    data = {"data": np.stack([image(0)]), "fine_labels": [3]}
    assert b"_codecs" in pickle.dumps(data, protocol=2)
    (tmp_path / FOLDERS[100, "python"] / "train").write_bytes(pickle.dumps(data, protocol=2))
    assert read_cifar(tmp_path, 100, verify=False).train.labels.tolist() == [3]


def test_broken_cifar_files_are_named(tmp_path):
    with pytest.raises(DataFileError, match=r"cifar-10-binary.tar.gz or cifar-10-python.tar.gz.*Nothing is downloaded"):
        read_cifar(tmp_path, 10)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b not an archive")
    with pytest.raises(DataFileError, match=r"not a whole tar.gz"):
        read_cifar(tmp_path, 10, verify=False)
    write_cifar(tmp_path, 10, "binary", archive=False)
    folder = tmp_path / FOLDERS[10, "binary"]
    whole = (folder / "data_batch_3.bin").read_bytes()
    for content, message in ((whole[:-1], "3073 bytes"), (b"", "holds 0 bytes"), (b"\x0b" + whole[1:], "0 to 9")):
        (folder / "data_batch_3.bin").write_bytes(content)
        with pytest.raises(DataFileError, match=message):
            read_cifar(tmp_path, 10, verify=False)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(DataFileError, match=r"no data_batch_3.bin"):
        read_cifar(tmp_path, 10, verify=False)
    write_cifar(tmp_path, 100, "python", archive=False)
    for content, message in ((b"junk", "not a pickle"), (pickle.dumps([1]), "'data'")):
        (tmp_path / FOLDERS[100, "python"] / "test").write_bytes(content)
        with pytest.raises(DataFileError, match=message):
            read_cifar(tmp_path, 100, verify=False)


# --- features, and all of them by name


def features(**changes):
    rng = np.random.default_rng(0)
    made = {
        "train_inputs": rng.normal(size=(4, 360)),
        "train_labels": np.array([0, 1972, 5, 7]),
        "test_inputs": rng.normal(size=(2, 360)).astype(np.float32),
        "test_labels": np.array([1, 2]),
    }
    return made | changes


def test_features_are_read_from_an_npz(tmp_path):
    made = features()
    np.savez(tmp_path / "timit.npz", **made)
    for place in (tmp_path, tmp_path / "timit.npz"):
        split = load("timit", 0, folder=place)
        assert torch.equal(split.train.inputs, torch.from_numpy(made["train_inputs"].astype(np.float32)))
        assert split.train.labels.tolist() == [0, 1972, 5, 7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_inputs": np.zeros((4, 359))}, r"\(samples, 360\)"),
        ({"train_inputs": np.full((4, 360), np.nan)}, "finite"),
        ({"test_labels": np.array([0, 1973])}, "0 to 1972"),
        ({"test_labels": np.array([0.5, 1])}, "whole numbers"),
        ({"train_labels": np.array([1])}, "labels for 4 samples"),
        ({"train_labels": np.array([{}, {}, {}, {}], dtype=object)}, "cannot be read"),
    ],
)
def test_wrong_features_are_named(tmp_path, changes, message):
    np.savez(tmp_path / "timit.npz", **features(**changes))
    with pytest.raises(DataFileError, match=message):
        read_features(tmp_path / "timit.npz", num_features=360, num_classes=1973)


def test_missing_features_are_named(tmp_path):
    with pytest.raises(DataFileError, match="holds 0"):
        load("timit", 0, folder=tmp_path)
    with pytest.raises(DataFileError, match="no file"):
        load("timit", 0, folder=tmp_path / "none.npz")
    np.savez(tmp_path / "half.npz", train_inputs=np.zeros((1, 360)))
    with pytest.raises(DataFileError, match="test_labels"):
        load("timit", 0, folder=tmp_path)


def test_a_data_set_of_files_needs_a_folder_and_a_wrong_name_is_named():
    with pytest.raises(DataFileError, match="--folder"):
        load("mnist", 0)
    with pytest.raises(ValueError, match="Did you mean 'cifar10'"):
        load("cifar-10", 0)


def test_digits_differ_by_seed_and_are_cut_where_asked():
    first, other = load("digits", 0), load("digits", 1)
    assert checksum(first) == checksum(load("digits", 0)) != checksum(other)
    short = load("digits", 0, max_train=7, max_test=5)
    assert torch.equal(short.train.inputs, first.train.inputs[:7])
    assert len(short.test) == 5
