"""Tiles, warps, stages and splits of every Triton kernel: one table to read and to retune.

``TABLE`` maps a kernel, ``<folder>.<kernel>``, to rules; the first one that fits the architecture,
the dimension (head dim, or channels) and the dtype decides, so exceptions stand above what is
usual. A rule holds what its kernel is launched with: tile sizes by the kernel's own parameter
names, ``num_warps`` and ``num_stages``. ``python -m bench tune`` measures candidates on a GPU and
writes a file of the same rules; the environment variable LINEAR_VIT_TUNING names such a file,
whose rules are asked before the table's::

    {"schema": 1, "rules": [{"kernel": "linear_attention.state", "architecture": "sm_90",
                             "dim": 64, "dtype": "bfloat16",
                             "options": {"BLOCK_N": 128, "num_warps": 8, "num_stages": 3}}]}
"""

import contextlib
import functools
import json
import os
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from linear_vit.screen import counted

HALF = (torch.float16, torch.bfloat16)
FLOAT32 = (torch.float32,)
OVERRIDES = "LINEAR_VIT_TUNING"


@dataclass(frozen=True)
class Rule:
    """Launch options, and what they are for: None stands for any."""

    options: dict[str, int]
    architectures: tuple[str, ...] | None = None  # "sm_86"
    dims: Container[int] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None

    def fits(self, architecture: str, dim: int, dtype: torch.dtype) -> bool:
        return (
            (self.architectures is None or architecture in self.architectures)
            and (self.dims is None or dim in self.dims)
            and (self.dtypes is None or dtype in self.dtypes)
        )


def _tile(num_warps: int, num_stages: int, **tile: int) -> dict[str, int]:
    return {**tile, "num_warps": num_warps, "num_stages": num_stages}


# Half-precision channels whose tokens can't be 16 bytes apart: every element is an access, with its
# own address, so that a thread takes fewer.
_UNEVEN = frozenset(channels for channels in range(33, 4096) if channels % 8)


def _ripple_rules(num_warps: int, tokens: int = 16) -> tuple[Rule, ...]:
    """A tile of 64 channels, of fewer where there are not so many; float32 at 16 bytes a thread."""
    return (
        Rule(_tile(num_warps, 1, BLOCK_P=4 * tokens, BLOCK_C=16), dims=range(1, 17)),
        Rule(_tile(num_warps, 1, BLOCK_P=2 * tokens, BLOCK_C=32), dims=range(17, 33)),
        Rule(_tile(8, 1, BLOCK_P=16, BLOCK_C=64), dtypes=FLOAT32),
        Rule(_tile(8, 1, BLOCK_P=8, BLOCK_C=64), dims=_UNEVEN),
        Rule(_tile(num_warps, 1, BLOCK_P=tokens, BLOCK_C=64)),
    )


@dataclass(frozen=True)
class Splits:
    """How linear attention's tokens are spread over programs."""

    waves_resident: int  # programs a multiprocessor runs at once
    tokens_per_program: int  # from here on a second program a multiprocessor pays
    least_tokens: int  # of a split made only to balance the last wave
    most_tokens: int  # of a split: a float32 sum of more tiles is too long
    short_alone: int  # key and query tokens of a head that one program takes, however few heads
    short_keys: int  # key tokens of a head that one program takes where heads fill the GPU


SPLITS = Splits(
    waves_resident=2,
    tokens_per_program=4096,
    least_tokens=2048,
    most_tokens=65536,
    short_alone=512,
    short_keys=1024,
)

# Products with one operand from shared memory, as long as a program lives; mma.sync takes both from
# registers, so that the other architectures hold less of S at once.
_WGMMA = ("sm_90", "sm_100", "interpreter")
_WIDE = range(65, 129)
# Of narrow heads a tile has 16 bytes for each of 128 threads, and no more; those that differentiate
# queries would spill, and 256 threads share it.
_NARROW = (Rule(_tile(4, 3, BLOCK_N=64), dims=range(1, 33), dtypes=HALF),)
_NARROW_GRADIENT = (Rule(_tile(8, 3, BLOCK_N=64), dims=range(17, 33), dtypes=HALF),)
_STREAMED = (
    Rule(_tile(8, 2, RESIDENT=0, BLOCK_N=32, BLOCK_F=16), dtypes=FLOAT32),
    Rule(_tile(8, 2, RESIDENT=0, BLOCK_N=32, BLOCK_F=32)),
)


def _streamed(
    dims: range | None = None,
    *,
    architectures: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] = HALF + FLOAT32,
) -> tuple[Rule, ...]:
    """The rules of ``triton_streamed``, for the head dims, architectures and dtypes given."""
    return tuple(
        Rule(rule.options, architectures, dims, kinds)
        for rule, kinds in zip(_STREAMED, (FLOAT32, HALF), strict=True)
        if set(kinds) & set(dtypes)
    )


TABLE: dict[str, tuple[Rule, ...]] = {
    "linear_attention.state": (
        *_NARROW,
        *_streamed(_WIDE, architectures=("sm_80", "sm_86")),
        *_streamed(_WIDE, dtypes=FLOAT32),
        Rule(_tile(8, 2, BLOCK_N=16), dims=range(33, 65), dtypes=FLOAT32),
        Rule(_tile(8, 2, BLOCK_N=32), dtypes=FLOAT32),
        Rule(_tile(16, 3, BLOCK_N=32), dims=_WIDE, architectures=("sm_90", "interpreter")),
        Rule(_tile(8, 2, BLOCK_N=64), dims=_WIDE),
        Rule(_tile(8, 3, BLOCK_N=64), architectures=_WGMMA),
        Rule(_tile(8, 3, BLOCK_N=32)),
    ),
    "linear_attention.reduce": (Rule(_tile(4, 2, BLOCK_E=32, BLOCK_S=64)),),
    "linear_attention.apply": (
        *_NARROW,
        *_streamed(_WIDE, dtypes=FLOAT32),
        Rule(_tile(8, 2, BLOCK_N=32), dtypes=FLOAT32),
        Rule(_tile(8, 2, BLOCK_N=64), dims=_WIDE, architectures=_WGMMA),
        Rule(_tile(8, 2, BLOCK_N=32), dims=_WIDE),
        Rule(_tile(8, 3, BLOCK_N=128), architectures=("sm_90", "interpreter")),
        Rule(_tile(8, 3, BLOCK_N=64), architectures=_WGMMA),
        Rule(_tile(8, 3, BLOCK_N=32)),
    ),
    "linear_attention.query_gradient": (
        *_NARROW_GRADIENT,
        *_NARROW,
        Rule(_tile(8, 2, RESIDENT=0, BLOCK_N=32, BLOCK_F=16), ("sm_100",), range(65, 97), FLOAT32),
        Rule(_tile(8, 2, RESIDENT=0, BLOCK_N=32, BLOCK_F=32), None, range(65, 97), FLOAT32),
        Rule(_tile(8, 2, RESIDENT=0, BLOCK_N=16, BLOCK_F=16), ("sm_90",), range(97, 129), FLOAT32),
        Rule(_tile(8, 2, RESIDENT=0, BLOCK_N=32, BLOCK_F=16), ("sm_90",), range(97, 129), HALF),
        *_streamed(_WIDE),
        *_streamed(range(33, 65), architectures=("sm_80", "sm_86")),
        *_streamed(range(33, 65), dtypes=FLOAT32),
        Rule(_tile(8, 2, BLOCK_N=32), ("sm_90",), range(17, 33), FLOAT32),
        Rule(_tile(8, 2, BLOCK_N=16), dtypes=FLOAT32),
        # Two terms below 64 features spill in larger tiles.
        Rule(_tile(4, 2, BLOCK_N=32), ("sm_90", "interpreter"), range(33, 64), HALF),
        Rule(_tile(8, 2, BLOCK_N=128), architectures=("sm_90", "interpreter")),
        Rule(_tile(8, 3, BLOCK_N=32)),
    ),
    "linear_attention.query_sums": _streamed(),  # where query_gradient is streamed
    "linear_attention.key_value_gradient": (
        *_NARROW,
        Rule(_tile(8, 2, BLOCK_N=16), ("sm_80",), range(97, 129), HALF),
        Rule(_tile(8, 2, BLOCK_N=32), ("sm_80", *_WGMMA), _WIDE, HALF),
        Rule(_tile(8, 2, RESIDENT=0, BLOCK_N=16, BLOCK_F=16), dims=_WIDE),
        Rule(_tile(8, 2, BLOCK_N=16), dtypes=FLOAT32),
        Rule(_tile(8, 2, BLOCK_N=128), architectures=("sm_90", "interpreter")),
        Rule(_tile(8, 3, BLOCK_N=64), architectures=_WGMMA),
        Rule(_tile(8, 3, BLOCK_N=32)),
    ),
    "linear_attention.short_forward": (
        *_NARROW,
        Rule(_tile(8, 2, BLOCK_N=64), ("sm_100",), _WIDE, HALF),
        Rule(_tile(8, 2, BLOCK_N=32), ("sm_90", "interpreter"), _WIDE, HALF),
        *_streamed(_WIDE),
        Rule(_tile(8, 2, BLOCK_N=32), dtypes=FLOAT32),
        Rule(_tile(4, 2, BLOCK_N=64), architectures=("sm_90", "interpreter")),
        Rule(_tile(8, 3, BLOCK_N=64), architectures=_WGMMA),
        Rule(_tile(8, 3, BLOCK_N=32)),
    ),
    "linear_attention.short_backward": (
        Rule(_tile(4, 2, BLOCK_N=64), ("sm_100",), range(1, 17), HALF),
        Rule(_tile(4, 2, BLOCK_N=32), ("sm_80", "sm_86", "sm_100"), range(17, 33), HALF),
        *_NARROW_GRADIENT,
        *_NARROW,
        *_streamed(_WIDE),
        *_streamed(range(33, 65), architectures=("sm_80", "sm_86")),
        *_streamed(range(33, 65), dtypes=FLOAT32),
        Rule(_tile(8, 2, BLOCK_N=16), dtypes=FLOAT32),
        Rule(_tile(4, 2, BLOCK_N=32), architectures=("sm_90", "interpreter")),
        Rule(_tile(8, 3, BLOCK_N=32)),
    ),
    "softmax_attention.forward": (
        Rule(_tile(8, 2, OWNED=32, PASSED=32), dtypes=FLOAT32),
        Rule(_tile(4, 3, OWNED=128, PASSED=64), dims=range(33)),
        Rule(_tile(8, 3, OWNED=128, PASSED=64), architectures=("sm_90", "sm_100")),
        Rule(_tile(8, 2, OWNED=128, PASSED=32), dims=range(65, 97)),  # padded: more addresses
        Rule(_tile(8, 3, OWNED=128, PASSED=32), dims=range(65, 129)),
        Rule(_tile(8, 3, OWNED=128, PASSED=64)),
    ),
    "softmax_attention.query_gradient": (
        Rule(_tile(8, 2, OWNED=32, PASSED=16), dims=range(65, 129), dtypes=FLOAT32),
        Rule(_tile(8, 2, OWNED=32, PASSED=32), dtypes=FLOAT32),
        Rule(_tile(4, 2, OWNED=64, PASSED=64), dims=range(33)),
        Rule(_tile(8, 2, OWNED=64, PASSED=64), ("sm_100",), range(65, 97)),
        Rule(_tile(8, 2, OWNED=128, PASSED=64), architectures=("sm_90", "sm_100")),
        Rule(_tile(8, 2, OWNED=32, PASSED=64), dims=range(65, 129)),
        Rule(_tile(8, 2, OWNED=128, PASSED=32)),
    ),
    "softmax_attention.key_value_gradient": (
        # Some architectures spill a few bytes with the tiles that do well elsewhere.
        Rule(_tile(4, 3, OWNED=32, PASSED=16), ("sm_80",), dims=range(33), dtypes=FLOAT32),
        Rule(_tile(4, 2, OWNED=16, PASSED=16), ("sm_90",), dims=range(33), dtypes=FLOAT32),
        Rule(_tile(8, 2, OWNED=16, PASSED=16), ("sm_86",), dims=range(33, 65), dtypes=FLOAT32),
        Rule(_tile(4, 2, OWNED=16, PASSED=16), ("sm_100",), dims=range(97, 129), dtypes=FLOAT32),
        Rule(_tile(8, 2, OWNED=16, PASSED=16), ("sm_80",), dims=range(33, 129), dtypes=FLOAT32),
        Rule(_tile(4, 2, OWNED=16, PASSED=16), dims=range(65, 97), dtypes=FLOAT32),
        Rule(_tile(8, 2, OWNED=16, PASSED=16), dims=range(65, 129), dtypes=FLOAT32),
        Rule(_tile(4, 2, OWNED=32, PASSED=16), dtypes=FLOAT32),
        Rule(_tile(4, 2, OWNED=64, PASSED=32), dims=range(33)),
        Rule(_tile(8, 2, OWNED=128, PASSED=32), architectures=("sm_90", "sm_100")),
        Rule(_tile(8, 2, OWNED=64, PASSED=32), dims=range(65, 97)),
        Rule(_tile(4, 2, OWNED=64, PASSED=32), dims=range(65, 129)),
        Rule(_tile(8, 2, OWNED=128, PASSED=32)),
    ),
    # dim is the channels. 4 warps take 16 bytes of half-precision channels a thread; the backward
    # pass of a pyramid would spill so, and takes 8 bytes a thread.
    "ripple.pool": _ripple_rules(4),
    "ripple.pool_backward": _ripple_rules(4),
    "ripple.expand": _ripple_rules(4),
    "ripple.expand_backward": _ripple_rules(4),
    "ripple.pool_stages": _ripple_rules(4),
    # Pyramids of large tiles spill on single architectures.
    "ripple.pool_stages_backward": (
        Rule(_tile(8, 1, BLOCK_P=8, BLOCK_C=64), ("sm_80",), range(33, 4097), FLOAT32),
        Rule(_tile(8, 1, BLOCK_P=8, BLOCK_C=128), ("sm_80",), range(40, 4097, 8), HALF),
        *_ripple_rules(8),
    ),
    "ripple.expand_stages": (
        Rule(_tile(8, 1, BLOCK_P=4, BLOCK_C=64), ("sm_80",), _UNEVEN, HALF),
        Rule(_tile(4, 1, BLOCK_P=8, BLOCK_C=64), ("sm_90", "sm_100"), _UNEVEN, FLOAT32),
        *_ripple_rules(8, tokens=32),
    ),
    "ripple.expand_stages_backward": (
        Rule(_tile(8, 1, BLOCK_P=4, BLOCK_C=64), ("sm_80",), _UNEVEN, HALF),
        *_ripple_rules(8),
    ),
    "ripple.sum_partials": (Rule(_tile(4, 1, BLOCK_P=16, BLOCK_C=64)),),
}


@dataclass(frozen=True)
class Device:
    """What a choice depends on: the architecture, and the multiprocessors that are to be filled."""

    architecture: str
    multiprocessors: int


# Interpreted programs run one after the other: there is nothing to fill.
_INTERPRETER = Device("interpreter", 1)
_assumed: list[Device] = []


def device(of: torch.device) -> Device:
    """The device's architecture and multiprocessors, or those of the innermost :func:`assume`."""
    if _assumed:
        return _assumed[-1]
    return _query(of) if of.type == "cuda" else _INTERPRETER


@functools.cache
def _query(of: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(of)
    architecture = f"sm_{properties.major}{properties.minor}"
    return Device(architecture, properties.multi_processor_count)


def architecture(of: torch.device) -> str:
    """``"sm_90"`` and the like; ``"interpreter"`` on a CPU."""
    return device(of).architecture


@contextlib.contextmanager
def assume(architecture: str, multiprocessors: int) -> Iterator[None]:
    """Choose as for another device: to compile for it, or to count what it would move."""
    # nvcc's "sm_90a" names the same device.
    _assumed.append(Device(architecture.rstrip("af"), multiprocessors))
    try:
        yield
    finally:
        _assumed.pop()


@contextlib.contextmanager
def using(rules: Mapping[str, tuple[Rule, ...]]) -> Iterator[None]:
    """These rules of the kernels named, in place of the table's."""
    before = {kernel: TABLE[kernel] for kernel in rules}
    TABLE.update(rules)
    _options.cache_clear()
    try:
        yield
    finally:
        TABLE.update(before)
        _options.cache_clear()


def options(kernel: str, dim: int, dtype: torch.dtype, of: torch.device) -> dict[str, int]:
    """The launch options of a kernel: tile sizes, ``num_warps``, ``num_stages``.

    Args:
        kernel: a key of ``TABLE``.
        dim: the head dim, or the channels.
        dtype: of the inputs.
        of: the device that the tensors are on.

    Raises:
        LookupError: no rule fits, which is a hole in the table.
    """
    return dict(_options(kernel, dim, dtype, architecture(of), os.environ.get(OVERRIDES)))


@functools.lru_cache(maxsize=4096)
def _options(
    kernel: str, dim: int, dtype: torch.dtype, architecture: str, overrides: str | None
) -> dict[str, int]:
    extra = read_overrides(Path(overrides)).get(kernel, ()) if overrides else ()
    for rule in (*extra, *TABLE[kernel]):
        if rule.fits(architecture, dim, dtype):
            return rule.options
    raise LookupError(f"no rule of {kernel} fits {architecture}, {dim}, {dtype}")


@functools.cache
def read_overrides(path: Path) -> dict[str, tuple[Rule, ...]]:
    """The rules of a file that ``python -m bench tune`` wrote, by kernel.

    Raises:
        ValueError: another schema, or a kernel that does not exist.
    """
    content = json.loads(path.read_text())
    if content.get("schema") != 1:
        raise ValueError(f"{path} has tuning schema {content.get('schema')!r}, not 1")
    rules: dict[str, tuple[Rule, ...]] = {}
    for entry in content["rules"]:
        kernel = entry["kernel"]
        if kernel not in TABLE:
            raise ValueError(f"{path} tunes {kernel!r}; there are {', '.join(TABLE)}")
        rule = Rule(
            options=entry["options"],
            architectures=(entry["architecture"],),
            dims=(entry["dim"],),
            dtypes=(getattr(torch, entry["dtype"]),),
        )
        rules[kernel] = (*rules.get(kernel, ()), rule)
    return rules


def describe(kernel: str, dim: int, dtype: torch.dtype, of: torch.device) -> str:
    """The choice in one line: ``state BLOCK_N=64, 8 warps, 3 stages``."""
    chosen = options(kernel, dim, dtype, of)
    warps, stages = chosen.pop("num_warps"), chosen.pop("num_stages")
    tile = "".join(f" {name}={value}" for name, value in chosen.items())
    return f"{kernel.partition('.')[2]}{tile}, {counted(warps, 'warp')}, {counted(stages, 'stage')}"
