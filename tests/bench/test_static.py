"""Every kernel, compiled with no GPU: no spills, products on tensor cores, 16-byte accesses.

The fast test is one architecture and head dim of linear attention; all the rest is slow.
"""

import csv
import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_vit.bench import tables
from linear_vit.bench.instruments import machine
from linear_vit.bench.problems import DTYPES
from linear_vit.bench.problems.ripple import RipplePool, RippleShape
from linear_vit.bench.static import launches, sdpa, units
from linear_vit.bench.static import table as static
from linear_vit.bench.static.faults import Row, faults, finished
from linear_vit.bench.static.units import ARCHITECTURES, BACKENDS, Unit, compile_all
from linear_vit.kernels import toolchains
from linear_vit.kernels.rows import HEAD_DIMS

needs_triton = pytest.mark.skipif(
    machine.version("triton") is None, reason="Triton is not installed here"
)
needs_toolchain = pytest.mark.skipif(
    toolchains.no_cuda_toolchain() is not None, reason=str(toolchains.no_cuda_toolchain())
)
COMPILERS = (
    pytest.param("triton", marks=needs_triton),
    pytest.param("cuda", marks=needs_toolchain),
)
FOLDERS = ("linear_attention", "softmax_attention", "ripple")
_MEASUREMENTS = Path(__file__).resolve().parents[2] / "reports" / "measurements"


def shipped_kernels(folder: str) -> set[str]:
    """Names of a folder's kernels: its JIT functions that no JIT function calls."""
    from triton.runtime.jit import JITFunction

    module = importlib.import_module(f"{launches.package(folder)}.triton")
    functions = {name: f for name, f in inspect.getmembers(module) if isinstance(f, JITFunction)}
    own = {name for name, f in functions.items() if f.fn.__module__ == module.__name__}
    called = {
        name
        for name in functions
        for f in functions.values()
        if re.search(rf"\b{name}[(,)]", f.src.partition(":\n")[2])  # or given to another
    }
    return own - called


def healthy(rows: list[Row]) -> None:
    """No faults, every kernel is one that an operation launches, and there are some."""
    assert rows
    assert [(r["kernel"], r["configuration"]) for r in rows if r["threads"] is None] == []
    wrong = [
        f"{r['kernel']} D={r['head_dim']} {r['dtype']} {r['architecture']} {r['layout']}: {fault}"
        for r in rows
        for fault in r["faults"]
    ]
    assert not wrong, "\n".join(wrong)
    assert all(16 <= r["registers"] <= 255 for r in rows)
    assert all(r["occupancy"] > 0 for r in rows)


# Warp instructions, of all warps together: what the kernels have today.
MOST_INSTRUCTIONS_A_TOKEN = {
    "bfloat16": {"state": 22, "apply": 26, "query_gradient": 70, "key_value_gradient": 44},
    "float16": {"state": 22, "apply": 27, "query_gradient": 74, "key_value_gradient": 47},
}
# The time to start them, over the time to copy what they are for.
MOST_ISSUE_OVER_COPY = {
    "state": 0.65,
    "apply": 0.65,
    "query_gradient": 0.8,
    "key_value_gradient": 0.8,
}


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float16", "float32"))],
)
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("triton", marks=[needs_triton, pytest.mark.slow]),
        pytest.param("cuda", marks=needs_toolchain),
    ],
)
def test_linear_attention_ships_without_faults(backend: str, dtype: str) -> None:
    rows = compile_all(
        backends=[backend],
        folders=["linear_attention"],
        architectures=["sm_90a"],
        dtypes=(dtype,),
        head_dims=(64,),
        ragged=False,
    )
    healthy(rows)
    half = dtype != "float32"
    assert any(r["tensor_core"] for r in rows) == half
    if half:
        assert any(r["wide_loads"] for r in rows)
        assert any(r["wide_stores"] for r in rows)
    if backend == "triton" and half:
        for name, most in MOST_ISSUE_OVER_COPY.items():
            # Where all gradients are wanted: one alone has fewer bytes to hide behind.
            alone = ("DQ=False", "DS=False", "DZ=False", "DK=False", "DV=False")
            found = [r for r in rows if r["kernel"] == f"_{name}"]
            whole = [r for r in found if not any(x in r["configuration"] for x in alone)]
            assert whole, name
            assert all(r["issue_us"] <= most * r["copy_us"] for r in whole), whole


# float16's code is bfloat16's with powers of two that keep it in range: what fits with them fits
# without. The command compiles both, and so does the table in reports/measurements/static.
TWO_DTYPES = ("float32", "float16")


# Rows of D elements that a kernel's main loops move for a token.
_ROWS_A_TOKEN = {"state": 2, "apply": 2, "query_gradient": 3, "key_value_gradient": 4}


@needs_toolchain
@pytest.mark.parametrize("dtype", MOST_INSTRUCTIONS_A_TOKEN)
def test_what_a_warp_runs_for_a_tile_is_counted(dtype: str) -> None:
    """Whole tiles, every nested loop's runs known, and no more instructions than there were.

    The bytes of the path that was found are those of 64 or more whole tokens: had it left out a
    copy, or gone by the narrow way too, they would be others.
    """
    rows = compile_all(
        backends=["cuda"],
        folders=["linear_attention"],
        architectures=["sm_90a"],
        dtypes=(dtype,),
        head_dims=(64,),
        ragged=False,
    )
    by_kernel = {r["kernel"].removeprefix("half_").removesuffix("_kernel"): r for r in rows}
    for name, most in MOST_INSTRUCTIONS_A_TOKEN[dtype].items():
        row = by_kernel[name]
        tokens = row["steady_bytes"] * row["threads"] / (_ROWS_A_TOKEN[name] * 64 * 2)
        assert tokens in (64, 128), name
        assert (row["loops"], row["steady_unknown"]) == (1, 0), name
        pipes = ("tensor_core", "fma", "load_store", "other")
        assert row["steady"] == sum(row[f"steady_{pipe}"] for pipe in pipes), name
        assert row["steady"] * row["threads"] / 32 <= most * tokens, name
        assert row["issue_us"] <= MOST_ISSUE_OVER_COPY[name] * row["copy_us"], name
        assert row["copy_share"] == pytest.approx(
            min(1, row["copy_us"] / row["issue_us"]), abs=1e-3
        )


@pytest.mark.slow
@needs_toolchain
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_kernels_ship_without_faults(architecture: str) -> None:
    """Every head dim where shared memory is least and where it matters most, two elsewhere."""
    main = architecture in ("sm_86", "sm_90a")
    rows = compile_all(
        backends=["cuda"],
        architectures=[architecture],
        dtypes=TWO_DTYPES if main else ("float16",),
        head_dims=None if main else (64, 128),
    )
    healthy(rows)
    assert {r["room"] for r in rows} == set(FOLDERS)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_triton_kernels_ship_without_faults(architecture: str) -> None:
    """Every head dim for the architecture that matters most, two for each of the others."""
    main = architecture == "sm_90a"
    rows = compile_all(
        backends=["triton"],
        architectures=[architecture],
        dtypes=TWO_DTYPES if main else ("float16",),
        head_dims=None if main else (64, 128),
    )
    healthy(rows)
    for folder in FOLDERS if main else ():
        assert shipped_kernels(folder) - {r["kernel"] for r in rows if r["room"] == folder} == set()


@pytest.mark.parametrize(
    ("file", "architectures"),
    [
        *((f"static-{backend}", ARCHITECTURES) for backend in BACKENDS),
        ("static-triton-3.6", ["sm_90a"]),  # the oldest supported version
    ],
)
def test_the_table_in_the_repository_is_whole(file: str, architectures: list[str]) -> None:
    """All that ships, on every architecture, and without a fault when it was compiled."""
    path, backend = _MEASUREMENTS / "static" / f"{file}.json", file.split("-")[1]
    document = json.loads(path.read_text())
    rows = document["rows"]
    assert [r for r in rows if r["faults"]] == []
    with path.with_suffix(".csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    # Records from before main loops were counted have none of them; a newer one has all.
    counted = [r for r in rows if "steady" in r]
    assert counted in ([], rows)
    assert [r for r in counted if r["tensor_core"] and not r["loops"]] == []
    wanted = {
        (backend, folder, architecture, dtype, head_dim)
        for folder in FOLDERS
        for architecture in architectures
        for dtype in DTYPES
        for head_dim in (HEAD_DIMS if launches.has_head_dims(folder) else (None,))
    }
    keys = ("backend", "room", "architecture", "dtype", "head_dim")
    assert wanted - {tuple(r[k] for k in keys) for r in rows} == set()


@pytest.mark.slow
@needs_toolchain
def test_kernels_of_pytorch_are_counted_as_ours() -> None:
    """Of 128 queries and keys a warp of four has a quarter of 2 · 128² · 64 multiply-adds."""
    rows = sdpa.flash_rows(["sm_90a"], ["bfloat16"], [64])
    (forward,) = (row for row in rows if row["kernel"] == "flash_fwd_kernel")
    assert forward["configuration"] == "128 queries, 128 keys"
    assert forward["steady_tensor_core"] == 2 * 128 * 128 * 64 / 4 / (16 * 8 * 16)
    assert (forward["loops"], forward["steady_unknown"]) == (1, 0)
    assert any("bwd" in row["kernel"] for row in rows)


def test_the_comparison_in_the_documents_is_the_records() -> None:
    """Warp instructions to a product; backward seven products in two kernels, against five."""
    rows = json.loads((_MEASUREMENTS / "static" / "static-softmax.json").read_text())["rows"]
    each: dict[str, list[float]] = {}
    for row in rows:
        if (
            row["dtype"] == "bfloat16"
            and row["backend"] != "triton"
            and "true" not in row["configuration"]
        ):
            name = row["kernel"].removeprefix("half_precision::")
            each.setdefault(name, []).append(row["steady"] / row["steady_tensor_core"])
    (forward,), (keys,), (queries,), (flash,), flash_backward = (
        each[name]
        for name in (
            "forward_kernel",
            "key_value_gradient_kernel",
            "query_gradient_kernel",
            "flash_fwd_kernel",
            "flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel",
        )
    )
    low, high = min(flash_backward), max(flash_backward)
    times = (4 * keys + 3 * queries) / (5 * (low + high) / 2)
    text = " ".join((_MEASUREMENTS.parents[1] / "docs" / "kernels.md").read_text().split())
    assert f"starts {forward:.1f} warp instructions and PyTorch's flash kernel {flash:.1f}." in text
    assert f"Backward it is {keys:.1f} and {queries:.1f}," in text
    assert f"against {low:.1f} to {high:.1f} with five: {times:.1f} times as many" in text


_FLASH = (
    "_ZN13pytorch_flash16flash_fwd_kernelI23Flash_fwd_kernel_traitsILi64ELi128ELi128ELi4ELb0ELb0E"
    "N7cutlass10bfloat16_tE19Flash_kernel_traitsILi64ELi128ELi128ELi4ES3_EELb0E{causal}Lb0ELb0E"
    "Lb1ELb1ELb0ELb0EEEvNS_16Flash_fwd_paramsE"
)


def test_kernels_of_pytorch_for_special_cases_are_left_out() -> None:
    found = sdpa.plain(_FLASH.format(causal="Lb0E"))
    assert found is not None
    assert (found["head_dim"], found["dtype"], found["threads"]) == (64, "bfloat16", 128)
    assert sdpa.plain(_FLASH.format(causal="Lb1E")) is None
    assert sdpa.plain("_ZN2at6native12memory_kernelEv") is None


# ---- faults: a checker that can't go red checks nothing ------------------------------------------

SOUND: Row = {
    "room": "linear_attention",
    "dtype": "bfloat16",
    "layout": "aligned",
    "configuration": "64, __nv_bfloat16",
    "products": True,
    "spill_stores": 0,
    "spill_loads": 0,
    "occupancy": 0.5,
    "float_atomics": 0,
    "tf32": 0,
    "fma": 10,
    "tensor_core": 16,
    "wide_loads": 4,
    "narrow_loads": 2,
    "wide_stores": 1,
    "narrow_stores": 1,
    "loops": 1,
    "steady": 600,
    "steady_local": 0,
    "steady_barriers": 1,
    "steady_bytes": 64,
    "issue_us": 0.6,
    "copy_us": 0.5,
    "copy_share": 0.83,
}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "spills in a loop": (
        {"spill_stores": 8, "spill_loads": 4, "steady_local": 4},
        "spills 12 bytes, in a main loop",
    ),
    "spills much": ({"spill_stores": 32, "spill_loads": 36}, "spills 68 bytes"),
    "spills, no loop": ({"spill_stores": 4, "spill_loads": 4, "loops": 0}, "spills 8 bytes"),
    "too large": ({"occupancy": 0.0}, "does not fit a multiprocessor"),
    "atomics": ({"float_atomics": 1}, "adds floats in no fixed order"),
    "TF32": ({"dtype": "float32", "tf32": 3}, "rounds float32 to TF32"),
    "no tensor core": ({"tensor_core": 0}, "10 multiply-adds and no tensor core"),
    "by hand": (
        {"tensor_core": 0, "products": None, "fma": 300},
        "300 multiply-adds and no tensor core",
    ),
    "narrow loads": ({"wide_loads": 0, "narrow_loads": 9}, "9 narrow loads and no 16-byte one"),
    "narrow stores": ({"wide_stores": 0, "narrow_stores": 9}, "9 narrow stores and no 16-byte one"),
}


def test_a_sound_kernel_has_no_fault() -> None:
    assert faults(SOUND) == []


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_each_fault_is_found(case: tuple[dict[str, Any], str]) -> None:
    change, fault = case
    assert faults({**SOUND, **change}) == [fault]


def test_a_few_bytes_may_wait_while_a_main_loop_runs() -> None:
    """They cost a few instructions once a block; which kernels have them changes with ptxas."""
    assert faults({**SOUND, "spill_stores": 32, "spill_loads": 32}) == []
    assert faults({**SOUND, "spill_stores": 4, "spill_loads": 4, "steady_local": 3}) == []


def test_a_filter_and_its_sums_are_no_tile() -> None:
    """Of a gradient of the filter alone, or of a level alone, they are all that is narrow."""
    ripple = {**SOUND, "room": "ripple", "products": False, "tensor_core": 0}
    filters = {**ripple, "wide_loads": 0, "narrow_loads": 36, "wide_stores": 0, "narrow_stores": 9}
    assert faults(filters) == []
    tile = {**filters, "narrow_loads": 72, "narrow_stores": 16}
    assert [fault.partition(" ")[0] for fault in faults(tile)] == ["72", "16"]


def test_rows_that_cannot_be_16_bytes_apart_may_be_read_narrowly() -> None:
    ragged = {**SOUND, "layout": "ragged", "wide_loads": 0, "narrow_loads": 9}
    assert faults(ragged) == []


def test_kernels_of_no_element_type_add_up_float32_states() -> None:
    states = {**SOUND, "configuration": "", "wide_loads": 0, "narrow_loads": 9}
    assert faults(states) == []


# ---- the table -----------------------------------------------------------------------------------


@pytest.fixture
def rows() -> list[Row]:
    def row(kernel: str, **changes: Any) -> Row:
        filled = dict.fromkeys(static.COLUMNS, 0) | SOUND
        named = {"backend": "cuda", "kernel": kernel, "head_dim": 64, "architecture": "sm_90a"}
        shape = {"threads": 128, "registers": 100, "configuration": "64", "faults": []}
        return {**filled, **named, **shape, **changes}

    return [
        row("one"),
        row("one", head_dim=128, registers=200, dynamic_shared=64 * 1024),
        row("two", spill_stores=4, faults=["spills 4 bytes"]),
        row("three", threads=None, occupancy=None, dynamic_shared=None),
    ]


def test_table_shows_ranges_worst_cases_and_faults(rows: list[Row]) -> None:
    text = static.render(rows, width=160)
    one = next(line for line in text.splitlines() if line.strip().startswith("one"))
    assert "100–200" in one
    assert "0–64" in one
    assert "FAULT cuda linear_attention two sm_90a D=64 bfloat16 aligned: spills 4 bytes" in text
    assert text.endswith("4 kernels compiled, 1 fault\n")
    assert static.render(rows, every=True, width=160).count("one") == 2


def test_files_have_every_row_and_where_it_was_made(rows: list[Row], tmp_path: Path) -> None:
    tables.write_csv(rows, static.COLUMNS, tmp_path / "new" / "static.csv")
    with (tmp_path / "new" / "static.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [r["kernel"] for r in read] == ["one", "one", "two", "three"]
    assert tuple(read[0]) == static.COLUMNS
    assert read[2]["faults"] == "spills 4 bytes"
    document = json.loads(json.dumps(static.document(rows)))
    assert document["kind"] == "static"
    assert document["schema"] == static.SCHEMA
    assert document["toolchain"]["torch"] == torch.__version__
    assert len(document["rows"]) == 4


def test_the_command_exits_with_1_where_something_is_at_fault(
    rows: list[Row], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def compile_all(**options: Any) -> list[Row]:
        asked.update(options)
        return rows

    monkeypatch.setattr(static, "compile_all", compile_all)
    assert static.main(["--arch", "sm_86", "--head-dims", "64,128", "--jobs", "1"]) == 1
    assert asked["architectures"] == ("sm_86",)
    assert asked["head_dims"] == (64, 128)
    assert set(asked["folders"]) == set(FOLDERS)
    del rows[2]
    assert static.main([]) == 0
    with pytest.raises(SystemExit):
        static.main(["--arch", "sm_75"])
    assert "unknown architecture 'sm_75'; there are sm_80" in capsys.readouterr().err


# ---- what is kept from run to run ----------------------------------------------------------------


def test_what_is_kept_is_named_by_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ripple", "cuda", "linear_attention"):
        (tmp_path / name).mkdir()
    (tmp_path / "ripple/cuda.cu").write_text("one")
    monkeypatch.setattr(launches, "path", lambda folder: tmp_path / folder)
    unit = Unit("cuda", "ripple", "sm_80", ("float32",), (64,))
    before = units.kept_in(unit)
    (tmp_path / "linear_attention/cuda.cu").write_text("another folder's")
    assert units.kept_in(unit) == before
    found = {before}
    for name in ("ripple/cuda.cu", "cuda/common.cuh", "ripple/half.cuh", "tensors.h", "layout.py"):
        (tmp_path / name).write_text("two")
        assert units.kept_in(unit) not in found
        found.add(units.kept_in(unit))
    monkeypatch.setenv("LINEAR_VIT_TUNING", str(tmp_path / "tuning.json"))
    (tmp_path / "tuning.json").write_text("{}")
    assert units.kept_in(unit) not in found


@needs_toolchain
def test_objects_are_named_by_all_that_the_build_reads() -> None:
    found = [path.resolve() for path in toolchains.CUDA.files("linear_attention")]
    names = {str(path.relative_to(launches.path("linear_attention").parent)) for path in found}
    assert {
        "linear_attention/cuda.cu",
        "linear_attention/half.cuh",
        "linear_attention/tiles.h",
        "cuda/ptx.cuh",
        "tensors.h",
    } <= names


@needs_triton
def test_a_triton_kernel_is_compiled_once_whatever_changes_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run of the same launches finds every kernel and does not ask the compiler."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    from linear_vit.bench.static.triton import compile_unit

    unit = Unit("triton", "ripple", "sm_90a", ("bfloat16",), ())
    grid = (RippleShape(1, 4, 4, 64, 0),)
    monkeypatch.setattr(RipplePool, "static_shapes", lambda *_, **__: grid)
    monkeypatch.setattr(launches, "inside", lambda folder: ("ripple_pool",))
    first = compile_unit(unit, tmp_path)
    assert {row["kernel"] for row in first} == {"_pool", "_pool_backward", "_sum_partials"}
    with monkeypatch.context() as patched:
        patched.setattr(JITFunction, "_do_compile", None)
        assert compile_unit(unit, tmp_path) == first


@needs_triton
def test_triton_is_compiled_a_dtype_and_head_dim_at_a_time() -> None:
    from linear_vit.bench.static.triton import split

    asked = Unit("triton", "linear_attention", "sm_80", ("float32", "float16"), (64, 96), True)
    parts = [(u.dtypes, u.head_dims, u.ragged) for u in split(asked)]
    dense = [((t,), (d,), False) for t in ("float32", "float16") for d in (64, 96)]
    assert parts == [*dense, (("float32",), (64,), True), (("float16",), (64,), True)]
    ripple = Unit("triton", "ripple", "sm_80", ("float32",), (64, 96))
    assert [(u.head_dims, u.ragged) for u in split(ripple)] == [((), False)]


def test_a_unit_that_was_compiled_is_not_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from linear_vit.bench.static import cuda

    row = {**SOUND, "architecture": "sm_80", "threads": 128, "registers": 64}
    row |= {"static_shared": 0, "dynamic_shared": 0}
    compiled: list[Unit] = []

    def compile_unit(unit: Unit, cache: Path) -> list[Row]:
        compiled.append(unit)
        return [dict(row)]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda, "compile_unit", compile_unit)
    unit = Unit("cuda", "ripple", "sm_80", ("float32",), (64,), ragged=True)
    first = units.compile_parts(unit)
    assert first[0]["blocks_per_multiprocessor"] == 8
    assert units.compile_parts(unit) == first
    assert compiled == [unit]


def test_a_kernel_that_nothing_launches_has_no_occupancy() -> None:
    row = {**SOUND, "architecture": "sm_80", "threads": None, "registers": 64}
    assert finished(row)["occupancy"] is None


def test_the_possible_share_of_the_copy_rate_follows_from_instructions_and_bytes() -> None:
    """By hand: 600 instructions of 8 warps, 4 a clock of 1.98 GHz; 16 KiB at 4.32 TB/s / 132."""
    row = {**SOUND, "architecture": "sm_90a", "threads": 256, "registers": 64}
    row |= {"static_shared": 0, "dynamic_shared": 0, "issue_us": None, "copy_us": None}
    found = finished(row)
    assert found["issue_us"] == pytest.approx(0.606, abs=1e-3)
    assert found["copy_us"] == pytest.approx(0.501, abs=1e-3)
    assert found["copy_share"] == pytest.approx(0.826, abs=1e-3)
    assert found["instructions_per_kib"] == 300
    assert finished({**row, "steady": 300})["copy_share"] == 1
    assert finished({**row, "loops": 0})["copy_share"] is None


# ---- what is asked for ---------------------------------------------------------------------------


def test_backends_are_the_modules_that_compile_one() -> None:
    assert set(BACKENDS) == {"cuda", "triton"}
    for backend in BACKENDS:
        assert set(launches.folders(backend)) == set(FOLDERS)


def test_operations_and_their_folders_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def compile_all(**options: Any) -> list[Row]:
        asked.append(options["folders"])
        return []

    monkeypatch.setattr(static, "compile_all", compile_all)
    for words in (["--ops", "ripple-pool,ripple_expand"], ["--room", "ripple"]):
        assert static.main(words) == 0
    assert asked == [("ripple",), ("ripple",)]
