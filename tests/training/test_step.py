"""The training step, the optimiser's groups, configuration, statistics."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linear_vit.train_minimal import learning_rate
from linear_vit.training.clock import median_images_per_second
from linear_vit.training.config import DATASETS, MODELS, build_model, resolve
from linear_vit.training.data.augmentation import normalise
from linear_vit.training.errors import UserError
from linear_vit.training.logbook import check_finite, out_of_memory
from linear_vit.training.metrics import accuracy, predict
from linear_vit.training.step import make_optimizer, make_scaler, training_step


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_normalise() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    mean, std = (0.5, 0.25, 0.1), (0.5, 0.2, 0.3)
    for channel in range(3):
        low, high = normalise(images, mean, std)[:, channel, 0, 0].tolist()
        assert low == pytest.approx(-mean[channel] / std[channel], rel=1e-5)
        assert high == pytest.approx((1 - mean[channel]) / std[channel], rel=1e-5)


def test_learning_rate() -> None:
    rates = [learning_rate(s, total=100, warmup=10, peak=2.0) for s in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0)
    assert max(rates) == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)
    assert all(a <= b for a, b in pairwise(rates[:10]))
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert learning_rate(0, total=1, warmup=0, peak=1.0) == 1.0


@pytest.mark.parametrize("name", MODELS)
def test_weight_decay_is_for_matrices_alone(name: str) -> None:
    spec = MODELS[name]
    config = resolve(
        {
            "preset": "small",
            "dataset": "digits",
            "attention_type": spec.attention_type,
            "local_branch": spec.local_branch,
        }
    )
    model = build_model(config)
    decayed, others = make_optimizer(model, lr=1.0, weight_decay=0.5).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    for parameter in decayed["params"]:
        assert names[id(parameter)].endswith("weight")
        assert parameter.dim() == 2
    for parameter in others["params"]:
        kinds = ("bias", "positions", "norm.weight", "_weight", "local.weight")
        assert names[id(parameter)].endswith(kinds)


def test_a_step_is_what_it_says() -> None:
    """Loss with smoothing, hits, and a clipped gradient, against the formulas."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    images, labels = torch.randn(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.no_grad():
        logits = model(images)
        chosen = logits.log_softmax(1)
        expected = -0.9 * chosen[range(6), labels].mean() - 0.1 * chosen.mean()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    loss, hits = training_step(model, optimizer, images, labels, label_smoothing=0.1, clip=1e-3)
    torch.testing.assert_close(loss, expected)
    assert hits.item() == (logits.argmax(1) == labels).sum().item()
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_no_clipping() -> None:
    """A clip of 0 leaves the gradient as it is, however large."""
    moved = []
    for clip in (0, 1e9):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        images = 1e4 * torch.arange(8.0).view(2, 1, 2, 2)
        training_step(model, optimizer, images, torch.tensor([0, 2]), clip=clip)
        moved.append([a - b for a, b in zip(model.parameters(), before, strict=True)])
    for free, wide in zip(*moved, strict=True):
        assert torch.equal(free, wide)
    assert moved[0][0].norm() > 1e3


def test_a_gradient_that_is_no_number_shows_without_clipping_too() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    images = torch.tensor([float("inf"), 1.0]).view(2, 1, 1, 1)
    loss, _ = training_step(model, optimizer, images, torch.tensor([0, 1]), clip=0)
    assert loss.isnan()


def test_median_images_per_second() -> None:
    seconds, images = [9.0, 1.0, 2.0, 4.0], [8, 8, 8, 8]
    assert median_images_per_second(seconds, images, skip=1) == 4.0
    assert median_images_per_second(seconds, images, skip=9) == 4.0
    assert median_images_per_second([2.0], [8], skip=1) == 4.0


def test_predict_does_not_depend_on_the_batch_and_restores_the_mode() -> None:
    model = build_model(resolve({"preset": "small", "dataset": "digits", "dropout": 0.5}))
    images = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8, generator=draws())
    info = DATASETS["digits"]
    model.train()
    first = predict(model, images, info, batch_size=3)
    assert model.training
    assert torch.equal(first, predict(model, images, info))
    assert accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 0])) == 0.5


def test_non_finite_loss_names_step_and_checkpoint() -> None:
    losses = [1.0, float("nan"), float("inf")]
    with pytest.raises(UserError, match=r"became nan at step 12 .*no checkpoint yet"):
        check_finite(losses, first_step=10, lr=1e-3, checkpoint=None)
    with pytest.raises(UserError, match=r"last good checkpoint is runs/x/last.pt \(step 10\)"):
        check_finite(losses, first_step=10, lr=1e-3, checkpoint="runs/x/last.pt (step 10)")
    check_finite(losses[:1], first_step=0, lr=1e-3, checkpoint=None)


def test_out_of_memory_names_batch_model_and_a_way_out() -> None:
    config = resolve({"attention_type": "hydra", "batch_size": 96})
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ):
        message = str(out_of_memory(error, config))
        for part in ("batch of 96", "hydra", "dim 384", "--batch_size 48", "--accumulate 2"):
            assert part in message
    assert out_of_memory(RuntimeError("shapes differ"), config) is None


def test_accumulation_changes_nothing() -> None:
    """Loss, hits and the step taken, of labels and of mixed ones, whole and in three parts."""
    images, labels = torch.randn(8, 1, 2, 2), torch.arange(8) % 3
    mixed = 0.7 * F.one_hot(labels, 3) + 0.3 * F.one_hot(labels.flip(0), 3)
    for targets in (labels, mixed):
        found = []
        for parts in (1, 3):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            results = training_step(model, optimizer, images, targets, accumulate=parts)
            found.append([*results, *model.parameters()])
        for whole, in_parts in zip(*found, strict=True):
            torch.testing.assert_close(whole, in_parts)


def test_hits_of_mixed_labels_are_weighted() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 3))
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))  # predicts class 1
    targets = torch.tensor([[0.0, 0.25, 0.75], [0.4, 0.6, 0.0], [1.0, 0.0, 0.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    _, hits = training_step(model, optimizer, torch.zeros(3, 1, 1, 1), targets)
    assert hits.item() == pytest.approx(0.85)


def test_an_empty_share_takes_part_at_no_weight() -> None:
    model = build_model(resolve({"preset": "small", "dataset": "digits", "backend": "torch"}))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    none = torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)
    loss, hits = training_step(model, optimizer, *none, batch_size=1)
    assert (loss.item(), hits.item()) == (0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_gradient_that_is_no_number_shows_in_the_loss() -> None:
    """Finite loss, infinite gradient: a square root at zero."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images: Tensor) -> Tensor:
            return F.pad(self.weight.sqrt().expand(len(images), 1), (0, 2))

    model = Root()
    loss, _ = training_step(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.zeros(2, 1, 1, 1),
        torch.ones(2).long(),
    )
    assert loss.isnan()


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_steps(amp: str) -> None:
    """The fp16 loss is scaled, and gradients are unscaled before they are clipped."""
    device = torch.device("cpu")
    images, labels = torch.randn(16, 1, 2, 2), torch.arange(16) % 3
    moved = []
    for precision in ("off", amp):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = make_scaler(precision, device)
        assert (scaler is not None) == (precision == "fp16")
        training_step(model, optimizer, images, labels, amp=precision, clip=0.1, scaler=scaler)
        moved.append([a - b for a, b in zip(model.parameters(), before, strict=True)])
    for exact, rounded in zip(*moved, strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0.05, atol=2e-3)


def test_defaults_are_the_original_ones() -> None:
    config = resolve({})
    assert (config.dataset, config.dim, config.depth, config.heads) == ("cifar100", 384, 12, 6)
    assert (config.mlp_dim, config.patch_size, config.dropout) == (1536, 4, 0.1)
    assert (config.epochs, config.batch_size, config.lr) == (200, 128, 3e-4)
    assert (config.warmup_epochs, config.weight_decay) == (10, 0.05)
    assert (config.ripple_stages, config.hydra_branches) == (3, 4)
    assert (config.recipe, config.drop_path, config.accumulate) == ("seed", 0, 1)
    assert (config.label_smoothing, config.clip) == (0.1, 1.0)


def test_explicit_values_come_before_recipe_before_preset() -> None:
    small = {"preset": "small", "dataset": "digits"}
    assert (resolve(small).recipe, resolve(small).lr) == ("light", 5e-3)
    strong = resolve({**small, "recipe": "strong"})
    assert (strong.lr, strong.dropout, strong.drop_path, strong.dim) == (1e-3, 0.0, 0.1, 32)
    assert resolve({**small, "recipe": "strong", "lr": 2e-3}).lr == 2e-3
    assert resolve({**small, "recipe": "seed"}).lr == 3e-4


def test_what_follows_from_what() -> None:
    config = resolve({"dim": 192, "epochs": 20, "dataset": "digits"})
    assert (config.heads, config.mlp_dim, config.patch_size, config.warmup_epochs) == (3, 768, 1, 1)
    assert resolve({"dim": 192, "heads": 2, "mlp_dim": 100}).heads == 2
    small = resolve({"preset": "small", "dataset": "digits"})
    assert small.dim < 100
    assert resolve({"preset": "small", "dataset": "digits", "depth": 7}).depth == 7
    assert resolve({"preset": "small", "dataset": "digits", "dim": 128}).heads == 2  # not preset's


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": -1}, "epochs must be at least 1, got -1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1"),
        ({"attention_type": "cosine"}, "one of baseline, linear, ripple, hydra, got 'cosine'"),
        ({"dataset": "imagenet"}, "one of digits, fashion-mnist, cifar100, tiny-imagenet"),
        ({"preset": "huge"}, "one of full, small"),
        ({"recipe": "weak"}, "one of light, seed, strong, got 'weak'"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"drop_path": 1.0}, "drop_path must be at least 0 and below 1"),
        ({"amp": "fp8"}, "one of off, bf16, fp16"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"warmup_epochs": math.inf}, "warmup_epochs must be at least 0 and below 1e"),
        ({"weight_decay": math.inf}, "weight_decay must be at least 0 and below 1e"),
        ({"lr": math.inf}, "lr must be above 0 and below 1e"),
        ({"clip": -1.0}, "clip must be at least 0, got -1"),
        ({"clip": math.nan}, "clip must be at least 0, got nan"),
        ({"epochs": 10**400}, "epochs must be at least 1 and below 1e"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"seed": 2**64}, "seed must be at least 0 and below 9"),
        ({"colour": 1}, "unknown settings: colour"),
    ],
)
def test_values_out_of_range(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(given)


def test_run_names_tell_configurations_apart() -> None:
    names = {resolve({"seed": s, "lr": r}).run_name for s in (0, 1) for r in (1e-3, 2e-3)}
    assert len(names) == 4
    assert resolve({}).run_name == resolve({}).run_name
