"""The data sets: found on disk, downloaded where there is a network, or embedded (digits).

Images are uint8 tensors (N, C, H, W) in memory and labels int64 (N,). Reading needs numpy alone
(and PIL for the JPEGs of Tiny ImageNet). Archives are checked before they are unpacked, and files
before they are read: what is trained on is what was published, and nothing else need be checked.
"""

import functools
import gzip
import hashlib
import pickle
import sys
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from linear_vit.screen import say
from linear_vit.training.config import DATASETS, DatasetInfo
from linear_vit.training.data.archives import Archive, fetch, unpack
from linear_vit.training.errors import UserError, first_line

# Of published contents, uncompressed (packages compress them anew), by file name. MD5 is all that
# the publishers of CIFAR-100 (train, test, meta) give.
CHECKSUMS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, C, H, W); labels: int64 (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """The three splits. Validation images are held out of the training set; test is apart.

    ``info`` has the classes that are there, and a title that says so where they are not all.
    """

    name: str
    info: DatasetInfo
    train: Split
    val: Split
    test: Split
    class_names: list[str]


def load(name: str, data_dir: str | Path = "data") -> Dataset:
    """The data set ``name`` (a key of DATASETS), from ``data_dir`` or, absent, downloaded there.

    The splits are the same in every run, whatever its seed. Raises UserError for an unknown name,
    for data that are neither there nor downloadable (saying where to get them), and for a damaged
    file (naming it).
    """
    if name not in _LOADERS:
        raise UserError(f"dataset must be one of {', '.join(_LOADERS)}, got {name!r}")
    return _LOADERS[name](Path(data_dir))


# --- digits ---------------------------------------------------------------------------------------


def _load_digits(data_dir: Path) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except (ImportError, OSError) as error:
        raise UserError(
            f"the digits come with scikit-learn: pip install scikit-learn ({error})"
        ) from error
    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # stored as 0 .. 16
    rest, test = _hold_out(bunch.target, 360)
    train, val = _hold_out(bunch.target[rest], 180)

    def split(which: np.ndarray) -> Split:
        return _split(pixels[which, None], bunch.target[which])

    names = [str(digit) for digit in range(10)]
    info = DATASETS["digits"]
    return Dataset("digits", info, split(rest[train]), split(rest[val]), split(test), names)


# --- Fashion-MNIST --------------------------------------------------------------------------------

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of its package dataset-fashion-mnist
_FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_FASHION_ARCHIVES = [
    Archive(f"{_FASHION_URL}/{name}-ubyte.gz", size, md5)
    for name, size, md5 in (
        ("train-images-idx3", 26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        ("train-labels-idx1", 29_515, "25c81989df183df01b3e8a0aad5dffbe"),
        ("t10k-images-idx3", 4_422_102, "bef4ecab320f06d8554ea6380940ec79"),
        ("t10k-labels-idx1", 5_148, "bb300cfdad3c16e7a12a480ee83cd310"),
    )
]
_FASHION_CLASSES = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle_boot"


def _load_fashion_mnist(data_dir: Path) -> Dataset:
    def file(folder: Path, archive: Archive) -> Path | None:
        paths = (folder / name for name in (archive.name, archive.name.removesuffix(".gz")))
        return next((path for path in paths if path.is_file()), None)

    places = "FashionMNIST/raw . fashion-mnist fashion_mnist FashionMNIST raw"
    folder = _find_or_get(
        "Fashion-MNIST",
        [*(data_dir / name for name in places.split()), _DEBIAN],
        lambda place: all(file(place, archive) for archive in _FASHION_ARCHIVES),
        _FASHION_ARCHIVES,
        f"the four files {', '.join(archive.name for archive in _FASHION_ARCHIVES)} "
        f"(30 MB) from {_FASHION_URL}/ (Debian and Ubuntu: apt install dataset-fashion-mnist)",
    )

    def read(*archives: Archive) -> tuple[np.ndarray, np.ndarray]:
        # IDX (http://yann.lecun.com/exdb/mnist): 16 bytes of header, or 8 where there is one axis.
        images, labels = (_published(file(folder, archive) or folder) for archive in archives)
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy()
        return pixels, np.frombuffer(labels, np.uint8, offset=8)

    train, test = read(*_FASHION_ARCHIVES[:2]), read(*_FASHION_ARCHIVES[2:])
    classes = [name.replace("_", " ") for name in _FASHION_CLASSES.split()]
    return _with_held_out("fashion-mnist", *train, _split(*test), classes)


# --- CIFAR-100 ------------------------------------------------------------------------------------

_CIFAR_ARCHIVE = Archive(
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    169_001_437,
    "eb9058c3a382ffc7106e4002c42a8d85",
)


def _load_cifar100(data_dir: Path) -> Dataset:
    places = "cifar-100-python cifar100/cifar-100-python cifar100 ."
    folder = _find_or_get(
        "CIFAR-100",
        [data_dir / name for name in places.split()],
        lambda place: all((place / name).is_file() for name in ("train", "test", "meta")),
        [_CIFAR_ARCHIVE],
        f"{_CIFAR_ARCHIVE.url} (169 MB), unpacked so that it holds train, test and meta,",
        unpacked_into=data_dir,
    )

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        batch = pickle.loads(_published(folder / name), encoding="latin1")
        return batch["data"].reshape(-1, 3, 32, 32), np.array(batch["fine_labels"])

    classes = pickle.loads(_published(folder / "meta"), encoding="latin1")["fine_label_names"]
    return _with_held_out("cifar100", *read("train"), _split(*read("test")), classes)


# --- Tiny ImageNet --------------------------------------------------------------------------------

_TINY_ARCHIVE = Archive(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    248_100_043,
    "90528d7ca1a48142e341f4ef8d21d0de",
)


def _load_tiny_imagenet(data_dir: Path) -> Dataset:
    folder = _find_or_get(
        "Tiny ImageNet",
        [data_dir / "tiny-imagenet-200", data_dir / "tiny-imagenet", data_dir],
        lambda place: (place / "wnids.txt").is_file() and (place / "train").is_dir(),
        [_TINY_ARCHIVE],
        f"{_TINY_ARCHIVE.url} (237 MB), unpacked so that it holds wnids.txt, train/ and val/,",
        unpacked_into=data_dir,
    )
    wnids = _read_lines(folder / "wnids.txt")
    if not 1 <= len(set(wnids)) == len(wnids) <= 200:
        raise _damaged(folder / "wnids.txt", f"names {len(set(wnids))} classes, not 1 to 200")
    words = folder / "words.txt"
    named = _read_lines(words) if words.is_file() else []
    titles = dict(line.split("\t", 1) for line in named if "\t" in line)
    info, whole = DATASETS["tiny-imagenet"], len(wnids) == 200
    if not whole:
        title = f"{info.title}, {len(wnids)} of {info.classes} classes"
        info = replace(info, title=title, classes=len(wnids))
    train = _by_class(folder / "train", wnids, 500 if whole else None)
    # The labels of its test set were never published: the 10,000 labelled "val" images are the
    # test set here, as in the literature, and validation images are held out of the training set.
    val = folder / "val"
    grouped = any((val / wnid).is_dir() for wnid in wnids)  # as many scripts leave it
    if grouped:
        test = _by_class(val, wnids, 50 if whole else None)
    else:
        test = _annotated(val, wnids, 10_000 if whole else None)
    how = "by class" if grouped else "as val_annotations.txt has it"
    what = f"{len(train) + len(test)} images of {info.title} (val {how})"
    say(f"reading {what} from {folder} ...", sys.stderr)
    names = [titles.get(wnid, wnid).split(",")[0] for wnid in wnids]
    return _with_held_out("tiny-imagenet", *_decode(train), _split(*_decode(test)), names, info)


def _by_class(folder: Path, wnids: Sequence[str], of_each: int | None) -> list[tuple[Path, int]]:
    """Images and labels of a folder that has one of each class, with images/ in it or without."""
    found = []
    for label, wnid in enumerate(wnids):
        files = sorted((folder / wnid).rglob("*.JPEG"))
        if not files:
            why = "holds no .JPEG files (of a part of the classes, wnids.txt names those alone)"
            raise _damaged(folder / wnid, why)
        if of_each not in (None, len(files)):
            raise _damaged(folder / wnid, f"holds {len(files)} .JPEG files, not {of_each}")
        found += [(file, label) for file in files]
    return found


def _annotated(folder: Path, wnids: Sequence[str], count: int | None) -> list[tuple[Path, int]]:
    """Images and labels of a val/ as it is published. Of a part of the classes, of these alone."""
    annotations, labels = folder / "val_annotations.txt", {w: n for n, w in enumerate(wnids)}
    lines = [line.split("\t") for line in _read_lines(annotations)]
    if short := [line for line in lines if len(line) < 2]:
        raise _damaged(annotations, f"has a line without file and class: {short[0]}")
    found = [(folder / "images" / name, labels[wnid]) for name, wnid, *_ in lines if wnid in labels]
    if not found:
        raise _damaged(annotations, f"names no image of the {len(wnids)} classes of wnids.txt")
    if count not in (None, len(found)):
        raise _damaged(annotations, f"names {len(found)} images, not {count}")
    return found


def _decode(files: list[tuple[Path, int]]) -> tuple[np.ndarray, np.ndarray]:
    """JPEG files of 64x64 pixels, some of them grey, as uint8 (N, 3, 64, 64), and their labels."""
    from PIL import Image

    pixels = np.empty((len(files), 3, 64, 64), np.uint8)

    def decode(position: int) -> None:
        path = files[position][0]
        try:
            with Image.open(path) as image:
                array = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise _damaged(path, str(error)) from error
        if array.shape != (64, 64, 3):
            raise _damaged(path, f"is {array.shape[1]}x{array.shape[0]} pixels, not 64x64")
        pixels[position] = array.transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:  # PIL decodes without holding the interpreter lock
        for _ in pool.map(decode, range(len(files)), chunksize=256):
            pass
    return pixels, np.array([label for _, label in files])


# --- shared ---------------------------------------------------------------------------------------


def _with_held_out(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    test: Split,
    class_names: list[str],
    info: DatasetInfo | None = None,
) -> Dataset:
    """Holds a tenth of the training images out for validation (as many of each class)."""
    train, val = _hold_out(labels, max(1, len(labels) // 10))
    return Dataset(
        name,
        info or DATASETS[name],
        _split(images[train], labels[train]),
        _split(images[val], labels[val]),
        test,
        class_names,
    )


def _hold_out(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of those that stay and of about ``count`` held out, the same share per class.

    Always the same, whatever the seed of a run: what is held out is a property of the data set.
    """
    generator = np.random.default_rng(0)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held[members[: round(len(members) * count / len(labels))]] = True
    if held.all() or not held.any():  # a handful of images, as in tests
        held[:] = False
        held[-1] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    return Split(pixels, torch.from_numpy(labels.astype(np.int64)))


def _find_or_get(
    title: str,
    places: Sequence[Path],
    complete: Callable[[Path], object],
    archives: Sequence[Archive],
    what: str,
    *,
    unpacked_into: Path | None = None,
) -> Path:
    """The first complete place, or else the first, with what was downloaded to it and checked.

    Archives are unpacked into the folder above it, or used as they are. Raises UserError where
    neither is possible, saying how to get the data by hand.
    """
    if found := next(filter(complete, places), None):
        return found
    folder = places[0]
    try:
        for archive in archives:
            path = fetch(archive, unpacked_into or folder)
            if unpacked_into is not None:
                unpack(path, unpacked_into)
    except OSError as error:
        raise UserError(
            f"{title} was not found, and downloading it failed ({first_line(error):.160}); "
            f"get {what} put into {folder} (or name the folder above it with --data_dir), "
            "or train on the embedded data set with --dataset digits"
        ) from error
    return folder


def _published(path: Path) -> bytes:
    """The content of a file, uncompressed; UserError unless it is the published one."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    expected = CHECKSUMS[path.name.removesuffix(".gz")]
    kind = "md5" if len(expected) == 32 else "sha256"
    if (found := hashlib.new(kind, content).hexdigest()) != expected:
        raise _damaged(path, f"its {kind} is {found:.8}..., the published {expected:.8}...")
    return content


def _read_lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged: {reason[:160]}; delete it and get the data set again")


_LOADERS: dict[str, Callable[[Path], Dataset]] = {
    "digits": _load_digits,
    "fashion-mnist": _load_fashion_mnist,
    "cifar100": _load_cifar100,
    "tiny-imagenet": _load_tiny_imagenet,
}

# Several runs of one process, as in a results table, read their data once.
load_once = functools.cache(load)
