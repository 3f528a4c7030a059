"""What results are set beside: the original's claims, and what is compared with what.

Measured files say what their operations and backends are called. This page of tables says what a
reader wants to see side by side, and what is known of old files that don't say it themselves.
"""

from dataclasses import dataclass, replace
from typing import Any

# What the original Linear-ViT system stated of itself. Accuracy in percent; speed-up of training.
CLAIMS: dict[str, Any] = {
    "source": "the original Linear-ViT system's own results table",
    "backbone": "patch 4, dim 384, depth 12, 6 heads, MLP 1536, 200 epochs of batch 128",
    "accuracy": {
        "cifar100": {"baseline": 72.3, "ripple": 85.3, "hydra": 84.8},
        "tiny-imagenet": {"baseline": 65.2, "ripple": 75.2, "hydra": 74.6},
    },
    "speedup": {
        "cifar100": {"baseline": 1.0, "ripple": 2.1, "hydra": 2.0},
        "tiny-imagenet": {"baseline": 1.0, "ripple": 2.0, "hydra": 1.9},
    },
    "hours_200_epochs": {"cifar100": 4, "tiny-imagenet": 12},  # one RTX 3090, CUDA kernels
    "peak_memory_gb": 8,
    "best": {"ripple_stages": 3, "hydra_branches": 4},
}
# What a run has to have in common with the original for its claims to be put to the test.
CLAIMED_SETTING = {"dim": 384, "depth": 12, "mlp_dim": 1536, "batch_size": 128, "epochs": 200}

# What a good PyTorch user writes today: the backend that others are held against.
PYTORCH = "torch"
# The model that others are held against.
BASELINE = "baseline"


@dataclass(frozen=True)
class Family:
    """Operations that share a picture: the first is drawn solid, the second dashed.

    Where the first does the work of the second in another way, a reader asks from which length on
    it is the faster one; ``incumbent`` is then what PyTorch's second one is known as.
    """

    name: str
    operations: tuple[str, ...]
    incumbent: str = ""


# An operation of no family here has a picture of its own.
FAMILIES = (
    Family("attention", ("linear_attention", "softmax_attention"), incumbent="SDPA"),
    Family("state", ("linear_attention_state", "linear_attention_apply")),
    Family("packed", ("linear_attention_packed", "softmax_attention_packed")),
    Family("ripple", ("ripple_pool", "ripple_expand")),
    Family("pyramid", ("ripple_pool_stages", "ripple_expand_stages")),
)


def family_of(operation: str) -> Family:
    """The family of an operation, which may be its own."""
    of = (family for family in FAMILIES if operation in family.operations)
    return next(of, Family(operation, (operation,)))


@dataclass(frozen=True)
class Model:
    """A row of the results table.

    ``order`` is what the attention core's work grows as, ``grows_as`` the operation whose measured
    exponent says it, ``calls`` the operations that a step of the model spends its attention in.
    """

    title: str
    order: str
    grows_as: str
    calls: tuple[str, ...]


NOT_KNOWN = "–"  # the order of a model that this page has not heard of


def _models() -> dict[str, Model]:
    linear = ("O(N)", "linear_attention")
    ripple = ("ripple_pool", "ripple_expand")
    attention = {
        BASELINE: Model("Baseline ViT", "O(N²)", "softmax_attention", ("softmax_attention",)),
        "linear": Model("Linear ViT", *linear, ("linear_attention",)),
        "ripple": Model("RippleViT", *linear, ripple),
        "hydra": Model("HydraViT", *linear, ("linear_attention",)),
    }
    models: dict[str, Model] = {}
    for name, model in attention.items():
        local = Model(f"{model.title} + local branch", model.order, model.grows_as, model.calls)
        models |= {name: model, f"{name}-local": local}
    return models


# In the order of the results table.
MODELS = _models()
# Those that have a row whether they were trained or not.
ROWS = ("baseline", "baseline-local", "ripple", "hydra", "hydra-local")
# Title and image side of a data set, for the tables of what was not run and for records that don't
# say it; in the order of the results table.
DATASETS = {
    "digits": ("scikit-learn digits", 8),
    "fashion-mnist": ("Fashion-MNIST", 28),
    "cifar100": ("CIFAR-100", 32),
    "tiny-imagenet": ("Tiny ImageNet", 64),
}


def model_of(name: str, title: str | None = None) -> Model:
    """A model by its key; ``title`` is what its records say."""
    known = MODELS.get(name, Model(name, NOT_KNOWN, "", ()))
    return replace(known, title=title) if title else known
