"""The loaders, on small files of the real formats, whole and damaged."""

import gzip
import hashlib
import io
import pickle
import shutil
import struct
import sys
import tarfile
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from linear_vit.training.data import datasets
from linear_vit.training.data.archives import Archive, unpack
from linear_vit.training.errors import UserError

PUBLISHED = dict(datasets.CHECKSUMS)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads fail as without a network, on every machine; nothing is read from its folders.

    What is published is what the tests make.
    """
    monkeypatch.setattr(datasets, "CHECKSUMS", {})
    monkeypatch.setattr(datasets, "_DEBIAN", Path("nowhere"))

    def unreachable(*_arguments: Any, **_options: Any) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)


def publish(path: Path) -> None:
    """From now on a file's content is the published one."""
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    datasets.CHECKSUMS[path.name.removesuffix(".gz")] = hashlib.md5(content).hexdigest()


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def fashion(folder: Path, *, compressed: bool = True, count: int = 40) -> np.ndarray:
    """Writes the four files; returns the training images."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 28, 28), np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    for prefix in ("train", "t10k"):
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(array)
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if compressed else ''}"
            path.write_bytes(gzip.compress(content) if compressed else content)
            publish(path)
    return images


def cifar(folder: Path) -> np.ndarray:
    """Writes train, test and meta as the published archive has them; returns training data."""
    folder.mkdir(parents=True)
    data = np.random.default_rng(0).integers(0, 256, (200, 3072), np.uint8)
    labels = [n % 100 for n in range(200)]
    batch = {b"data": data, b"fine_labels": labels, b"coarse_labels": [0] * 200}
    for name in ("train", "test"):
        (folder / name).write_bytes(as_python_2(batch))
    names = {b"fine_label_names": [f"class {n}".encode() for n in range(100)]}
    (folder / "meta").write_bytes(as_python_2(names))
    for name in ("train", "test", "meta"):
        publish(folder / name)
    return data


def as_python_2(content: Any) -> bytes:
    """Pickles as the published files were: strings of bytes, numpy under its old name."""

    class Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
        dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]  # noqa: RUF012

        def save_string(self, text: bytes) -> None:
            self.write(pickle.BINSTRING + struct.pack("<i", len(text)) + text)

        dispatch[bytes] = save_string

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def tiny(folder: Path) -> None:
    """Three classes of four images; the second class's are grey, class c's pixels are 40 c."""
    from PIL import Image

    wnids = ["n03", "n01", "n02"]
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius\nn02\tnewt\n")
    lines = []
    for label, wnid in enumerate(wnids):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        image = Image.new(
            "L" if label == 1 else "RGB", (64, 64), (40 * label,) * (1, 3)[label != 1]
        )
        for n in range(4):
            image.save(folder / "train" / wnid / "images" / f"{wnid}_{n}.JPEG", "JPEG")
        image.save(folder / "val" / "images" / f"val_{label}.JPEG", "JPEG")
        lines.append(f"val_{label}.JPEG\t{wnid}\t0\t0\t62\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")


def test_digits_are_split_alike_every_time() -> None:
    first, second = datasets.load("digits"), datasets.load("digits")
    assert len(first.train.labels) + len(first.val.labels) + len(first.test.labels) == 1797
    for split in ("train", "val", "test"):
        a, b = getattr(first, split), getattr(second, split)
        assert a.images.dtype == torch.uint8
        assert a.images.shape[1:] == (1, 8, 8)
        assert torch.equal(a.images, b.images)
        shares = torch.bincount(a.labels, minlength=10) / len(a.labels)
        assert shares.min() > 0.08  # stratified
        assert shares.max() < 0.12
    assert first.train.images.max() == 255
    pixels = first.train.images.float() / 255
    assert pixels.mean().item() == pytest.approx(first.info.mean[0], abs=0.005)
    assert pixels.std().item() == pytest.approx(first.info.std[0], abs=0.005)


def test_splits_do_not_overlap() -> None:
    data = datasets.load("digits")
    keys = [
        {image.numpy().tobytes() for image in split.images}
        for split in (data.train, data.val, data.test)
    ]
    from sklearn.datasets import load_digits

    unique = len({row.tobytes() for row in load_digits().data})
    assert unique == 1797  # no image occurs twice, so a shared one would be a leak
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]


@pytest.mark.parametrize("place", [".", "fashion-mnist", "FashionMNIST/raw", "FashionMNIST"])
@pytest.mark.parametrize("compressed", [True, False])
def test_fashion_mnist_in_its_usual_places(tmp_path: Path, place: str, compressed: bool) -> None:
    images = fashion(tmp_path / place, compressed=compressed)
    data = datasets.load("fashion-mnist", tmp_path)
    assert len(data.train.labels) + len(data.val.labels) == 40
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(images))
    assert data.test.labels.tolist() == [n % 10 for n in range(40)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"not gzip at all",
        lambda content: gzip.compress(b"\0\0\x0d\x01" + bytes(8)),
        lambda content: gzip.compress(gzip.decompress(content)[:-5]),
        lambda content: gzip.compress(gzip.decompress(content)[:-1] + b"\x0b"),
        lambda content: gzip.compress(b""),
    ],
    ids=["cut", "no gzip", "another type", "too short", "a label of 11", "empty"],
)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_damaged_fashion_mnist_is_named(tmp_path: Path, damage: Any, name: str) -> None:
    fashion(tmp_path)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="is damaged") as caught:
        datasets.load("fashion-mnist", tmp_path)
    assert str(path) in str(caught.value)


def test_cifar100(tmp_path: Path) -> None:
    pixels = cifar(tmp_path / "cifar-100-python")
    data = datasets.load("cifar100", tmp_path)
    assert torch.equal(data.test.images, torch.from_numpy(pixels).view(-1, 3, 32, 32))
    assert data.test.labels[:3].tolist() == [0, 1, 2]
    assert data.class_names[7] == "class 7"
    assert len(data.train.labels) + len(data.val.labels) == 200


class _Harmful:
    def __reduce__(self) -> tuple:
        return (exec, ("import pathlib; pathlib.Path('/tmp/must-not-exist').touch()",))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}q\x00",
        b"",
        pickle.dumps([1, 2, 3]),
        pickle.dumps({"data": np.zeros((2, 5), np.uint8), "fine_labels": [1, 2]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [1]}),
        pickle.dumps({"data": _Harmful()}),
    ],
    ids=["truncated", "empty", "a list", "wrong shape", "a label short", "executes code"],
)
def test_damaged_cifar_is_named(tmp_path: Path, content: bytes) -> None:
    cifar(tmp_path / "cifar-100-python")
    path = tmp_path / "cifar-100-python" / "train"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged") as caught:
        datasets.load("cifar100", tmp_path)
    assert str(path) in str(caught.value)
    assert not Path("/tmp/must-not-exist").exists()


def test_tiny_imagenet(tmp_path: Path) -> None:
    tiny(tmp_path / "tiny-imagenet-200")
    data = datasets.load("tiny-imagenet", tmp_path)
    assert data.test.labels.tolist() == [0, 1, 2]
    assert data.test.images.shape == (3, 3, 64, 64)
    brightness = data.test.images.float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(brightness, torch.tensor([0.0, 40.0, 80.0]), atol=1.5, rtol=0)
    assert len(data.train.labels) + len(data.val.labels) == 12
    assert data.class_names == ["n03", "goldfish", "newt"]
    assert (data.info.title, data.info.classes) == ("Tiny ImageNet, 3 of 200 classes", 3)
    for split in (data.train, data.val):
        mean = split.images.float().mean(dim=(1, 2, 3))
        torch.testing.assert_close(mean, 40.0 * split.labels, atol=1.5, rtol=0)


@pytest.mark.parametrize("inside", [".", "images"])
def test_tiny_imagenet_with_val_by_class(
    tmp_path: Path, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As most scripts that prepare it leave val/, with the annotations still there or not."""
    folder = tmp_path / "tiny-imagenet-200"
    tiny(folder)
    as_published = datasets.load("tiny-imagenet", tmp_path)
    assert "(val as val_annotations.txt has it)" in capsys.readouterr().err
    val = folder / "val"
    for label, wnid in enumerate(["n03", "n01", "n02"]):
        (val / wnid / inside).mkdir(parents=True)
        (val / "images" / f"val_{label}.JPEG").rename(val / wnid / inside / f"val_{label}.JPEG")
    for _ in range(2):
        data = datasets.load("tiny-imagenet", tmp_path)
        assert torch.equal(data.test.images, as_published.test.images)
        assert torch.equal(data.test.labels, as_published.test.labels)
        assert "(val by class)" in capsys.readouterr().err
        (val / "val_annotations.txt").unlink(missing_ok=True)
        shutil.rmtree(val / "images", ignore_errors=True)
    for image in (val / "n01").rglob("*.JPEG"):
        image.unlink()
    with pytest.raises(UserError, match=r"val/n01 is damaged: holds no \.JPEG files"):
        datasets.load("tiny-imagenet", tmp_path)


def test_a_part_of_tiny_imagenet_takes_its_images_of_val_alone(tmp_path: Path) -> None:
    """Two classes named in wnids.txt, everything else as it was unpacked."""
    tiny(tmp_path)
    (tmp_path / "wnids.txt").write_text("n02\nn03\n")
    data = datasets.load("tiny-imagenet", tmp_path)
    assert (data.info.title, data.info.classes) == ("Tiny ImageNet, 2 of 200 classes", 2)
    assert data.test.labels.tolist() == [1, 0]
    assert set(data.train.labels.tolist()) == {0, 1}


def test_damaged_tiny_imagenet_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-imagenet-200"
    tiny(folder)
    image = folder / "train" / "n01" / "images" / "n01_2.JPEG"
    whole = image.read_bytes()
    image.write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"n01_2\.JPEG is damaged"):
        datasets.load("tiny-imagenet", tmp_path)
    image.write_bytes(whole)
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\t0\t0\t1\t1\n")
    with pytest.raises(
        UserError, match=r"val_annotations\.txt is damaged: names no image of the 3"
    ):
        datasets.load("tiny-imagenet", tmp_path)
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG n01\n")
    with pytest.raises(UserError, match=r"val_annotations\.txt is damaged: has a line without"):
        datasets.load("tiny-imagenet", tmp_path)
    (folder / "val" / "val_annotations.txt").unlink()
    with pytest.raises(UserError, match=r"val_annotations\.txt"):
        datasets.load("tiny-imagenet", tmp_path)


@pytest.mark.parametrize(
    ("name", "source", "folder"),
    [
        ("fashion-mnist", "fashion-mnist.s3-website", "FashionMNIST/raw"),
        ("cifar100", "cifar-100-python.tar.gz", "cifar-100-python"),
        ("tiny-imagenet", "tiny-imagenet-200.zip", "tiny-imagenet-200"),
    ],
)
def test_absent_data_say_where_to_get_them(
    tmp_path: Path, name: str, source: str, folder: str
) -> None:
    with pytest.raises(UserError) as caught:
        datasets.load(name, tmp_path)
    message = str(caught.value)
    for part in (source, str(tmp_path / folder), "--dataset digits", "http"):
        assert part in message


def test_files_are_the_published_ones(tmp_path: Path) -> None:
    """A file that reads well but was altered is named, compressed or not."""
    fashion(tmp_path, compressed=False)
    path = tmp_path / "train-images-idx3-ubyte"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    datasets.CHECKSUMS[path.name] = digest
    assert len(datasets.load("fashion-mnist", tmp_path).test.labels) == 40
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"its sha256 is .*published {digest:.8}") as caught:
        datasets.load("fashion-mnist", tmp_path)
    assert str(path) in str(caught.value)


def test_every_file_has_a_published_checksum() -> None:
    """Of all four files of Fashion-MNIST and all three of CIFAR-100."""
    names = {archive.name.removesuffix(".gz") for archive in datasets._FASHION_ARCHIVES}
    assert set(PUBLISHED) == {*names, "train", "test", "meta"}
    assert sorted(map(len, PUBLISHED.values())) == [32] * 3 + [64] * 4


def served(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """What is downloaded is ``content``."""
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(content))


def cifar_archive(folder: Path) -> bytes:
    cifar(folder / "cifar-100-python")
    with tarfile.open(folder / "made.tar.gz", "w:gz") as archive:
        archive.add(folder / "cifar-100-python", "cifar-100-python")
    return (folder / "made.tar.gz").read_bytes()


def published(monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> None:
    archive = getattr(datasets, name)
    as_made = Archive(archive.url, len(content), hashlib.md5(content).hexdigest())
    monkeypatch.setattr(datasets, name, as_made)


@pytest.mark.parametrize("by_hand", [True, False])
def test_an_archive_is_checked_and_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_hand: bool
) -> None:
    content = cifar_archive(tmp_path / "source")
    published(monkeypatch, "_CIFAR_ARCHIVE", content)
    data = tmp_path / "data"
    data.mkdir()
    if by_hand:
        (data / "cifar-100-python.tar.gz").write_bytes(content)
    else:
        served(monkeypatch, content)
    assert len(datasets.load("cifar100", data).test.labels) == 200
    assert {path.name for path in data.iterdir()} == {"cifar-100-python", "cifar-100-python.tar.gz"}


@pytest.mark.parametrize("damage", ["cut", "altered"])
@pytest.mark.parametrize("by_hand", [True, False])
def test_damaged_archives_are_named_and_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, by_hand: bool
) -> None:
    content = cifar_archive(tmp_path / "source")
    published(monkeypatch, "_CIFAR_ARCHIVE", content)
    damaged = content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1])
    data = tmp_path / "data"
    data.mkdir()
    if by_hand:
        (data / "cifar-100-python.tar.gz").write_bytes(damaged)
    else:
        served(monkeypatch, damaged)
    words = "bytes, the published one" if damage == "cut" else "MD5"
    with pytest.raises(UserError, match=rf"cifar-100-python\.tar\.gz is damaged: it .*{words}"):
        datasets.load("cifar100", data)
    assert [path.name for path in data.iterdir()] == ["cifar-100-python.tar.gz"] * by_hand


@pytest.mark.parametrize("kind", ["tar", "zip", "link"])
def test_nothing_is_unpacked_outside_of_the_folder(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    path = tmp_path / ("bad.zip" if kind == "zip" else "bad.tar.gz")
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("good.txt", "good")
            archive.writestr("../evil.txt", "evil")
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name in ("good.txt", "../evil.txt"):
                member = tarfile.TarInfo(name)
                if kind == "link" and name != "good.txt":
                    member.name, member.type, member.linkname = "link", tarfile.SYMTYPE, "/etc"
                archive.addfile(member, io.BytesIO(b""))
    with pytest.raises(UserError, match=rf"{path.name} cannot be unpacked .*nothing was"):
        unpack(path, folder)
    assert not list(folder.iterdir())
    assert not (tmp_path / "evil.txt").exists()


def test_a_tiny_imagenet_that_lacks_images_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny-imagenet-200"
    tiny(folder)
    names = [f"n{n:02}" for n in range(200)]
    for name in names[4:]:
        (folder / "train" / name).mkdir()
    (folder / "wnids.txt").write_text("n03\n" + "\n".join(n for n in names if n != "n03"))
    with pytest.raises(UserError, match=r"holds 4 \.JPEG files, not 500") as caught:
        datasets.load("tiny-imagenet", tmp_path)
    assert str(folder / "train" / "n03") in str(caught.value)


def test_reading_needs_no_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_rest: Any) -> None:
            if name.split(".")[0] == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    fashion(tmp_path)
    assert len(datasets.load("fashion-mnist", tmp_path).test.labels) == 40
    assert datasets.load("digits").info.channels == 1


def test_unknown_data_set() -> None:
    with pytest.raises(UserError, match=r"one of digits, fashion-mnist, .* got 'mnist'"):
        datasets.load("mnist")
