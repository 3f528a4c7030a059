"""One top-level name, ``linear_vit``: in the wheel, beside Hugging Face's kernels, in a checkout.

Wheels are built and installed by pip without the network, from a copy of the checkout, so that no
``build/`` of an earlier one is in them.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("attention", "bench", "kernels", "reports", "training")
OWN = ("linear_vit", "train_minimal.py", "conftest.py", *PACKAGES)  # what a wheel is made of
PROJECT = ("pyproject.toml", "README.md", "LICENSE")
# Outside of a checkout, and with nothing of this one on the path.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def pip(*arguments: str | Path, cwd: Path) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)


def python(folder: Path, code: str, **environment: str) -> str:
    """What ``python -c code`` prints, started in ``folder``."""
    return run(sys.executable, "-c", code, cwd=folder, **environment)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this one's sources, with a plot and a measurement that are nobody's package."""
    folder = tmp_path_factory.mktemp("checkout")
    unwanted = shutil.ignore_patterns("__pycache__", "out", "measurements")
    for name in OWN:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=unwanted)
    for name in ("train_minimal.py", "conftest.py", *PROJECT):
        shutil.copy(ROOT / name, folder)
    for made in ("out/index.html", "measurements/gpu/page.html"):
        (folder / "reports" / made).parent.mkdir(parents=True)
        (folder / "reports" / made).touch()
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    folder = checkout.parent / "wheels"
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, checkout, cwd=checkout)
    (found,) = folder.glob("*.whl")
    return found


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


# ---- the wheel -----------------------------------------------------------------------------------


def test_the_wheel_has_one_top_level_name_and_all_sources(wheel: Path, checkout: Path) -> None:
    wanted = {"linear_vit/train_minimal.py", "linear_vit/__init__.py"}
    for package in PACKAGES:
        for path in (checkout / package).rglob("*"):
            if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".html", ".css", ".js"):
                wanted.add(f"linear_vit/{path.relative_to(checkout)}")
    wanted -= {"linear_vit/reports/out/index.html", "linear_vit/reports/measurements/gpu/page.html"}
    wanted |= {f"linear_vit/{path.name}" for path in (checkout / "linear_vit").glob("*.py")}
    assert names_in(wheel) == wanted
    for part in ("kernels/ripple/cuda.cu", "kernels/cuda/common.cuh", "kernels/cpu/simd.h"):
        assert f"linear_vit/{part}" in wanted
    for part in ("page.html", "page.css", "page.js", "vendor/d3.min.js"):
        assert f"linear_vit/reports/page/{part}" in wanted


USE = """
import linear_vit.kernels as kernels, torch
q = torch.randn(1, 2, 5, 16)
print(tuple(kernels.linear_attention(q, q, q, backend="torch").shape), kernels.__file__)
"""


@pytest.mark.slow
def test_an_installed_wheel_works_outside_of_a_checkout(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip("install", "--no-deps", "--target", installed, wheel, cwd=elsewhere)
    there = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert there == {"linear_vit", "bin"}
    said = python(elsewhere, USE, PYTHONPATH=str(installed))
    assert said.split(") ")[0] == "(1, 2, 5, 16"
    assert said.split(") ")[1].startswith(str(installed))
    tool = (installed / "bin" / "linear-vit").read_text()
    assert "from linear_vit.command import main" in tool
    sweep = ("linear_vit", "pytest", "--benchmark-only", "--dry-run", "--tokens", "64")
    listed = run(sys.executable, "-m", *sweep, cwd=elsewhere, PYTHONPATH=str(installed))
    assert "linear_attention-forward-float32-N64-torch" in listed
    for command in (
        "linear_vit.kernels build",
        "linear_vit.reports",
        "linear_vit bench check",
        "linear_vit reports models",
        "linear_vit train_minimal.py",
    ):
        module, *more = command.split()
        help_text = run(
            *(sys.executable, "-m", module, *more, "--help"),
            cwd=elsewhere,
            PYTHONPATH=str(installed),
        )
        assert help_text.startswith("usage: "), command


@pytest.mark.slow
def test_a_source_distribution_makes_the_same_wheel(
    wheel: Path, checkout: Path, tmp_path: Path
) -> None:
    """Its ``linear_vit`` has files where the checkout has links."""
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, tmp_path, cwd=checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist, cwd=tmp_path)
    (again,) = tmp_path.glob("*.whl")
    assert names_in(again) == names_in(wheel)


# ---- installed for real, in an environment of its own --------------------------------------------


class Environment:
    """A virtual environment that sees this one's packages, and pip for it."""

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.python = folder / "bin" / "python"
        site = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site = Path(run(self.python, "-c", site, cwd=folder).strip())
        (self.site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def pip(self, *arguments: str | Path) -> None:
        pip("--python", self.python, *arguments, cwd=self.site)

    def prints(self, code: str, folder: Path) -> str:
        return run(self.python, "-c", code, cwd=folder).strip()


@pytest.mark.slow
def test_an_editable_install_has_one_name(checkout: Path, tmp_path: Path) -> None:
    """As ``make install`` does it. Names of folders in the checkout are not importable."""
    environment = Environment(tmp_path / "venv")
    environment.pip("install", "--no-deps", "--no-build-isolation", "--editable", checkout)
    assert str(checkout) in environment.prints(USE, tmp_path)
    absent = (*PACKAGES, "tests", "train_minimal")
    code = f"from importlib.util import find_spec; print([find_spec(n) for n in {absent!r}])"
    assert environment.prints(code, tmp_path) == str([None] * len(absent))


THEIRS = "import kernels; print(kernels.__file__, callable(kernels.get_kernel))"


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels: Hugging Face's kernels, and what it needs."""
    folder = tmp_path_factory.mktemp("hugging_face")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), "kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"Hugging Face's kernels can't be had: {done.stderr.splitlines()[-1:]}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_hugging_faces_kernels(
    wheel: Path, hugging_face: Path, tmp_path: Path, ours_first: bool
) -> None:
    environment = Environment(tmp_path / "venv")
    ours = ("--no-deps", wheel)
    theirs = ("--no-index", "--find-links", hugging_face, "kernels")
    for what in (ours, theirs) if ours_first else (theirs, ours):
        environment.pip("install", "--quiet", *what)
    both = environment.prints(
        THEIRS
        + USE.replace("as kernels", "as ours")
        .replace("kernels.l", "ours.l")
        .replace("kernels.__", "ours.__"),
        tmp_path,
    ).splitlines()
    assert both[0] == f"{environment.site / 'kernels' / '__init__.py'} True"
    assert both[1].endswith(str(environment.site / "linear_vit" / "kernels" / "__init__.py"))
    environment.pip("uninstall", "--quiet", "--yes", "linear-vit-kernels")
    assert environment.prints(THEIRS, tmp_path) == both[0]


# ---- a checkout that nobody installed ------------------------------------------------------------

SHORT_NAMES = """
import kernels, kernels.build, linear_vit.kernels, linear_vit.kernels.build, sys, torch
from kernels.linear_attention import operators, torch as backend, triton
from linear_vit.kernels.linear_attention import operators as same_operators, torch as same_backend
import kernels.ripple.torch, linear_vit.kernels.ripple.torch
assert kernels is linear_vit.kernels and kernels.build is linear_vit.kernels.build
assert backend is same_backend and operators is same_operators
assert kernels.ripple.torch is linear_vit.kernels.ripple.torch
twice = [n for n, m in sys.modules.items() if n.partition(".")[0] == "kernels"
         and m is not sys.modules["linear_vit." + n]]
assert not twice, twice
print(kernels.linear_attention(*[torch.ones(1, 1, 3, 4)] * 3).sum().item())
"""


@pytest.mark.parametrize("first", ["", "import linear_vit.attention\n"], ids=["short", "long"])
def test_the_short_name_is_the_same_package(first: str) -> None:
    """Whichever is imported first. An operator that is defined twice raises."""
    assert float(python(ROOT, first + SHORT_NAMES)) == pytest.approx(12, abs=1e-3)


@pytest.mark.slow
def test_the_type_checker_follows_the_imports(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed: pip install '.[dev]'")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from linear_vit.kernels import default_backend\nbackend: int = default_backend('x', 1)\n"
    )
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(wrong)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert 'has type "str", variable has type "int"' in done.stdout, done.stdout + done.stderr
