"""Runs in a store, at a URL: as in a folder, whatever fails meanwhile, and never two in one."""

import errno
import itertools
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from linear_vit import train_minimal
from linear_vit.training import board, cluster, leases, runs
from linear_vit.training.checkpoints import load_checkpoint
from linear_vit.training.errors import UserError
from linear_vit.training.leases import Lease
from linear_vit.training.record import InUse, followers
from linear_vit.training.runs import Stored
from tests.processes import python
from tests.training.conftest import take_few
from tests.training.test_resume import fingerprint

open_board = board.open_board
TWO = ["ablate", "--recipe=light", "--dim=8", "--depth=1", "--heads=1", "--backend=torch"]
TWO += ["--device=cpu", "--attention_type=linear", "--dropout=0.1,0.2", "--seeds=1", "--seconds=0"]
TWO += ["--epochs=2", "--batch_size=32"]  # 5 steps an epoch


class Failing(LocalFileSystem):
    """A local folder as a store that fails as it is told to, at ``failing://``."""

    protocol = "failing"
    put: Callable[[str, str], None] | None = None  # called before a file is put
    opened: Callable[[str, str], str] | None = None  # what mode a file of a path is opened in
    asked: Callable[[str], None] | None = None  # called before it does one of ls and rm

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return LocalFileSystem._strip_protocol(str(path).removeprefix("failing://"))

    def put_file(self, path1: str, path2: str, *_: Any, **given: Any) -> None:
        if Failing.put is not None:
            Failing.put(path1, path2)
        super().put_file(path1, path2, **given)

    def ls(self, *given: Any, **more: Any) -> Any:
        if Failing.asked is not None:
            Failing.asked("ls")
        return super().ls(*given, **more)

    def rm_file(self, path: str) -> None:
        if Failing.asked is not None:
            Failing.asked("rm")
        super().rm_file(path)

    def _open(self, path: str, mode: str = "rb", *_: Any, **given: Any) -> Any:
        mode = mode if Failing.opened is None else Failing.opened(path, mode)
        return super()._open(path, mode, **given)


@pytest.fixture(autouse=True)
def stores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, few_digits: None
) -> Iterator[pytest.MonkeyPatch]:
    """A working folder, temporary files and a store in memory of one's own."""
    fsspec.register_implementation("failing", Failing, clobber=True)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    # A process's first optimizer asks for this folder, among the temporary ones if need be.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    yield monkeypatch
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    Failing.put = Failing.opened = Failing.asked = None


def main(url: str, tmp_path: Path, *more: str) -> int:
    return train_minimal.main([*TWO, *more, f"--runs={url}", f"--out={tmp_path / 'out'}"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the runs leave in a folder."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        take_few(patch)
        assert main(str(folder / "runs"), folder) == 0
    return {run.name: fingerprint(run) for run in (folder / "runs").iterdir()}


def there(url: str, tmp_path: Path) -> dict[str, Any]:
    """What the runs left in a store."""
    fs, root = fsspec.url_to_fs(url)
    copy = tmp_path / f"copy-{time.monotonic_ns()}"
    fs.get(root, str(copy), recursive=True)
    return {path.parent.name: fingerprint(path.parent) for path in copy.glob("*/run.json")}


def nothing_trains(patch: pytest.MonkeyPatch) -> None:
    def step(*_: Any, **__: Any) -> None:
        pytest.fail("it was trained again")

    patch.setattr(train_minimal, "training_step", step)


def sleeping(patch: pytest.MonkeyPatch) -> list[float]:
    """The seconds slept through by who waits for a lease, of which the third takes an hour."""
    slept = list[float]()

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(hours=len(slept) > 2)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert len(slept) < 9

    patch.setattr(leases, "datetime", Later)
    patch.setattr(leases, "sleep", sleep)
    return slept


# --- as in a folder -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_runs_in_a_store_are_those_in_a_folder(
    kind: str,
    tmp_path: Path,
    whole: dict[str, Any],
    stores: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = {"file": f"file://{tmp_path}/deep/runs/", "memory": "memory://runs"}[kind]
    assert main(url, tmp_path) == 0
    assert there(url, tmp_path) == whole
    first = capsys.readouterr().out
    nothing_trains(stores)
    assert main(url, tmp_path) == 0
    again = capsys.readouterr()
    assert f"2 of 2 runs recorded in {url.rstrip('/')}\n" in again.out
    assert first.split("Dropout of")[1] == again.out.split("Dropout of")[1]
    assert "linear-vit-" not in first + again.out + again.err
    assert list((tmp_path / "scratch").iterdir()) == []


def test_steps_are_timed_once_for_a_table_in_a_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*TWO[1:6], "--device=cpu", "--epochs=1", "--models=linear", "--seeds=1"]
    options += ["--runs=memory://runs", f"--out={tmp_path / 'out'}"]
    for said in (True, False):
        assert train_minimal.main(["table", *options, "--seconds=0.01"]) == 0
        assert ("training steps of linear, by turns" in capsys.readouterr().out) == said
    table = (tmp_path / "out" / "table.csv").read_bytes()
    assert train_minimal.main(["table", *options, "--no-run"]) == 0
    assert (tmp_path / "out" / "table.csv").read_bytes() == table
    left = [path.rpartition("/")[2] for path in MemoryFileSystem.store]
    assert len([name for name in left if name.startswith("steps-")]) == 1
    assert {name for name in left if not name.startswith("steps-")} == {
        *("run.json", "last.pt", "best.pt", ".lease-1"),
    }


_KILLED = """
import itertools, os, signal, sys, pytest
from linear_vit import train_minimal
from tests.training.conftest import take_few
take_few(pytest.MonkeyPatch())
step, count = train_minimal.training_step, itertools.count()
def killing(*arguments, **given):
    if next(count) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments, **given)
train_minimal.training_step = killing
train_minimal.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_when_its_lease_has_ended(
    tmp_path: Path,
    whole: dict[str, Any],
    stores: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, out = f"file://{tmp_path}/runs", f"--out={tmp_path / 'out'}"
    scratch = {"TMPDIR": str(tmp_path / "scratch")}
    killed = python("-c", _KILLED, *TWO, f"--runs={url}", out, OMP_NUM_THREADS="1", **scratch)
    assert killed.returncode == -9, killed.stderr
    waited = sleeping(stores)
    assert main(url, tmp_path) == 0
    assert len(waited) == 3
    said = capsys.readouterr().err
    assert re.search(rf"has begun to train in {url}/digits-\S+ \(\S+, process \d+\): waiting", said)
    assert there(url, tmp_path) == whole
    found = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/run.json")]
    assert sorted(run["resumed"] for run in found) == [0, 1]


def test_an_interrupted_command_goes_on_at_once(
    tmp_path: Path,
    whole: dict[str, Any],
    stores: pytest.MonkeyPatch,
    stop_at: Callable[[int, BaseException], None],
) -> None:
    stores.setattr(board, "open_board", open_board)
    stop_at(8, KeyboardInterrupt())
    assert main("memory://runs", tmp_path) == 130
    found = {path.rpartition("/")[2]: path for path in MemoryFileSystem.store}
    record = json.loads(MemoryFileSystem.store[found["run.json"]].getvalue())
    assert record["status"] == "interrupted"
    assert any(name.startswith("events.out.tfevents.") for name in found)
    assert (followers, list((tmp_path / "scratch").iterdir())) == ([], [])
    assert main("memory://runs", tmp_path, "--seconds=0.01") == 0
    assert "/runs/steps-dropout.json" in MemoryFileSystem.store
    assert there("memory://runs", tmp_path) == whole


# --- who may train --------------------------------------------------------------------------------


def lease(folder: Path, owner: str = "me") -> Lease:
    return Lease(fsspec.filesystem("file"), str(folder), f"file://{folder}", owner)


@pytest.fixture
def ends() -> Iterator[list[Lease]]:
    """Leases to end after a test."""
    held: list[Lease] = []
    yield held
    for one in held:
        one.end()


def half_an_hour() -> str:
    return json.dumps({"until": (datetime.now(UTC) + timedelta(minutes=30)).isoformat()})


@pytest.mark.parametrize("content", [half_an_hour, str])  # nothing: its writer died in the midst
def test_a_dead_lease_is_taken_over_after_its_end_and_not_before(
    content: Callable[[], str], tmp_path: Path, stores: pytest.MonkeyPatch, ends: list[Lease]
) -> None:
    (tmp_path / ".lease-3").write_text(content())
    waited = sleeping(stores)
    ends.append(lease(tmp_path))
    assert len(waited) == 3
    ends[0].check()
    assert [path.name for path in tmp_path.glob(".lease-*")] == [".lease-4"]


def test_a_living_lease_is_not_taken_over(tmp_path: Path, ends: list[Lease]) -> None:
    ends.append(lease(tmp_path))
    with pytest.raises(InUse, match=r"is training in file://\S+ \(\S+, process \d+\): wait for it"):
        lease(tmp_path, "another")
    ends.pop().end()
    ends.append(lease(tmp_path, "another"))
    ends[0].check()
    assert [path.name for path in tmp_path.glob(".lease-*")] == [".lease-2"]


def test_a_lease_is_renewed_while_its_process_lives(tmp_path: Path, ends: list[Lease]) -> None:
    ends.append(lease(tmp_path))
    path = tmp_path / ".lease-1"
    first = path.read_bytes()
    end = time.monotonic() + 20
    while path.read_bytes() in (first, b""):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_that_is_begun_again_needs_not_wait_for_itself(
    tmp_path: Path, ends: list[Lease]
) -> None:
    ends += [lease(tmp_path), lease(tmp_path)]
    ends[1].check()
    with pytest.raises(UserError):
        ends[0].check()


def test_a_lease_that_somebody_deleted_is_no_longer_held(tmp_path: Path, ends: list[Lease]) -> None:
    """The next one has its number, and is not written over."""
    ends.append(lease(tmp_path))
    (tmp_path / ".lease-1").unlink()
    with pytest.raises(UserError, match=r"has lost its \.lease-1, .*: somebody has deleted it"):
        ends[0].check()
    ends.append(lease(tmp_path, "another"))
    with pytest.raises(UserError, match="another process has taken over"):
        ends[0].check()
    ends.pop(0).end()
    ends[0].check()
    with pytest.raises(InUse):
        lease(tmp_path)


def test_a_lease_that_can_not_be_begun_is_not_held(
    tmp_path: Path, stores: pytest.MonkeyPatch, ends: list[Lease]
) -> None:
    stores.setattr(leases, "sleep", lambda _: pytest.fail("it waits for itself"))
    (tmp_path / ".lease-3").write_text('{"until": "2026-01-01T00:00:00+00:00"}')
    store = fsspec.filesystem("failing")

    def deny(what: str) -> None:
        if what == "rm":
            raise PermissionError("you have no right to delete")

    Failing.asked = staticmethod(deny)
    with pytest.raises(PermissionError, match="no right to delete"):
        Lease(store, str(tmp_path), "failing://", "me")
    assert (tmp_path / ".lease-4").exists()
    ends.append(lease(tmp_path, "another"))


def test_a_store_that_hangs_does_not_keep_a_run_from_its_end(
    tmp_path: Path, stores: pytest.MonkeyPatch
) -> None:
    stores.setattr(leases, "_PATIENCE_S", 0.05)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(_: str) -> None:
        hangs.set()
        assert goes_on.wait(20)

    held = Lease(fsspec.filesystem("failing"), str(tmp_path), "failing://", "me")
    Failing.asked = staticmethod(hang)
    assert hangs.wait(20)
    held.end()
    goes_on.set()
    held._renewing.join()
    assert (tmp_path / ".lease-1").exists()


@pytest.mark.parametrize("before", [None, b"", b'{"until": "2026-01-01T00:00:00+00:00"}'])
def test_of_many_at_once_one_gets_the_lease(
    before: bytes | None, tmp_path: Path, ends: list[Lease]
) -> None:
    if before is not None:
        (tmp_path / ".lease-7").write_bytes(before)
        os.utime(tmp_path / ".lease-7", (0, 0))
    barrier, refused = threading.Barrier(8), []

    def begin(number: int) -> None:
        barrier.wait()
        try:
            ends.append(lease(tmp_path, str(number)))
        except InUse as error:
            refused.append(error)

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(ends), len(refused)) == (1, 7)


def test_two_commands_at_once_are_kept_apart(
    tmp_path: Path, stores: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is given while the first trains."""
    step, codes, url = train_minimal.training_step, list[int](), f"file://{tmp_path}/runs"

    def both(*arguments: Any, **given: Any) -> Any:
        if not codes:
            codes.append(0)
            with stores.context() as patch:
                nothing_trains(patch)
                codes[0] = main(url, tmp_path)
        return step(*arguments, **given)

    stores.setattr(train_minimal, "training_step", both)
    assert main(url, tmp_path) == 0
    assert codes == [2]
    assert list((tmp_path / "scratch").iterdir()) == []
    assert f"another process is training in {url}/" in capsys.readouterr().err


def test_a_folder_and_its_url_are_kept_apart(
    tmp_path: Path, stores: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, codes = train_minimal.training_step, list[int]()
    ways = [str(tmp_path / "runs"), f"file://{tmp_path}/runs"]

    def both(*arguments: Any, **given: Any) -> Any:
        if len(codes) < 1 + len(trained):
            codes.append(0)
            with stores.context() as patch:
                nothing_trains(patch)
                codes[-1] = main(ways[len(codes) - 1], tmp_path)
        return step(*arguments, **given)

    stores.setattr(train_minimal, "training_step", both)
    trained: list[int] = []
    for way in reversed(ways):
        assert main(way, tmp_path) == 0
        trained.append(0)
        for run in (tmp_path / "runs").glob("*/*.*"):
            run.unlink()
    assert codes == [2, 2]
    assert capsys.readouterr().err.count("another process is training in") == 2


def test_a_run_that_was_taken_over_writes_nothing_more(
    tmp_path: Path, stores: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, seen = f"file://{tmp_path}/runs", dict[Path, bytes]()
    original = train_minimal.training_step

    def step(*arguments: Any, **given: Any) -> Any:
        if not seen and (found := list((tmp_path / "runs").glob("*/run.json"))):
            other = {"owner": "another", "until": datetime.max.replace(tzinfo=UTC).isoformat()}
            (found[0].parent / ".lease-2").write_text(json.dumps(other))
            seen.update({p: p.read_bytes() for p in found[0].parent.iterdir() if p.suffix})
        return original(*arguments, **given)

    stores.setattr(train_minimal, "training_step", step)
    assert main(url, tmp_path) == 2
    assert "another process has taken over" in capsys.readouterr().err
    assert len(seen) == 3
    assert all(path.read_bytes() == content for path, content in seen.items())
    assert list((tmp_path / "scratch").iterdir()) == []


# --- what fails -----------------------------------------------------------------------------------


def explode(patch: pytest.MonkeyPatch) -> None:
    """The eighth step meets weights that are no numbers."""
    original, count = train_minimal.training_step, itertools.count(1)

    def exploding(model: Any, *arguments: Any, **given: Any) -> Any:
        if next(count) == 8:
            torch.nn.init.constant_(model.head.weight, float("inf"))
        return original(model, *arguments, **given)

    patch.setattr(train_minimal, "training_step", exploding)


def refuse(*_: Any) -> Any:
    raise PermissionError("you have no right to write")


@pytest.mark.parametrize(
    ("opened", "said"),
    [
        (refuse, "cannot write failing://{}/runs: you have no right to write; see whether the"),
        (lambda _, mode: mode.replace("x", "w"), "can't refuse to write a file that is there"),
    ],
)
def test_a_store_that_can_not_be_used_is_told_before_anything_is_trained(
    opened: Any,
    said: str,
    tmp_path: Path,
    stores: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nothing_trains(stores)
    Failing.opened = staticmethod(opened)
    assert main(f"failing://{tmp_path}/runs", tmp_path) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said.format(tmp_path) in line
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nowhere://bucket/runs", "--runs nowhere://bucket/runs: Protocol not known: nowhere"),
        ("s3://bucket/runs", "--runs s3://bucket/runs: Install s3fs to access S3 (with pip, on"),
        ("file:///nowhere/runs", "cannot write file:///nowhere/runs: No such file or directory"),
    ],
)
def test_a_url_that_leads_nowhere_is_told_in_a_line(
    url: str,
    said: str,
    tmp_path: Path,
    stores: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stores.setitem(sys.modules, "s3fs", None)
    assert main(url, tmp_path) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://", "--runs memory://: after :// name a folder of the store"),
        ("file:///", "--runs file:///: after :// name a folder of the store"),
        ("memory://runs [1]", "--runs memory://runs [1]: [ means more to fsspec than a character"),
        ("simplecache::memory://runs", ":: means more to fsspec than a character of a name"),
        ("s4://me:secret@host/runs", "--runs s4://me@host/runs: Protocol not known: s4"),
    ],
)
def test_a_url_of_no_folder_is_refused(
    url: str, said: str, tmp_path: Path, stores: pytest.MonkeyPatch, capsys: Any
) -> None:
    nothing_trains(stores)
    stores.chdir(tmp_path)
    assert main(url, tmp_path) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert "secret" not in line
    assert not list(tmp_path.glob("*mem*"))


def test_a_table_of_a_store_without_runs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"--out={tmp_path / 'out'}"
    assert train_minimal.main(["table", "--no-run", "--runs=memory://nope", out]) == 2
    assert "no run records in memory://nope; leave out --no-run" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("table.*"))


def test_a_password_is_not_shown(
    tmp_path: Path, stores: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    explode(stores)
    assert main("memory://me:secret@host/runs", tmp_path) == 2
    said = "".join(capsys.readouterr())
    [record] = [p for p in MemoryFileSystem.store if p.endswith("run.json")]
    said += MemoryFileSystem.store[record].getvalue().decode()
    assert said.count("memory://me@host/runs/digits-") >= 2
    assert "secret" not in said


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_store_may_refuse_in_a_way_of_its_own(number: int, tmp_path: Path) -> None:
    """s3fs, of a store that does not say which condition did not hold."""

    def refusing(path: str, mode: str) -> str:
        if "x" in mode and Path(path).exists():
            raise OSError(number, "At least one of the pre-conditions you specified did not hold")
        return mode

    Failing.opened = staticmethod(refusing)
    Stored(f"failing://{tmp_path}/runs", tmp_path / "copy").check()
    assert list((tmp_path / "runs").iterdir()) == []


def test_other_folders_are_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_minimal.main([*TWO, "--out=s3://bucket/out"])
    assert "'s3://bucket/out' is no folder of this machine" in capsys.readouterr().err


def dead(*_: Any) -> None:
    raise OSError("the line is dead")


@pytest.mark.parametrize("before", [True, False])
def test_nothing_is_lost_where_a_file_does_not_get_there(
    before: bool, tmp_path: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second last.pt breaks off in its middle, or the store is out of reach before it."""
    puts, beside = list[str](), set[str]()

    def put(path: str, to: str) -> None:
        puts.append(Path(path).name)
        assert to not in beside  # who was stopped while he wrote one, and goes on, disturbs nobody
        beside.add(to)
        if before and puts.count("last.pt") == 1 and puts[-1] == "best.pt":
            Failing.asked = staticmethod(dead)
        if puts.count("last.pt") == 2 and puts[-1] == "last.pt":
            Path(to).write_bytes(Path(path).read_bytes()[:999])
            dead()

    Failing.put = staticmethod(put)
    url = f"failing://{tmp_path}/runs"
    assert main(url, tmp_path) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    [out] = (tmp_path / "runs").glob("digits-*")
    assert f"cannot write {url}/{out.name}/last.pt: the line is dead; see whether" in said
    [left] = (tmp_path / "scratch").iterdir()
    assert f"this run's newest files are in {left} of " in said
    steps = [load_checkpoint(folder / "last.pt")["step"] for folder in (out, left / out.name)]
    assert steps == [5, 10]
    record = json.loads((out / "run.json").read_text())
    assert (record["status"], len(record["epochs"])) == ("failed", 2)
    assert f"{url}/{out.name}/last.pt" in record["error"]
    assert main(url, tmp_path) == 0
    assert there(url, tmp_path) == whole


def test_what_a_failed_run_goes_back_to_is_named_by_its_url(
    tmp_path: Path, stores: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    explode(stores)
    url = f"file://{tmp_path}/runs"
    assert main(url, tmp_path) == 2
    [path] = (tmp_path / "runs").glob("*/run.json")
    last = f"the last good checkpoint is {url}/{path.parent.name}/last.pt (step 5)"
    assert last in capsys.readouterr().err
    assert last in json.loads(path.read_text())["error"]


def test_a_damaged_checkpoint_is_named_by_its_url(
    tmp_path: Path,
    stop_at: Callable[[int, BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_at(8, KeyboardInterrupt())
    url = f"file://{tmp_path}/runs"
    assert main(url, tmp_path) == 130
    [last] = (tmp_path / "runs").glob("*/last.pt")
    last.write_bytes(last.read_bytes()[:5000])
    assert main(url, tmp_path) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{url}/{last.parent.name}/last.pt is not a readable checkpoint" in said
    last.unlink()
    assert main(url, tmp_path) == 0


# --- other processes ------------------------------------------------------------------------------


def test_how_far_runs_are_is_asked_now_and_then(tmp_path: Path, stores: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "copy").mkdir()
    path = tmp_path / "runs" / "one" / "run.json"
    stored = Stored(f"file://{tmp_path}/runs", tmp_path / "copy")

    def look(epochs: int) -> int:
        path.write_text(json.dumps({"status": "running", "epochs": [{}] * epochs}))
        stored.look(["one", "none yet"])
        return cluster._epochs(stored.folder / "one")

    assert [look(1), look(2)] == [1, 1]
    stores.setattr(runs, "_LOOK_S", 0.0)
    assert look(3) == 3
