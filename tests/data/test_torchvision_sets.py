"""Fetching and reading, on small sets in the original formats served from this machine."""

import gzip
import hashlib
import io
import pickle
import shutil
import struct
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import torchvision

from steadyflow.data import CIFAR10, MNIST

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(folder, address) of a web server on this machine."""
    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{http.server_port}/"
        http.shutdown()


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(server, monkeypatch):
    """A small MNIST on the server, and its arrays."""
    folder, address = server
    random, arrays, resources, hashes = np.random.RandomState(0), {}, [], {}
    for part, count in [("train", 7), ("t10k", 3)]:
        arrays[f"{part}-images-idx3-ubyte"] = random.randint(0, 256, (count, 28, 28)).astype(np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = random.randint(0, 10, count).astype(np.uint8)
    for name, array in arrays.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        resources.append((f"{name}.gz", hashlib.md5((folder / f"{name}.gz").read_bytes()).hexdigest()))
        hashes[name] = hashlib.sha256(idx(array)).hexdigest()
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [address])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    monkeypatch.setattr(MNIST, "SHA256", hashes)
    return folder, arrays


def test_mnist_is_fetched_and_read(tmp_path, mnist):
    MNIST.download(tmp_path / "data")
    for split, part in [("train", "train"), ("test", "t10k")]:
        data = MNIST(tmp_path / "data", split)
        assert np.array_equal(data.images[:, 0].numpy(), mnist[1][f"{part}-images-idx3-ubyte"])
        assert np.array_equal(data.labels.numpy(), mnist[1][f"{part}-labels-idx1-ubyte"])
        assert (data.shape, data.num_classes, data.name) == ((1, 28, 28), 10, "mnist")
        padded = MNIST(tmp_path / "data", split, size=32).images
        assert torch.equal(padded[:, :, 2:-2, 2:-2], data.images)
        assert padded.long().sum() == data.images.long().sum()


def test_what_is_there_is_not_fetched_again(tmp_path, mnist):
    MNIST.download(tmp_path / "data")
    shutil.rmtree(mnist[0])
    MNIST.download(tmp_path / "data")
    assert len(MNIST(tmp_path / "data")) == 7


def test_files_put_there_by_hand_are_unpacked(tmp_path, mnist, monkeypatch):
    raw = tmp_path / "data" / "MNIST" / "raw"
    shutil.copytree(mnist[0], raw)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    MNIST.download(tmp_path / "data")
    assert len(MNIST(tmp_path / "data")) == 7


def test_a_failed_download_says_what_to_put_where(tmp_path, mnist, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(FileNotFoundError) as caught:
        MNIST.download(tmp_path / "data")
    message = str(caught.value)
    assert "\n" not in message
    assert "Connection refused" in message
    assert f"put {', '.join(f'{name}.gz' for name in MNIST.SHA256)} from http://127.0.0.1:9/" in message
    assert f"in {tmp_path}/data/MNIST/raw and run it again" in message


def test_a_download_with_another_hash_is_refused(tmp_path, mnist):
    (mnist[0] / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"other"))
    with pytest.raises(FileNotFoundError, match=r"Error downloading t10k-labels-idx1-ubyte\.gz: .*corrupted"):
        MNIST.download(tmp_path / "data")


def test_a_damaged_mnist_is_named(tmp_path, mnist):
    MNIST.download(tmp_path / "data")
    file = tmp_path / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"MNIST/raw is damaged .*steadyflow prepare dataset=mnist"):
        MNIST(tmp_path / "data")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte is not MNIST's file: sha256 .*delete it"):
        MNIST.download(tmp_path / "data")


def test_a_missing_mnist_says_where_how_and_what_to_set(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        MNIST(tmp_path)
    for part in [f"{tmp_path}/MNIST/raw", "`steadyflow prepare dataset=mnist`", "data_dir=DIR", "dataset.root=DIR"]:
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="size must be 28"):
        MNIST(tmp_path, size=64)


def test_the_real_mnist():
    if not (SHARED / "MNIST").exists():
        pytest.skip(f"no MNIST at {SHARED / 'MNIST'}")
    MNIST.download(SHARED)  # nothing to fetch: the hashes alone
    test = MNIST(SHARED, "test")
    assert torch.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert test.fingerprint == "474692f16b0515c106f97f184c2bdbff0f0e9117f79423dcfddf5231e22f47ea"


@pytest.fixture
def cifar10(server, monkeypatch):
    """A small CIFAR-10 on the server, and its batches."""
    folder, address = server
    base, random, batches = torchvision.datasets.CIFAR10, np.random.RandomState(0), {}
    names = [name for name, _ in base.train_list + base.test_list]
    for name in names:
        batches[name] = {"data": random.randint(0, 256, (4, 3072)).astype(np.uint8), "labels": random.randint(0, 10, 4)}
        batches[name]["labels"] = batches[name]["labels"].tolist()
    content = {name: pickle.dumps(batch) for name, batch in batches.items()}
    content["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    with tarfile.open(folder / base.filename, "w:gz") as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(f"{base.base_folder}/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))

    def md5(data):
        return hashlib.md5(data).hexdigest()

    monkeypatch.setattr(base, "url", address + base.filename)
    monkeypatch.setattr(base, "tgz_md5", md5((folder / base.filename).read_bytes()))
    monkeypatch.setattr(base, "train_list", [[name, md5(content[name])] for name in names[:-1]])
    monkeypatch.setattr(base, "test_list", [[names[-1], md5(content[names[-1]])]])
    monkeypatch.setattr(base, "meta", {**base.meta, "md5": md5(content["batches.meta"])})
    return folder, batches


def test_cifar10_is_fetched_and_read(tmp_path, cifar10):
    CIFAR10.download(tmp_path / "data")
    train, test = CIFAR10(tmp_path / "data"), CIFAR10(tmp_path / "data", "test")
    batches = cifar10[1]
    expected = np.concatenate([batches[f"data_batch_{i}"]["data"] for i in range(1, 6)])
    assert np.array_equal(train.images.flatten(1).numpy(), expected)
    assert train.labels.tolist() == [k for i in range(1, 6) for k in batches[f"data_batch_{i}"]["labels"]]
    assert np.array_equal(test.images.flatten(1).numpy(), batches["test_batch"]["data"])
    assert (test.shape, test.num_classes) == ((3, 32, 32), 10)
    shutil.rmtree(cifar10[0])
    CIFAR10.download(tmp_path / "data")


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_an_edited_cifar10_is_refused_before_it_is_unpickled(tmp_path, cifar10, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CIFAR10.download(tmp_path / "data")
    (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=r"cifar-10-batches-py is incomplete.*wrong md5; run: steadyflow prepare"):
        CIFAR10(tmp_path / "data")
    assert not Path("unpickled").exists()
    pickle.loads(pickle.dumps(Payload()))
    assert Path("unpickled").exists()  # so it would have been seen


def test_a_missing_or_unreachable_cifar10_is_said_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not at .*cifar-10-batches-py .*prepare dataset=cifar10"):
        CIFAR10(tmp_path)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(
        FileNotFoundError, match=r"refused.*put cifar-10-python\.tar\.gz from http://127\.0\.0\.1:9/ in"
    ):
        CIFAR10.download(tmp_path)
