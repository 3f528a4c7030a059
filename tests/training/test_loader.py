"""Order, shares and augmentation: what depends on seed, epoch and index, and on nothing else."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linear_vit.training import distributed
from linear_vit.training.config import DATASETS, RECIPES, Config, DatasetInfo, resolve
from linear_vit.training.data.augmentation import LightDraws, Mixer, crop_flip, image_transform
from linear_vit.training.data.datasets import Split
from linear_vit.training.data.loader import Loader, sample_order, share
from linear_vit.training.data.streams import drawing_from, generator, stream
from linear_vit.training.errors import UserError

CPU = torch.device("cpu")
GREY = DatasetInfo("grey", 16, 1, 10, (0.3,), (0.4,), crop_padding=2, flip=True)
COLOUR = DatasetInfo("colour", 16, 3, 10, (0.3,) * 3, (0.4,) * 3, crop_padding=4, flip=True)


def images(count: int, info: DatasetInfo = GREY) -> Tensor:
    size = (count, info.channels, info.image_size, info.image_size)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator("test", count))


def loader(count: int = 22, start: int = 0, workers: int = 0, **changes: Any) -> Loader:
    given = {"dataset": "digits", "preset": "small", "batch_size": 8, "epochs": 3, **changes}
    config: Config = resolve(given)
    return Loader(
        config, Split(images(count), torch.arange(count) % 10), GREY, CPU, start=start,
        workers=workers,
    )  # fmt: skip


def test_light_gives_every_image_its_own_crop_and_flip() -> None:
    same = images(1).expand(64, -1, -1, -1)
    draws = LightDraws(0, 0, 64, GREY, CPU)
    out = draws(same, torch.arange(64))
    assert out.dtype == torch.uint8
    assert out.shape == same.shape
    assert len({copy.numpy().tobytes() for copy in out}) > 30  # of 50 windows and mirrored ones


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    draws = generator("windows")
    pictures = torch.randint(1, 256, (20, 3, 5, 7), dtype=torch.uint8, generator=draws)
    offsets = torch.randint(0, 5, (2, 20), generator=draws)
    mirrored = torch.rand(20, generator=draws) < 0.5
    out = crop_flip(pictures, offsets, mirrored, 2)
    padded = nn.functional.pad(pictures, (2, 2, 2, 2))
    for n in range(20):
        i, j = offsets[:, n].tolist()
        window = padded[n, :, i : i + 5, j : j + 7]
        assert torch.equal(out[n], window.flip(-1) if mirrored[n] else window)


def test_no_padding_and_no_flip_change_nothing() -> None:
    info = DATASETS["digits"]  # mirrored digits are no digits, nor are those cut off
    pictures = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(LightDraws(0, 0, 5, info, CPU)(pictures, torch.arange(5)), pictures)


@pytest.mark.parametrize("name", ["seed", "strong"])
@pytest.mark.parametrize("info", [GREY, COLOUR], ids=["grey", "colour"])
def test_recipes_give_every_image_its_own_parameters(name: str, info: DatasetInfo) -> None:
    transform = image_transform(RECIPES[name], info)
    [image] = images(1, info)
    copies = []
    for index in range(64):
        with drawing_from("image", 0, 0, index):
            copies.append(transform(image))
    assert all(copy.dtype == torch.uint8 and copy.shape == image.shape for copy in copies)
    assert len({copy.numpy().tobytes() for copy in copies}) >= 62
    with drawing_from("image", 0, 0, 5):
        assert torch.equal(transform(image), copies[5])


def test_erasing_is_as_frequent_as_the_recipe_says() -> None:
    plain = DatasetInfo("plain", 16, 1, 10, (0.5,), (0.4,), crop_padding=0, flip=False)
    only_erasing = RECIPES["seed"].__class__({}, erasing=0.25)
    transform = image_transform(only_erasing, plain)
    white = torch.full((1, 16, 16), 255, dtype=torch.uint8)
    with drawing_from("erasing"):
        erased = sum(bool((transform(white) == 128).any()) for _ in range(400))
    assert 70 <= erased <= 130


def test_recipes_without_torchvision_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_rest: Any) -> None:
            if name.split(".")[0] == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(UserError, match=r"need torchvision.*nms does not exist.*--recipe light"):
        loader(recipe="seed").__iter__().__next__()
    assert next(iter(loader()))[0].shape == (8, 1, 16, 16)  # light needs none


@pytest.mark.parametrize("recipe", ["light", "seed", "strong"])
def test_a_loader_started_later_gives_what_the_first_gave(recipe: str) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    whole = list(loader(recipe=recipe))
    assert len(whole) == 9
    assert [len(x) for x, _ in whole[:3]] == [8, 8, 6]
    for start in (1, 3, 8):
        rest = list(loader(recipe=recipe, start=start))
        assert len(rest) == 9 - start
        for (x, y), (u, v) in zip(whole[start:], rest, strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)
    assert torch.equal(torch.get_rng_state(), state)  # dropout's stream is left alone
    assert not torch.equal(whole[0][0], whole[3][0])  # each epoch has its own order and crops


def test_worker_processes_change_nothing() -> None:
    here, there = (list(loader(recipe="strong", epochs=1, workers=w)) for w in (0, 2))
    for (x, y), (u, v) in zip(here, there, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("recipe", ["light", "strong"])
def test_processes_share_the_batches(
    recipe: str, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disjoint, and together just what one process has: augmented and mixed alike."""
    whole = list(loader(recipe=recipe, epochs=1))
    parts = []
    monkeypatch.setattr(distributed, "world", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(list(loader(recipe=recipe, epochs=1)))
    for step, (x, y) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), x)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), y)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 128])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_shares_are_disjoint_even_and_fair(count: int, parts: int) -> None:
    slices = [share(count, part, parts) for part in range(parts)]
    positions = [n for one in slices for n in range(count)[one]]
    assert positions == list(range(count))
    sizes = [len(range(count)[one]) for one in slices]
    assert max(sizes) - min(sizes) <= 2
    assert all(one.start % 2 == 0 or one.start == count for one in slices)


def test_mixing_is_convex_between_neighbours_and_so_are_the_labels() -> None:
    """Constant images show by how much they were mixed; each pair keeps what it started with."""
    mixer = Mixer(RECIPES["strong"].__class__({}, mixup=0.8), 10, seed=3)
    values = torch.tensor([0.0, 10.0, 20.0, 40.0, 7.0])
    x = values.view(5, 1, 1, 1).expand(5, 3, 8, 8).contiguous()
    shares = set()
    for step in range(5):
        mixed, targets = mixer(x, torch.arange(5), step)
        lam = targets[0, 0].item()
        shares.add(round(lam, 4))
        torch.testing.assert_close(mixed[:, 0, 0, 0], targets[:, :5] @ values)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(5))
        assert targets[2, 3].item() == pytest.approx(1 - lam, abs=1e-6)
        assert torch.equal(mixed[4], x[4])  # no neighbour
    assert len(shares) == 5


def test_cutmix_labels_are_shares_of_the_area() -> None:
    mixer = Mixer(RECIPES["strong"].__class__({}, cutmix=1.0), 10, seed=3)
    x = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)])
    for step in range(10):
        mixed, targets = mixer(x, torch.tensor([4, 9]), step)
        assert set(mixed.unique().tolist()) <= {0.0, 1.0}
        assert mixed[0].mean().item() == pytest.approx(targets[0, 9].item(), abs=1e-5)
        torch.testing.assert_close(mixed[1], 1 - mixed[0])


def test_streams() -> None:
    keys = [(0, 1), (1, 0), (0, 11), (0, "1")]
    assert len({stream(*key) for key in keys}) == 4
    assert all(0 <= stream(*key) < 2**63 for key in keys)
    assert torch.equal(sample_order(1, 2, 50).sort().values, torch.arange(50))
    assert not torch.equal(sample_order(1, 2, 50), sample_order(1, 3, 50))
