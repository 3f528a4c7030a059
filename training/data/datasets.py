"""The data sets: found on disk, downloaded where there is a network, or embedded (digits).

Images are uint8 tensors (N, C, H, W) in memory and labels int64 (N,). Reading needs numpy alone
(and PIL for the JPEGs of Tiny ImageNet). Archives are checked before they are unpacked, files
after they are read: what is trained on is what was published.
"""

import functools
import gzip
import hashlib
import io
import math
import pickle
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linear_vit.training.config import DATASETS, DatasetInfo
from linear_vit.training.data.archives import Archive, fetch, unpack
from linear_vit.training.errors import UserError, first_line

# SHA-256 of published contents, uncompressed (packages compress them anew), by file name. MD5 is
# all that the publishers of CIFAR-100 give.
CHECKSUMS = {
    "train-images-idx3-ubyte": (
        "sha256:c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    "train-labels-idx1-ubyte": (
        "sha256:bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    "t10k-images-idx3-ubyte": (
        "sha256:5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    "t10k-labels-idx1-ubyte": (
        "sha256:0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
    "cifar-100-python/train": "md5:16019d7e3df5f24257cddd939b257f8d",
    "cifar-100-python/test": "md5:f0ef6b0ae62326f3e7ffdfab6717acfc",
    "cifar-100-python/meta": "md5:7973b15100ade9c7d40fb424638fde48",
}


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, C, H, W); labels: int64 (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """The three splits. Validation images are held out of the training set; test is apart."""

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

_FASHION_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_FASHION_ARCHIVES = [
    Archive(f"{_FASHION_URL}/{stem}.gz", size, md5)
    for stem, size, md5 in (
        (_FASHION_FILES[0], 26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        (_FASHION_FILES[1], 29_515, "25c81989df183df01b3e8a0aad5dffbe"),
        (_FASHION_FILES[2], 4_422_102, "bef4ecab320f06d8554ea6380940ec79"),
        (_FASHION_FILES[3], 5_148, "bb300cfdad3c16e7a12a480ee83cd310"),
    )
]
_FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


def _load_fashion_mnist(data_dir: Path) -> Dataset:
    folder = _find(
        [
            data_dir,
            data_dir / "fashion-mnist",
            data_dir / "fashion_mnist",
            data_dir / "FashionMNIST" / "raw",
            data_dir / "FashionMNIST",
            data_dir / "raw",
            Path("/usr/share/datasets/fashion-mnist"),  # Debian's package dataset-fashion-mnist
        ],
        lambda candidate: all(_idx_file(candidate, stem) for stem in _FASHION_FILES),
    )
    if folder is None:
        folder = data_dir / "FashionMNIST" / "raw"
        _download(
            "Fashion-MNIST",
            _FASHION_ARCHIVES,
            f"the four files {', '.join(f'{stem}.gz' for stem in _FASHION_FILES)} "
            f"(30 MB) from {_FASHION_URL}/ (Debian and Ubuntu: apt install dataset-fashion-mnist)",
            folder,
            unpacked_into=None,
        )

    def read(prefix: str) -> tuple[np.ndarray, np.ndarray]:
        image_file = _present(_idx_file(folder, f"{prefix}-images-idx3-ubyte"))
        label_file = _present(_idx_file(folder, f"{prefix}-labels-idx1-ubyte"))
        images, labels = read_idx(image_file), read_idx(label_file)
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise _damaged(
                image_file,
                f"holds {images.shape} pixels for labels {labels.shape}, not (N, 28, 28)",
            )
        checked = _checked_labels(labels, 10, label_file)
        for file in (image_file, label_file):
            stem = file.name.removesuffix(".gz")
            _check_published(stem, file, _idx_content(file))
        return images[:, None], checked

    return _with_held_out("fashion-mnist", *read("train"), _split(*read("t10k")), _FASHION_CLASSES)


def read_idx(path: Path) -> np.ndarray:
    """A uint8 array from an IDX file, gzip-compressed or not.

    The format (http://yann.lecun.com/exdb/mnist): two zero bytes, the type (8 = unsigned byte), the
    number of axes, each axis as a big-endian uint32, then the data.
    """
    try:
        content = _idx_content(path)
        zeros, kind, axes = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{axes}I", content, 4)
    except (OSError, EOFError, struct.error, ValueError, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    if zeros != 0 or kind != 8:
        raise _damaged(path, f"not an IDX file of unsigned bytes (starts with {content[:4]!r})")
    start, size = 4 + 4 * axes, math.prod(shape)
    if len(content) - start != size:
        raise _damaged(path, f"holds {len(content) - start} bytes of data, its header says {size}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _idx_content(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


def _idx_file(folder: Path, stem: str) -> Path | None:
    for name in (f"{stem}.gz", stem):
        if (folder / name).is_file():
            return folder / name
    return None


# --- CIFAR-100 ------------------------------------------------------------------------------------

_CIFAR_ARCHIVE = Archive(
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    169_001_437,
    "eb9058c3a382ffc7106e4002c42a8d85",
)


def _load_cifar100(data_dir: Path) -> Dataset:
    def complete(candidate: Path) -> bool:
        return all((candidate / name).is_file() for name in ("train", "test", "meta"))

    folder = _find(
        [
            data_dir / "cifar-100-python",
            data_dir / "cifar100" / "cifar-100-python",
            data_dir / "cifar100",
            data_dir,
        ],
        complete,
    )
    if folder is None:
        folder = data_dir / "cifar-100-python"
        _download(
            "CIFAR-100",
            [_CIFAR_ARCHIVE],
            f"{_CIFAR_ARCHIVE.url} (169 MB), unpacked so that it holds train, test and meta,",
            folder,
            unpacked_into=data_dir,
        )

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        path = folder / name
        batch = _read_pickle(path)
        data = batch.get("data")
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
            raise _damaged(path, "has no 'data' array of uint8 (N, 3072)")
        labels = np.asarray(batch.get("fine_labels", []))
        if labels.shape != data.shape[:1]:
            raise _damaged(path, f"has {len(data)} images and {labels.size} 'fine_labels'")
        checked = _checked_labels(labels, 100, path)
        _check_published(f"cifar-100-python/{name}", path, path.read_bytes())
        return data.reshape(-1, 3, 32, 32), checked

    names = [str(n) for n in _read_pickle(folder / "meta").get("fine_label_names", [])]
    if len(names) != 100:
        raise _damaged(folder / "meta", f"names {len(names)} classes, not 100")
    _check_published("cifar-100-python/meta", folder / "meta", (folder / "meta").read_bytes())
    return _with_held_out("cifar100", *read("train"), _split(*read("test")), names)


_PICKLED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles plain values and numpy arrays; a pickle that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"refers to {module}.{name}, which no data file needs")
        return super().find_class(module, name)


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise _damaged(path, str(error) or type(error).__name__) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"holds a {type(content).__name__}, not a dict")
    return content


# --- Tiny ImageNet --------------------------------------------------------------------------------

_TINY_ARCHIVE = Archive(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    248_100_043,
    "90528d7ca1a48142e341f4ef8d21d0de",
)
_TINY_PER_CLASS, _TINY_TEST = 500, 10_000  # images of the 200 classes


def _load_tiny_imagenet(data_dir: Path) -> Dataset:
    folder = _find(
        [data_dir / "tiny-imagenet-200", data_dir / "tiny-imagenet", data_dir],
        lambda candidate: (candidate / "wnids.txt").is_file() and (candidate / "train").is_dir(),
    )
    if folder is None:
        folder = data_dir / "tiny-imagenet-200"
        _download(
            "Tiny ImageNet",
            [_TINY_ARCHIVE],
            f"{_TINY_ARCHIVE.url} (237 MB), unpacked so that it holds wnids.txt, train/ and val/,",
            folder,
            unpacked_into=data_dir,
        )
    wnids = _read_lines(folder / "wnids.txt")
    if not 1 <= len(set(wnids)) == len(wnids) <= 200:
        raise _damaged(folder / "wnids.txt", f"names {len(set(wnids))} classes, not 1 to 200")
    index = {wnid: label for label, wnid in enumerate(wnids)}
    words = {}
    if (folder / "words.txt").is_file():
        words = dict(
            line.split("\t", 1) for line in _read_lines(folder / "words.txt") if "\t" in line
        )
    train = []
    for wnid in wnids:
        files = sorted((folder / "train" / wnid / "images").glob("*.JPEG"))
        if not files:
            raise _damaged(folder / "train" / wnid / "images", "holds no .JPEG files")
        if len(wnids) == 200 and len(files) != _TINY_PER_CLASS:
            count = f"holds {len(files)} .JPEG files, not {_TINY_PER_CLASS}"
            raise _damaged(folder / "train" / wnid / "images", count)
        train += [(file, index[wnid]) for file in files]
    # The labels of its test set were never published: the 10,000 labelled "val" images are the
    # test set here, as in the literature, and validation images are held out of the training set.
    annotations = folder / "val" / "val_annotations.txt"
    test = []
    for line in _read_lines(annotations):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in index:
            raise _damaged(annotations, f"has a line without file and known class: {line[:60]!r}")
        test.append((folder / "val" / "images" / fields[0], index[fields[1]]))
    if len(wnids) == 200 and len(test) != _TINY_TEST:
        raise _damaged(annotations, f"names {len(test)} images, not {_TINY_TEST}")
    print(f"reading {len(train) + len(test)} images of Tiny ImageNet ...", file=sys.stderr)
    names = [words.get(wnid, wnid).split(",")[0] for wnid in wnids]
    return _with_held_out("tiny-imagenet", *_decode(train), _split(*_decode(test)), names)


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
    name: str, images: np.ndarray, labels: np.ndarray, test: Split, class_names: list[str]
) -> Dataset:
    """Holds a tenth of the training images out for validation (as many of each class)."""
    train, val = _hold_out(labels, max(1, len(labels) // 10))
    return Dataset(
        name,
        DATASETS[name],
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


def _find(candidates: Iterable[Path], complete: Callable[[Path], bool]) -> Path | None:
    return next((candidate for candidate in candidates if complete(candidate)), None)


def _download(
    title: str,
    archives: Sequence[Archive],
    what: str,
    folder: Path,
    *,
    unpacked_into: Path | None,
) -> None:
    """Gets archives, checked, and unpacks them; or says how to get the data by hand.

    Archives lie in ``unpacked_into``, or where that is None, are used as they are in ``folder``.
    """
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


def _check_published(name: str, path: Path, content: bytes) -> None:
    """UserError unless a file's content is the published one."""
    expected = CHECKSUMS.get(name)
    if expected is None:
        return
    kind = expected.split(":")[0]
    found = f"{kind}:{hashlib.new(kind, content).hexdigest()}"
    if found != expected:
        raise _damaged(path, f"its checksum is {found:.16}..., the published {expected:.16}...")


def _read_lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _checked_labels(labels: np.ndarray, classes: int, path: Path) -> np.ndarray:
    if labels.size == 0:
        raise _damaged(path, "holds no images")
    if labels.min() < 0 or labels.max() >= classes:
        raise _damaged(path, f"has labels {labels.min()} to {labels.max()}, not 0 to {classes - 1}")
    return labels


def _present(path: Path | None) -> Path:
    assert path is not None, "a complete folder has every file"
    return path


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
