"""Augmentation, the training step, the optimiser's groups, configuration, statistics."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from train_minimal import check_finite, learning_rate
from training.augmentation import normalise, random_crop_flip
from training.clock import median_images_per_second
from training.config import DATASETS, MODELS, build_model, resolve
from training.errors import UserError
from training.metrics import accuracy, predict, t_interval
from training.step import make_optimizer, make_step, training_step


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_image_draws_its_own_crop_and_flip() -> None:
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8)
    out = random_crop_flip(image.expand(64, -1, -1, -1), padding=4, flip=True, generator=draws())
    assert out.dtype == torch.uint8
    assert out.shape == (64, 1, 8, 8)
    assert len({copy.numpy().tobytes() for copy in out}) > 40


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    images = torch.randint(1, 256, (20, 3, 5, 7), dtype=torch.uint8, generator=draws(1))
    out = random_crop_flip(images, padding=2, flip=True, generator=draws(2))
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    flips = 0
    for before, after in zip(padded, out, strict=True):
        windows = [before[:, i : i + 5, j : j + 7] for i in range(5) for j in range(5)]
        straight = any(torch.equal(after, window) for window in windows)
        mirrored = any(torch.equal(after, window.flip(-1)) for window in windows)
        assert straight != mirrored
        flips += mirrored
    assert 4 <= flips <= 16


def test_no_padding_and_no_flip_change_nothing() -> None:
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=draws())
    assert torch.equal(random_crop_flip(images, padding=0, flip=False, generator=draws()), images)
    assert not DATASETS["digits"].flip  # mirrored digits are no digits


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


@pytest.mark.parametrize("name", ["baseline", "ripple", "hydra-local"])
def test_make_step_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def recording(*arguments: object, **options: object) -> tuple[Tensor, Tensor]:
        loss, hits = training_step(*arguments, **options)  # type: ignore[arg-type]
        seen.append(loss)
        return loss, hits

    monkeypatch.setattr("training.step.training_step", recording)
    step = make_step(name, batch_size=8)
    for _ in range(6):
        step()
    assert seen[-1] < seen[0] - 0.1


def test_make_step_refuses_unknown_models() -> None:
    with pytest.raises(UserError, match="unknown model 'vit'; there are baseline, "):
        make_step("vit")


def test_t_interval() -> None:
    # Student's quantile for 95 % and 2 degrees of freedom is 4.302653 (any table).
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.half_width == pytest.approx(4.302653 * 1.0 / 3**0.5, rel=1e-6)
    assert t_interval([5.0]).half_width is None
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])


def test_t_interval_covers_the_truth_as_often_as_it_says() -> None:
    samples = torch.randn(2000, 4, generator=draws(7)).tolist()
    covered = 0
    for sample in samples:
        interval = t_interval(sample)
        assert interval.half_width is not None
        covered += abs(interval.mean) <= interval.half_width
    assert 0.935 <= covered / len(samples) <= 0.965


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


def test_non_finite_loss_names_the_step() -> None:
    losses = [torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))]
    with pytest.raises(UserError, match="became nan at step 12"):
        check_finite(losses, first_step=10, lr=1e-3)
    check_finite(losses[:1], first_step=0, lr=1e-3)


def test_defaults_are_the_original_ones() -> None:
    config = resolve({})
    assert (config.dataset, config.dim, config.depth, config.heads) == ("cifar100", 384, 12, 6)
    assert (config.mlp_dim, config.patch_size, config.dropout) == (1536, 4, 0.1)
    assert (config.epochs, config.batch_size, config.lr) == (200, 128, 3e-4)
    assert (config.warmup_epochs, config.weight_decay) == (10, 0.05)
    assert (config.ripple_stages, config.hydra_branches) == (3, 4)


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
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"attention_type": "linear"}, "one of baseline, ripple, hydra, got 'linear'"),
        ({"dataset": "imagenet"}, "one of digits, fashion-mnist, cifar100, tiny-imagenet"),
        ({"preset": "huge"}, "one of full, small"),
        ({"seed": -1}, "seed must be at least 0"),
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
