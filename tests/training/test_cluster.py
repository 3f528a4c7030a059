"""Runs of a table or an ablation on a Ray cluster: as on one machine, whatever dies meanwhile."""

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from linear_vit import train_minimal
from linear_vit.training import cluster
from linear_vit.training.config import Config, resolve
from linear_vit.training.data import datasets
from linear_vit.training.errors import UserError
from linear_vit.training.leases import Lease
from linear_vit.training.record import lock, same_machine, unlock
from linear_vit.training.runs import Runs
from tests.clusters import Commands, ended, until
from tests.processes import python
from tests.training.test_resume import fingerprint

# Runs of a few seconds, that are hit in their midst.
TINY = ["--recipe=light", "--dim=8", "--depth=1", "--heads=1", "--backend=torch", "--device=cpu"]
TWO = ["ablate", *TINY, "--attention_type=linear", "--dropout=0.1,0.2", "--seeds=1", "--seconds=0"]
TWO += ["--epochs=30", "--batch_size=32"]


def train(folder: Path, *more: str, store: str = "") -> list[str]:
    """The command, with its runs below the folder's runs/, as a folder or in a ``store``."""
    where = [f"--runs={store}{folder / 'runs'}", f"--out={folder / 'out'}"]
    return ["train_minimal.py", *TWO, *more, *where]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs as one machine leaves them, without a cluster."""
    folder = tmp_path_factory.mktemp("whole")
    done = python(*train(folder), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return folder / "runs"


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """What is recorded of each run, by its folder's name."""
    found = {}
    for path in folder.glob("*/run.json"):
        found[path.parent.name] = json.loads(path.read_text())
    return found


def under_way(folder: Path, resumed: int = 0) -> list[str]:
    """Runs that have done a few epochs, and have not ended."""
    return [
        name
        for name, run in records(folder).items()
        if (run["status"], run["resumed"]) == ("running", resumed) and len(run["epochs"]) >= 2
    ]


def check_same(folder: Path, whole: Path) -> None:
    there, wanted = records(folder), records(whole)
    assert there.keys() == wanted.keys()
    for name, run in wanted.items():
        assert fingerprint(folder / name) == fingerprint(whole / name)
        assert same_machine(there[name]["environment"], run["environment"])


@pytest.mark.slow
@pytest.mark.parametrize("store", ["", "file://"])
def test_a_killed_worker_is_replaced_and_its_run_goes_on(
    store: str, commands: Commands, tmp_path: Path, whole: Path
) -> None:
    driver = commands.start(*train(tmp_path, "--cluster", store=store))
    victim = until(lambda: under_way(tmp_path / "runs"))[0]
    [pid] = commands.left(f"ray::{victim}")
    os.kill(pid, signal.SIGKILL)
    code, out, err = ended(driver)
    assert code == 0, err
    assert "[2/2 " in out
    check_same(tmp_path / "runs", whole)
    resumed = {name: run["resumed"] for name, run in records(tmp_path / "runs").items()}
    assert resumed.pop(victim) == 1
    assert set(resumed.values()) == {0}
    # It needs no cluster now.
    code, out, _ = ended(commands.start(*train(tmp_path, "--cluster", store=store)))
    assert (code, "2 of 2 runs recorded" in out, "[1/" in out) == (0, True, False)


@pytest.mark.slow
def test_a_killed_or_interrupted_command_goes_on_when_given_again(
    commands: Commands, tmp_path: Path, whole: Path
) -> None:
    folder = tmp_path / "runs"
    for resumed, how in enumerate((signal.SIGKILL, signal.SIGINT)):
        driver = commands.start(*train(tmp_path, "--cluster"))
        going = until(functools.partial(under_way, folder, resumed=resumed))
        driver.send_signal(how)
        code, _, err = ended(driver)
        commands.wait_for_none("ray::digits")  # nothing trains any more
        assert code == (130 if how == signal.SIGINT else -how), err
    assert {records(folder)[name]["status"] for name in going} == {"interrupted"}
    assert ended(commands.start(*train(tmp_path, "--cluster")))[0] == 0
    check_same(folder, whole)


@pytest.mark.slow
def test_a_run_that_fails_by_itself_is_told_and_not_tried_again(
    commands: Commands, tmp_path: Path
) -> None:
    varied = [
        *TINY,
        "--attention_type=linear",
        "--weight_decay=1e8,0.05",
        "--seeds=1",
        "--epochs=1",
    ]
    where = [f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}", "--cluster"]
    code, out, err = ended(commands.start("train_minimal.py", "ablate", *varied, *where))
    assert code == 2
    assert "1 of 2 runs failed; the others are recorded" in err
    assert "the loss or its gradient became nan" in err
    ends = {run["config"]["weight_decay"]: run for run in records(tmp_path / "runs").values()}
    assert (ends[1e8]["status"], ends[1e8]["resumed"]) == ("failed", 0)
    assert ends[0.05]["status"] == "finished"
    folder = tmp_path / "runs" / Config(**ends[1e8]["config"]).run_name
    assert f"digits linear seed 0 in {folder}: the loss or its gradient became nan" in out


def held(folder: Path, store: str) -> Callable[[], None]:
    """Has a run's folder as if it was being trained in, until what is returned is called."""
    if store:
        return Lease(fsspec.filesystem("file"), str(folder), store, "another").end
    folder.mkdir(parents=True)
    return functools.partial(unlock, lock(folder))


@pytest.mark.slow
@pytest.mark.parametrize("store", ["", "file://"])
def test_two_commands_share_a_folder(
    store: str, commands: Commands, tmp_path: Path, whole: Path
) -> None:
    mine = next(iter(records(whole)))
    let_go = held(tmp_path / "runs" / mine, store)
    try:
        both = [commands.start(*train(tmp_path, "--cluster", store=store)) for _ in range(2)]
        ends = [ended(driver) for driver in both]
    finally:
        let_go()
    for code, out, err in ends:
        assert "left to another process, which is training it" in out
        # The other one may have trained the other run, so that there was nothing to tell.
        assert code == 0 or "no finished run of dropout" in err
    assert 0 in [code for code, _, _ in ends]
    assert len(records(tmp_path / "runs")) == 1
    assert ended(commands.start(*train(tmp_path, "--cluster", store=store)))[0] == 0
    check_same(tmp_path / "runs", whole)
    assert {run["resumed"] for run in records(tmp_path / "runs").values()} == {0}


@pytest.mark.slow
def test_a_node_that_is_lost_is_done_without(
    commands: Commands, tmp_path: Path, whole: Path
) -> None:
    with commands.cluster() as ray:
        other = ray.add_node(num_cpus=1)
        driver = commands.start(*train(tmp_path, "--cluster", ray.address))
        until(lambda: len(under_way(tmp_path / "runs")) == 2)  # one on each
        ray.remove_node(other, allow_graceful=False)
        code, _, err = ended(driver)
    assert code == 0, err
    check_same(tmp_path / "runs", whole)
    assert sorted(run["resumed"] for run in records(tmp_path / "runs").values()) == [0, 1]


def stub(
    runs: Runs, workers: int | None, config: Config, data: datasets.Dataset, device: torch.device
) -> dict[str, Any]:
    """Next to no training: a step's worth of arithmetic on the data that came."""
    found = torch.randn(64, 64) @ torch.randn(64, 64)
    (runs.folder / config.run_name).write_text(str(len(data.train.labels)))
    return {"test_accuracy": float(found.isfinite().float().mean()), "seconds": 0.0}


_THOUSAND = """
import sys, torch
from pathlib import Path
from linear_vit.training import cluster
from linear_vit.training.config import resolve
from linear_vit.training.data import datasets
from linear_vit.training.runs import Runs
configs = [resolve({"dataset": "digits", "seed": seed}) for seed in range(1000)]
runs = Runs(Path(sys.argv[1]))
cluster.train_all(
    "tests.training.test_cluster:stub", configs, datasets.load_once, runs, torch.device("cpu"),
    address="local",
)
"""


@pytest.mark.slow
def test_a_thousand_runs_go_through_in_one_call(commands: Commands, tmp_path: Path) -> None:
    code, out, err = ended(commands.start("-c", _THOUSAND, str(tmp_path)))
    assert code == 0, err
    assert "[1000/1000 " in out
    images = [path.read_text() for path in tmp_path.iterdir()]
    assert (len(images), len(set(images))) == (1000, 1)


def test_nodes_of_another_kind_get_no_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = cluster.environment(torch.device("cpu"))
    said = {"a": here, "b": {**here, "cpu": "Abacus"}, "c": ImportError("No module linear_vit")}
    nodes = [{"NodeID": name, "NodeManagerHostname": f"node-{name}"} for name in said]
    monkeypatch.setattr(cluster.cluster, "nodes", lambda _: nodes)
    monkeypatch.setattr(cluster.cluster, "ask", lambda *_, of: [said[n["NodeID"]] for n in of])
    monkeypatch.setattr(cluster, "notice", lambda text: print(text))
    assert cluster._alike(None, torch.device("cpu")) == (nodes[:1], {"ray.io/node-id": "in(a)"})
    told = capsys.readouterr().out
    assert f"node node-b: cpu Abacus (here: {here['cpu']})" in told
    assert "node node-c: No module linear_vit" in told
    del said["a"], nodes[0]
    with pytest.raises(UserError, match="no node of the cluster is like this machine"):
        cluster._alike(None, torch.device("cpu"))


def test_a_run_asks_for_the_cores_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Resources": {"CPU": 8.0, "GPU": 2.0}}
    light, strong = (resolve({"recipe": recipe}) for recipe in ("light", "strong"))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    asked = [
        cluster._needs(light, cpu, 3, [node]),
        cluster._needs(strong, cpu, 3, [node]),
        cluster._needs(strong, cpu, 30, [node]),
        cluster._needs(strong, cuda, 3, [node]),
    ]
    assert [one["num_cpus"] for one in asked] == [2, 5, 8, 4]
    assert [one["num_gpus"] for one in asked] == [0, 0, 0, 1]
    assert [cluster._room([node, node], one) for one in asked] == [8, 2, 2, 4]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--cluster=nonsense"], "'nonsense' is no address; take HOST:PORT of the head node"),
        (["--cluster=ray://host:10001"], "'ray://host:10001' is no address"),
        (["--cluster=127.0.0.1:1"], "--cluster 127.0.0.1:1: nothing answers there"),
    ],
)
@pytest.mark.usefixtures("few_digits")
def test_a_wrong_address_is_told_at_once(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    where = [f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
    assert train_minimal.main([*TWO, *where, *more]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("few_digits")
def test_absent_ray_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    where = [f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
    assert train_minimal.main([*TWO, *where, "--cluster"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert "--cluster needs Ray: pip install '.[ray]'" in told[-1]


def test_ray_is_imported_for_a_cluster_alone_and_fsspec_for_a_url() -> None:
    code = (
        "import sys, linear_vit.train_minimal; sys.exit(bool({'ray', 'fsspec'} & set(sys.modules)))"
    )
    assert python("-c", code, fresh=True).returncode == 0
