"""Compile every Triton kernel for an architecture, with no GPU: ``python -m … 90 --dtypes …``.

Prints one JSON line per kernel, head dim and dtype. Run as a module of its own, since Triton must
not be in its interpreter here.
"""

import argparse
import importlib
import json
import re
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# float32 whatever the inputs' dtype.
_FLOAT32_POINTERS = {"inverse", "weight", "matrix", "vector", "state", "normaliser"}
_FLOAT32_POINTERS |= {"dstate", "dnormaliser", "lse", "delta", "partial"}
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def variants(head_dims: list[int], dtypes: list[torch.dtype]) -> Iterator[dict[str, Any]]:
    """Every kernel with the options its launcher would give it."""
    linear = importlib.import_module("kernels.linear_attention.triton")
    softmax = importlib.import_module("kernels.softmax_attention.triton")
    ripple = importlib.import_module("kernels.ripple.triton")
    for dtype in dtypes:
        for head_dim in head_dims:
            options = linear.tile_options(head_dim, dtype) | {"GROUP": 2}
            for rows in (False, True):
                extra = options | {"ROW_TERMS": rows, "CHUNK": linear.CHUNK}
                yield _variant(linear, "_feature_outer", dtype, extra)
            for name in ("_apply", "_query_gradient", "_key_value_gradient"):
                yield _variant(linear, name, dtype, options)
            options = softmax.tile_options(head_dim, dtype) | {"GROUP": 2}
            for name in ("_forward", "_query_gradient", "_key_value_gradient"):
                yield _variant(softmax, name, dtype, options)
        for axis in (0, 1):
            options = ripple.tile_options(384)
            for name in ("_depthwise", "_input_gradient", "_weight_gradient"):
                steps = ripple._steps(axis) | {"PAIRS": axis + 1}
                yield _variant(ripple, name, dtype, options | steps)
            yield _variant(ripple, "_pair_gradient", dtype, options | {"AXIS": axis})


def _variant(
    module: Any, kernel: str, dtype: torch.dtype, options: dict[str, Any]
) -> dict[str, Any]:
    room = module.__name__.split(".")[1]
    return {"room": room, "function": getattr(module, kernel), "dtype": dtype, "options": options}


def compile_for(architecture: int, variant: dict[str, Any]) -> dict[str, Any]:
    """Compile one variant; what came out."""
    function, dtype, options = variant["function"], variant["dtype"], variant["options"]
    signature, constants = {}, {}
    for index, name in enumerate(function.arg_names):
        if function.params[index].is_constexpr:
            signature[name], constants[(index,)] = "constexpr", options[name]
        elif name.endswith("_pointer"):
            role = name.removesuffix("_pointer")
            wide = role in _FLOAT32_POINTERS and (variant["room"], role) != ("ripple", "weight")
            signature[name] = "*fp32" if wide else f"*{_NAMES[dtype]}"
        elif name in ("eps", "scale"):
            signature[name] = "fp32"
        else:  # 64-bit sizes and strides: more than 2³¹ elements is an ordinary size
            signature[name] = "i64"
    launch = {key: options[key] for key in ("num_warps", "num_stages") if key in options}
    compiled = triton.compile(
        ASTSource(function, signature, constexprs=constants),
        target=GPUTarget("cuda", architecture, 32),
        options=launch,
    )
    tensor_core = re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", compiled.asm["ptx"])
    return {
        "kernel": f"{variant['room']}.{function.__name__}"
        + (".row_terms" if options.get("ROW_TERMS") else ""),
        "head_dim": options.get("D"),
        "dtype": str(dtype).removeprefix("torch."),
        "architecture": architecture,
        "shared": compiled.metadata.shared,
        "cubin_bytes": len(compiled.asm["cubin"]),
        "tensor_core": tensor_core.group(1) if tensor_core else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture", type=int)
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--head-dims", default="64")
    arguments = parser.parse_args()
    dtypes = [getattr(torch, name) for name in arguments.dtypes.split(",")]
    head_dims = [int(d) for d in arguments.head_dims.split(",")]
    for variant in variants(head_dims, dtypes):
        print(json.dumps(compile_for(arguments.architecture, variant)), flush=True)


if __name__ == "__main__":
    main()
