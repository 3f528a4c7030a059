"""One flat configuration of a training run: defaults, presets, recipes, what follows from what."""

import dataclasses
import hashlib
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from linear_vit.attention import ATTENTION_TYPES, VisionTransformer
from linear_vit.training.errors import UserError


@dataclass(frozen=True)
class DatasetInfo:
    """What a data set looks like, and how its images are augmented and normalised."""

    title: str
    image_size: int
    channels: int
    classes: int
    mean: tuple[float, ...]  # of pixels in [0, 1], per channel
    std: tuple[float, ...]
    crop_padding: int = 4  # random crop out of the image padded by so many pixels
    flip: bool = True  # horizontally
    patch_size: int = 4  # default


# Digits fill their 8x8 frame and lose strokes by any shift, so they are not cropped; mirrored, they
# are no digits.
DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo(
        "scikit-learn digits",
        8,
        1,
        10,
        (0.305,),
        (0.376,),
        crop_padding=0,
        flip=False,
        patch_size=1,
    ),
    "fashion-mnist": DatasetInfo("Fashion-MNIST", 28, 1, 10, (0.2860,), (0.3530,), crop_padding=2),
    "cifar100": DatasetInfo(
        "CIFAR-100", 32, 3, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    ),
    "tiny-imagenet": DatasetInfo(
        "Tiny ImageNet", 64, 3, 200, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
    ),
}


@dataclass(frozen=True)
class Model:
    """A row of the results table: an attention type, with or without the local branch.

    ``operation`` is the one of ``kernels`` whose backends it can take.
    """

    title: str
    attention_type: str
    local_branch: bool
    operation: str


_SOFTMAX, _LINEAR = "softmax_attention_packed", "linear_attention"
_LINEAR_PACKED = "linear_attention_packed"
MODELS: dict[str, Model] = {
    "baseline": Model("Baseline ViT", "baseline", False, _SOFTMAX),
    "baseline-local": Model("Baseline ViT + local branch", "baseline", True, _SOFTMAX),
    "linear": Model("Linear ViT", "linear", False, _LINEAR_PACKED),
    "linear-local": Model("Linear ViT + local branch", "linear", True, _LINEAR_PACKED),
    "ripple": Model("RippleViT", "ripple", False, _LINEAR),
    "ripple-local": Model("RippleViT + local branch", "ripple", True, _LINEAR),
    "hydra": Model("HydraViT", "hydra", False, _LINEAR),
    "hydra-local": Model("HydraViT + local branch", "hydra", True, _LINEAR),
}

# The rows of a results table, where nothing else is asked for.
COMPARED = ("baseline", "baseline-local", "linear", "ripple", "hydra", "hydra-local")


@dataclass(frozen=True)
class Recipe:
    """How images are augmented and mixed, and the settings that belong to it.

    ``light`` is a crop and a flip, done for a whole batch on the device; the others augment image
    by image with torchvision. Mixing is of a whole batch: Mixup and CutMix with these Beta
    parameters, each for half of the batches where both are set. Random crops and flips are left
    out, and the crop's padding is, where a data set does not allow them (``DatasetInfo``).
    """

    settings: dict[str, Any]
    per_image: bool = True
    rotation: float = 0.0  # degrees, either way
    jitter: float = 0.0  # of brightness, contrast and saturation
    rand_augment: bool = False  # two operations of magnitude 9 (Cubuk et al. 2020)
    erasing: float = 0.0  # probability
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether an image has two labels, so that its accuracy is a weighted one."""
        return self.mixup > 0 or self.cutmix > 0


_SEED_SETTINGS: dict[str, Any] = {
    "lr": 3e-4,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "clip": 1.0,
    "dropout": 0.1,
    "drop_path": 0.0,
}
RECIPES: dict[str, Recipe] = {
    "light": Recipe({}, per_image=False),
    "seed": Recipe(_SEED_SETTINGS, rotation=15, jitter=0.2, erasing=0.25, mixup=0.8),
    # As DeiT (Touvron et al. 2021) for small data: lr 1e-3 at batch 128, stochastic depth for
    # dropout. No decay on norms, biases and positions and the mean-pool head are every recipe's.
    "strong": Recipe(
        {**_SEED_SETTINGS, "lr": 1e-3, "dropout": 0.0, "drop_path": 0.1},
        rand_augment=True,
        erasing=0.25,
        mixup=0.8,
        cutmix=1.0,
    ),
}


# A preset changes defaults; a recipe given by name comes before it, and flags given explicitly
# before both. "small" takes seconds per model on two CPU cores for the digits, minutes for
# Fashion-MNIST; its light recipe costs them next to nothing.
_SMALL = {"recipe": "light", "batch_size": 64, "lr": 3e-3, "dropout": 0.0}
_SMALL |= {"dim": 64, "depth": 2, "heads": 2, "hydra_branches": 4}
_TINY = {**_SMALL, "dim": 32, "hydra_branches": 2, "batch_size": 32, "lr": 5e-3}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {},
    "small": {
        "digits": {**_TINY, "epochs": 12},
        "fashion-mnist": {**_SMALL, "epochs": 6},
        "cifar100": {**_SMALL, "epochs": 10},
        "tiny-imagenet": {**_SMALL, "epochs": 10, "patch_size": 8},
    },
}


@dataclass(frozen=True)
class Bound:
    """What a number may be: at least so much (in words), and below that."""

    text: str
    least: float
    below: float = 1e9  # what is larger is a slip, and some of it no float


_COUNT = Bound("at least 1", 1)
_NATURAL = Bound("at least 0", 0)
_SHARE = Bound("at least 0", 0, 1)
_POSITIVE = Bound("above 0", math.nextafter(0, 1))
_SEED = Bound("at least 0", 0, 2**63)


@dataclass(frozen=True)
class Option:
    """What the command line says of a field of :class:`Config`, and what ``resolve`` checks.

    ``default`` is in words, where it follows from something else. ``commands`` are those that have
    the option, None stands for all that train. ``models`` are the attention types that have it.
    """

    help: str
    default: str | None = None
    bound: Bound | None = None
    choices: tuple[str, ...] = ()
    commands: tuple[str, ...] | None = None
    models: tuple[str, ...] = ATTENTION_TYPES


def _option(value: Any, help: str, default: str | None = None, **more: Any) -> Any:
    return dataclasses.field(default=value, metadata={"option": Option(help, default, **more)})


_AMP = ("off", "bf16", "fp16")
_WITH_HEADS = tuple(name for name in ATTENTION_TYPES if name != "hydra")
_OF_ONE_MODEL = ("train", "ablate")


@dataclass(frozen=True)
class Config:
    """Everything that decides the outcome of a run, the machine apart.

    The command line's options are made of these fields (training.options).
    """

    dataset: str = _option("cifar100", "", choices=tuple(DATASETS))
    attention_type: str = _option("ripple", "", choices=ATTENTION_TYPES, commands=_OF_ONE_MODEL)
    local_branch: bool = _option(
        False, "add a depthwise 3x3 to the attention", commands=_OF_ONE_MODEL
    )
    dim: int = _option(384, "embedding dimension", bound=_COUNT)
    depth: int = _option(12, "number of blocks", bound=_COUNT)
    heads: int = _option(
        6, "attention heads; not used by hydra", "dim / 64", bound=_COUNT, models=_WITH_HEADS
    )
    mlp_dim: int = _option(1536, "hidden dimension of the MLP", "4 * dim", bound=_COUNT)
    patch_size: int = _option(4, "side of a patch in pixels", "4; digits: 1", bound=_COUNT)
    ripple_stages: int = _option(
        3, "halvings of the token grid, ripple only", bound=_NATURAL, models=("ripple",)
    )
    hydra_branches: int = _option(4, "query branches, hydra only", bound=_COUNT, models=("hydra",))
    dropout: float = _option(0.1, "rate of dropout", bound=_SHARE)
    drop_path: float = _option(0.0, "rate of stochastic depth", "0; strong: 0.1", bound=_SHARE)
    recipe: str = _option("seed", "of augmentation:", choices=tuple(RECIPES))
    batch_size: int = _option(128, "images per step, over all processes", bound=_COUNT)
    accumulate: int = _option(1, "parts a process works its batch through in", bound=_COUNT)
    epochs: int = _option(200, "passes over the training images", bound=_COUNT)
    lr: float = _option(3e-4, "peak of the learning rate", "3e-4; strong: 1e-3", bound=_POSITIVE)
    weight_decay: float = _option(0.05, "of AdamW, on linear layers' matrices", bound=_NATURAL)
    warmup_epochs: float = _option(
        10.0, "linear warm-up", "10 of 200, in proportion", bound=_NATURAL
    )
    label_smoothing: float = _option(0.1, "of the targets", bound=_SHARE)
    clip: float = _option(1.0, "greatest norm of the gradient; 0: any", bound=_NATURAL)
    amp: str = _option("off", "autocast:", "bf16 on CUDA, else off", choices=_AMP)
    compile: bool = _option(False, "compile the model with torch.compile")
    backend: str | None = _option(None, "of the kernels", "the fastest usable one")
    preset: str = _option("full", "", choices=tuple(PRESETS))
    seed: int = _option(0, "of all that is drawn", bound=_SEED, commands=("train",))

    @property
    def model(self) -> str:
        """The key in ``MODELS`` of what this trains."""
        return self.attention_type + ("-local" if self.local_branch else "")

    @property
    def title(self) -> str:
        """What a line on the screen calls the run."""
        return f"{self.dataset} {self.model} seed {self.seed}"

    @property
    def setting(self) -> dict[str, Any]:
        """What runs that may share a table have in common: all but the model and the seed."""
        fields = dataclasses.asdict(self)
        for name in ("attention_type", "local_branch", "seed"):
            del fields[name]
        return fields

    @property
    def of_step(self) -> dict[str, Any]:
        """The settings that ``training.step.training_step`` takes."""
        names = ("amp", "label_smoothing", "clip", "accumulate")
        return {name: getattr(self, name) for name in names}

    @property
    def run_name(self) -> str:
        """A folder name that two different configurations never share."""
        return f"{self.dataset}-{self.model}-seed{self.seed}-{digest(dataclasses.asdict(self))}"


# The option of each field of Config, by name.
OPTIONS: dict[str, Option] = {f.name: f.metadata["option"] for f in dataclasses.fields(Config)}


def resolve(given: Mapping[str, Any]) -> Config:
    """The configuration of explicit values, recipe, preset and defaults, in that order.

    What follows from other values where it is not given: ``heads`` is dim / 64 and ``mlp_dim`` is
    4 * dim (6 and 1536 at the default dim of 384), ``patch_size`` is the data set's, and
    ``warmup_epochs`` is 10 of 200, in proportion. Raises UserError for a value out of range.
    """
    values: dict[str, Any] = {**dataclasses.asdict(Config()), **given}
    if unknown := set(values) - set(OPTIONS):
        raise UserError(f"unknown settings: {', '.join(sorted(unknown))}")
    for name in ("preset", "dataset", "recipe"):
        _check(name, values[name])
    dataset = values["dataset"]
    of_recipe = RECIPES[given["recipe"]].settings if "recipe" in given else {}
    chosen = {**PRESETS[values["preset"]].get(dataset, {}), **of_recipe, **given}
    if "dim" in given and "heads" not in given:
        chosen.pop("heads", None)
    values |= chosen
    for name, value in values.items():
        _check(name, value)
    follows = {
        "heads": max(1, values["dim"] // 64),
        "mlp_dim": 4 * values["dim"],
        "patch_size": DATASETS[dataset].patch_size,
        "warmup_epochs": 0.05 * values["epochs"],
    }
    values |= {name: value for name, value in follows.items() if name not in chosen}
    return Config(**values)


def ignored(name: str, config: Config) -> str | None:
    """Why a setting makes no difference to what is trained; None where it does."""
    if config.attention_type not in OPTIONS[name].models:
        return f"{config.attention_type} models have none"
    if name == "drop_path" and config.depth == 1:
        return "it grows from 0 in the first of several blocks, and depth is 1"
    return None


def build_model(config: Config, classes: int | None = None) -> VisionTransformer:
    """The model of a configuration, with its initial weights; UserError where sizes don't fit.

    ``classes`` are those that are there, where it is not all of the data set's.
    """
    info = DATASETS[config.dataset]
    shared = OPTIONS.keys() & inspect.signature(VisionTransformer).parameters.keys()
    try:
        return VisionTransformer(
            img_size=info.image_size,
            num_classes=info.classes if classes is None else classes,
            in_channels=info.channels,
            **{name: getattr(config, name) for name in shared},
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def model_settings(name: str) -> dict[str, Any]:
    """The settings that make a row of ``MODELS``; UserError for an unknown name."""
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    model = MODELS[name]
    return {"attention_type": model.attention_type, "local_branch": model.local_branch}


def digest(values: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that stand for a mapping of plain values."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _check(name: str, value: Any) -> None:
    option = OPTIONS[name]
    if option.choices and value not in option.choices:
        raise UserError(f"{name} must be one of {', '.join(option.choices)}, got {value!r}")
    bound = option.bound
    if bound and not bound.least <= value < bound.below:
        below = f" and below {bound.below:g}" if value >= bound.below else ""
        raise UserError(f"{name} must be {bound.text}{below}, got {value}")
