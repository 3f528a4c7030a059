"""Two tables: a row a backend, and a row an operation. Nothing else lists them.

A built-in operation is a folder of ``kernels``, a backend a file in it of the backend's name that
defines the operation's functions. So adding a backend is that file per operation and a row of
``BACKEND_ROWS``; adding an operation is a folder and a row of ``OPERATION_ROWS``. What is told of
them here holds for everyone who asks: dispatch, check, benchmark, plots. ``kernels.registry`` has
these rows, and those that came from outside.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from linear_vit.kernels import probes

# Head dims that the GPU kernels are written for. 192 (two hydra branches at dim 384) would hold
# 2·192² float32 accumulators, more than a multiprocessor's register file.
HEAD_DIMS = (16, 32, 48, 64, 96, 128)
# The C++ kernels take any up to this: a head's state, 2·D² floats, should fit the L2 cache.
MOST_CPU_HEAD_DIM = 256


@dataclass(frozen=True)
class Backend:
    """A way to compute: what holds for it whichever the operation.

    Attributes:
        name: what ``backend=`` takes, and what a built-in one's files are called.
        title: how plots and tables write it.
        colour: in plots, ``"#rrggbb"``.
        probe: why it can't run on a device, in one line with the remedy; None where it can.
        rank: its place, fastest first, among those that ``backend=None`` may take; None: by name
            only, since compiling is never a surprise.
        own: its kernels are of this project, behind operators ``linear_vit::<name>_...``.
        eager: it is PyTorch's operators, one after the other.
        compiles: it runs what ``torch.compile`` makes.
        builds: its sources are compiled at first use.
        oracle: it is written to be right, and read, not to be fast. It alone takes float64.
        interpreter: the environment variable with which it is interpreted: usable by name then,
            and never timed.
    """

    name: str
    title: str
    colour: str
    probe: Callable[[torch.device], str | None] = probes.anywhere
    rank: int | None = None
    own: bool = False
    eager: bool = False
    compiles: bool = False
    builds: bool = False
    oracle: bool = False
    interpreter: str | None = None

    @property
    def interpreting(self) -> bool:
        """Whether it would be interpreted now."""
        return probes.switched_on(self.interpreter)


@dataclass(frozen=True)
class Operation:
    """What is computed, and where its backends are.

    Attributes:
        name: of the public function, and of the function in each backend's file.
        title: how plots and tables write it.
        package: the package whose modules are its backends, as ``linear_vit.kernels.ripple``.
        has_head_dim: whether its first tensor's last axis is a head dim.
        head_dims: by backend, those that its kernels are written for; any where it isn't named.
        refused: by backend, why this operation has none of it.
        fastest: the backend that ``backend=None`` takes first, before those of lower rank.
    """

    name: str
    title: str
    package: str
    has_head_dim: bool = False
    head_dims: Mapping[str, Sequence[int]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    fastest: str | None = None

    @property
    def family(self) -> str:
        """The folder of its backends, which operations of one kind share."""
        return self.package.rpartition(".")[2]


# The colours are Okabe and Ito's, which stay apart for colour-blind readers.
BACKEND_ROWS = (
    Backend("reference", "reference", "#7f7f7f", rank=4, eager=True, oracle=True),
    Backend("torch", "PyTorch", "#0072B2", rank=3, eager=True),
    Backend("compiled", "torch.compile", "#E69F00", probes.compiler, compiles=True),
    Backend("cpu", "C++", "#CC79A7", probes.cpu, rank=0, own=True, builds=True),
    Backend(
        "triton",
        "Triton",
        "#009E73",
        probes.triton,
        rank=1,
        own=True,
        interpreter=probes.INTERPRETER,
    ),
    Backend("cuda", "CUDA", "#D55E00", probes.cuda, rank=2, own=True, builds=True),
)

_linear = functools.partial(
    Operation,
    package="linear_vit.kernels.linear_attention",
    has_head_dim=True,
    head_dims={"triton": HEAD_DIMS, "cuda": HEAD_DIMS, "cpu": range(1, MOST_CPU_HEAD_DIM + 1)},
)
_softmax = functools.partial(
    Operation,
    package="linear_vit.kernels.softmax_attention",
    has_head_dim=True,
    head_dims={"triton": HEAD_DIMS, "cuda": HEAD_DIMS},
    refused={
        "cpu": "on the CPU PyTorch's own softmax attention is the fast one: use backend='torch'"
    },
    fastest="torch",  # SDPA's kernels are tuned; ours are, so far, only right
)
_ripple = functools.partial(Operation, package="linear_vit.kernels.ripple")
OPERATION_ROWS = (
    _linear("linear_attention", "linear attention"),
    _linear("linear_attention_packed", "linear attention, packed"),
    _linear("linear_attention_state", "state"),
    _linear("linear_attention_apply", "apply"),
    _softmax("softmax_attention", "softmax attention"),
    _softmax("softmax_attention_packed", "softmax attention, packed"),
    _ripple("ripple_pool", "ripple pool"),
    _ripple("ripple_expand", "ripple expand"),
    _ripple("ripple_pool_stages", "ripple pyramid down"),
    _ripple("ripple_expand_stages", "ripple pyramid up"),
)
