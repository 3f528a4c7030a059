"""Tensors that begin anywhere: no kernel reads or writes more at once than their place allows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda_host.checks import Case, needs_compiler
from tests.cuda_host.emulator import HERE, ROOMS, build_once, guarded
from tests.cuda_host.linear_attention import LinearAttention
from tests.cuda_host.operators import link

pytestmark = needs_compiler
FLAGS = ("-DLINEAR_VIT_HEAD_DIMS=32", "-DLINEAR_VIT_ELEMENT_TYPES=float, __half")

EXERCISE = """
import sys
from types import SimpleNamespace
from unittest import mock

import torch
from linear_vit.kernels import build
from linear_vit.kernels.registry import pretend_usable
from tests.cuda_host.operators import exercise

room, library = sys.argv[1:]
properties = SimpleNamespace(multi_processor_count=1)
with (
    pretend_usable("cuda"),
    mock.patch.object(build, "load"),
    mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
):
    torch.ops.load_library(library)
    for dtype in (torch.float16, torch.float32):
        seen = exercise(room, dtype, 32)
        names = {n.partition(".")[0] for n in torch._C._dispatch_get_all_op_names()}
        names = {n for n in names if n.startswith("linear_vit::cuda")}
        missing = {n for n in names if not n.endswith("describe")} - set(seen)
        assert not missing, missing
print(sum(seen.values()), "moved")
"""


def test_a_state_off_a_16_byte_boundary_is_refused() -> None:
    """By the host as by a GPU: a launcher is promised one that is on it."""
    emulated = LinearAttention(build_once("linear_attention", FLAGS))
    q, k, v, _ = Case(32, torch.float16).inputs()
    S, z = emulated.linear_attention_state(k, v)
    out = emulated.empty_like(q)
    for offset in (1, 2):
        arguments = emulated.arguments(q, None, guarded(S, offset), 1e-6, out=out, z=guarded(z, 1))
        with pytest.raises(RuntimeError, match="not a multiple of its size"):
            emulated.launch("linear_attention_apply", arguments)


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
def test_every_argument_of_every_operator_may_begin_anywhere(room: str, tmp_path: Path) -> None:
    library = link(room, tmp_path, FLAGS)
    done = subprocess.run(
        [sys.executable, "-c", EXERCISE, room, str(library)],
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("moved\n")
