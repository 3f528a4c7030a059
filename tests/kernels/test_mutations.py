"""The kernel tests can fail: kernels broken in a small way, and the tests seen to go red.

Each mutation edits one line of a copy of the sources, in which the tests then run. The line must be
there exactly once, so that a mutation can't outlive the code it breaks.
"""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda_host import test_linear_attention, test_ripple, test_softmax_attention
from tests.kernels import test_amx
from tests.kernels.test_triton import ALL, ROOT, interpreter_reason, pytestmark, run_interpreted

__all__ = ["pytestmark"]


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # a pytest -k expression: the smallest part of the tests that must notice


LINEAR, RIPPLE = (f"kernels/{family}/triton.py" for family in ("linear_attention", "ripple"))
STREAMED = "kernels/linear_attention/triton_streamed.py"
NAMED = "test_named_cases and {op} and N70-M77"
LINEAR_NAMED = NAMED.format(op="linear_attention")
SOFTMAX = "kernels/softmax_attention/triton.py"
FLOAT32 = "many_tiles and 200-130 and float32"

MUTATIONS = [
    Mutation(
        "the last tile of keys is dropped",
        LINEAR,
        "        k = load_rows(k_head, tokens, end, k_stride_n, columns, D).to(tl.float32)",
        "        k = load_rows(k_head, tokens, end // 32 * 32, k_stride_n, columns, D)"
        ".to(tl.float32)",
        LINEAR_NAMED + " and float32",
    ),
    Mutation(
        "a split's partial sum is left out",
        LINEAR,
        "        total += load_rows(source, splits, num_splits, size, elements, size)",
        "        total += load_rows(source, splits, num_splits - 1, size, elements, size)",
        "split_over_programs and float32",
    ),
    Mutation(
        "φ's halves are swapped for keys",
        LINEAR,
        "        positive, negative = positive_part(k), negative_part(k)",
        "        negative, positive = positive_part(k), negative_part(k)",
        LINEAR_NAMED + " and float32",
    ),
    Mutation(
        "z's gradient takes another row's factor",
        LINEAR,
        "                dz_positive += second * u_second",
        "                dz_positive += second * u_first",
        LINEAR_NAMED + " and float16",
    ),
    Mutation(
        "a share of a row's sum beyond float16 is infinite",
        LINEAR,
        "                high = narrow_finite(x)",
        "                high = narrow(x, operand)",
        "hardly or tiny or few_keys",
    ),
    Mutation(
        "z's gradient is skipped where S is streamed",
        STREAMED,
        "        weight = -tl.sum(numerator * dout, axis=1) * inverse * inverse",
        "        weight = -tl.sum(numerator * dout, axis=1) * inverse * 0.0",
        "triton_streamed and float32",
    ),
    Mutation(
        "dk's halves have one sign where S is streamed",
        STREAMED,
        "                dk += tl.where(sign * k <= 0, 0.0, sign * dphi)",
        "                dk += tl.where(sign * k <= 0, 0.0, dphi)",
        "triton_streamed and float32",
    ),
    Mutation(
        "S is rounded without having been centred",
        LINEAR,
        " / tl.where(total == 0, 1.0, total)",
        " * 0.0",
        "cancel and linear",
    ),
    Mutation(
        "a float16 sum keeps its operand's scale",
        LINEAR,
        "        dS_positive *= of_positive[None, :]",
        "        dS_positive *= 2.0**-14",
        LINEAR_NAMED + " and float16",
    ),
    Mutation(
        "φ(q)/E is rounded where few features don't average it out",
        LINEAR,
        "            if D < 64 and operand != tl.float32:",
        "            if D < 0:",
        "few_features",
    ),
    Mutation(
        "what few keys have is flushed in float16",
        LINEAR,
        "    least = tl.maximum(tl.maximum(usual * 2.0**-16, eps * 2.0**-15), 2.0**-100)",
        "    least = usual * 0.0 + 2.0**-100",
        "what_few_keys_have",
    ),
    Mutation(
        "dz is summed with other roundings than dS",
        LINEAR,
        "            of_positive, of_negative = positive.to(tl.float32), negative.to(tl.float32)",
        "            of_positive, of_negative = positive_part(q * inverse[:, None]), "
        "-negative_part(q * inverse[:, None])",
        "of_two_kinds",
    ),
    Mutation(
        "a float16 normaliser has one window of its range",
        LINEAR,
        "        windows: tl.constexpr = TERMS // 3",
        "        windows: tl.constexpr = 1",
        "normaliser_of_what_is_tiny",
    ),
    Mutation(
        "rows of the last tile are not stored",
        LINEAR,
        "    store_tile(out_head, tokens, end, out_stride_n",
        "    store_tile(out_head, tokens, end - 1, out_stride_n",
        LINEAR_NAMED + " and float32",
    ),
    Mutation(
        "the gradient at zero is not zero",
        LINEAR,
        "    dk = tl.where(k == 0, 0.0, tl.where(k > 0, d_positive, -d_negative))",
        "    dk = tl.where(k >= 0, d_positive, -d_negative)",
        "test_no_gradient_at_zero and linear",
    ),
    Mutation(
        "NaN is dropped on the way in",
        "kernels/triton/support.py",
        "    return tl.load(pointer + offsets, mask=mask, other=0.0)\n\n\n@",
        "    x = tl.load(pointer + offsets, mask=mask, other=0.0)\n"
        "    return tl.where(x == x, x, 0.0)\n\n\n@",
        "test_nan_reaches and linear",
    ),
    Mutation(
        "grouped queries read the wrong head",
        LINEAR,
        "    kv_head = b * (heads // GROUP) + h // GROUP",
        "    kv_head = b * (heads // GROUP) + h % (heads // GROUP)",
        "split_grouped",
    ),
    Mutation(
        "the window is flipped",
        RIPPLE,
        "        r, c = row + (tap // 3 - 1), col + (tap % 3 - 1)",
        "        r, c = row + (1 - tap // 3), col + (tap % 3 - 1)",
        "test_named_cases and ripple_pool and float32",
    ),
    Mutation(
        "an odd grid's last pair is not cut",
        RIPPLE,
        "        whole = (row < rows) & (col < cols)",
        "        whole = (row < rows + 1) & (col < cols + 1)",
        "test_named_cases and ripple_expand and float32",
    ),
    Mutation(
        "a level's own gradient is left out",
        RIPPLE,
        "            dx = _load(own_pointer,",
        "            dx = 0.0 * _load(own_pointer,",
        "test_ripple_stages and test_pool and 5x6x20",
    ),
    Mutation(
        "a pyramid's last image is dropped",
        RIPPLE,
        "            self.parts = triton.cdiv(batch, images)",
        "            self.parts = max(1, batch // images - 1)",
        "test_ripple_stages and test_pool and 8x8x72",
    ),
    Mutation(
        "pair weights are not told apart on the way down",
        RIPPLE,
        "            pair = pair_pointers[s] + (parity * C)[:, None] + channels[None, :]",
        "            pair = pair_pointers[s] + (parity * 0)[:, None] + channels[None, :]",
        "test_ripple_stages and test_expand and 5x6x20",
    ),
    Mutation(
        "keys past the end are attended to",
        SOFTMAX,
        'scores = tl.where(inside, scores * scale, float("-inf"))',
        "scores = scores * scale",
        FLOAT32,
    ),
    Mutation(
        "the running maximum's correction is lost",
        SOFTMAX,
        "total = total * correction + tl.sum(weights, axis=1)",
        "total = total + tl.sum(weights, axis=1)",
        FLOAT32,
    ),
    Mutation(
        "delta is left out of the score gradient",
        SOFTMAX,
        "dscores = weights * (dweights * dscore_scale - delta[:, None])",
        "dscores = weights * (dweights * dscore_scale)",
        FLOAT32,
    ),
    Mutation(
        "keys past the end have a gradient",
        SOFTMAX,
        "weights = tl.where(_there(mask_rows, valid, MASKED)[None, :], weights, 0.0)",
        "weights = weights",
        "far_below and float32",
    ),
    Mutation(
        "the tile after the whole ones is dropped",
        SOFTMAX,
        "    if num_keys % PASSED != 0:\n        maximum",
        "    if num_keys % PASSED < 0:\n        maximum",
        FLOAT32,
    ),
    Mutation(
        "every query head of a group is the first",
        SOFTMAX,
        "h = hk * GROUP + g",
        "h = hk * GROUP",
        FLOAT32,
    ),
    Mutation(
        "a query past the end is read",
        SOFTMAX,
        "dout = _load(dout_rows, inside, D, BLOCK_D, True)",
        "dout = _load(dout_rows, inside + 1, D, BLOCK_D, True)",
        "past_the_end",
    ),
    Mutation(
        "a part of the depth of a product is left out",
        SOFTMAX,
        "for start in tl.static_range(0, D, DEPTH):",
        "for start in tl.static_range(DEPTH, D, DEPTH):",
        FLOAT32,
    ),
    Mutation(
        "a negative scale is taken for a positive one",
        SOFTMAX,
        "        scores = -scores",
        "        scores = scores",
        "any_scale and float32",
    ),
    Mutation(
        "weights underflow float16",
        SOFTMAX,
        "SHIFT: tl.constexpr = 15.0 if",
        "SHIFT: tl.constexpr = 0.0 if",
        "subnormal",
    ),
    Mutation(
        "score gradients underflow float16",
        SOFTMAX,
        "return 2.0 ** max(0, num_keys.bit_length() - 11) if dtype == torch.float16 else 1.0",
        "return 1.0",
        "subnormal",
    ),
]


def test_every_line_to_break_is_there_once() -> None:
    """Of all mutations, those of other files too: else they fail where only slow tests see it."""
    lines = [(ROOT / m.file, m) for m in MUTATIONS]
    folder = ROOT / "kernels"
    lines += [(folder / f"linear_attention/cpu_amx{m.file}", m) for m in test_amx.MUTATIONS]
    for room in (test_linear_attention, test_softmax_attention, test_ripple):
        names = [name for name in vars(room) if name.endswith("MUTATIONS")]
        lines += [(folder / m.file, m) for name in names for m in getattr(room, name)]
    assert len(lines) > 80
    for path, mutation in lines:
        assert path.read_text().count(mutation.old) == 1, (path, mutation.name)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", [pytest.param(m, id=m.name) for m in MUTATIONS])
def test_broken_kernel_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    reason = interpreter_reason()
    if reason:
        pytest.skip(reason)
    for folder in ("kernels", "attention", "linear_vit", "tests/kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = (tmp_path / mutation.file).read_text()
    assert source.count(mutation.old) == 1, f"{mutation.file} no longer has {mutation.old!r} once"
    (tmp_path / mutation.file).write_text(source.replace(mutation.old, mutation.new))

    files = [f"tests/kernels/test_{name}.py" for name in ALL]
    done = run_interpreted(*files, "-k", f"({mutation.tests}) and triton", root=tmp_path)
    failed = re.search(r"(\d+) failed", done.stdout)
    assert done.returncode == 1, f"not noticed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert failed, done.stdout
    wrong_number = re.search(r"AssertionError|^E +assert", done.stdout, re.MULTILINE)
    assert wrong_number, f"red, but not for a wrong number:\n{done.stdout}"
