"""``pytest --benchmark-only --cluster``: one run a kind of device, each alone on its node."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from linear_vit import options
from linear_vit.bench import cluster
from linear_vit.bench.instruments.machine import cpu_model
from tests.clusters import Commands, ended
from tests.processes import PLUGINS
from tests.processes import pytest as run_pytest

BENCHMARK = ["-m", "pytest", *PLUGINS, "--benchmark-only", "--device=cpu", "--tokens=64"]
BENCHMARK += ["--ops=linear_attention", "--backends=torch"]

# The cores of both nodes are held, then those of one.
_HELD = """
import sys
from linear_vit import cluster
from linear_vit.bench.cluster import alone

class Other:
    def is_there(self):
        return True

with cluster.joined(sys.argv[1]) as ray:
    nodes = cluster.nodes(ray)
    other = ray.remote(num_cpus=1)(Other)
    held = [other.options(**cluster.on(node)).remote() for node in nodes]
    ray.get([one.is_there.remote() for one in held])
    print(alone(ray, nodes, 20))
    ray.kill(held[1])
    node, _ = alone(ray, nodes, 120)
    print(node["NodeID"] == nodes[1]["NodeID"])
    print(alone(ray, nodes, 5))  # now it is ours
"""


@pytest.mark.slow
def test_each_kind_is_measured_alone(commands: Commands, tmp_path: Path) -> None:
    with commands.cluster() as ray:
        ray.add_node(num_cpus=1)
        where = ["--cluster", ray.address, f"--out={tmp_path / 'out'}"]
        code, out, err = ended(commands.start(*BENCHMARK, *where))
        assert code == 0, out + err
        code, held, err = ended(commands.start("-c", _HELD, ray.address))
        assert code == 0, err
    [path] = (tmp_path / "out").iterdir()
    assert (
        path.name == f"benchmark.{re.sub('[^a-z0-9]+', '-', cpu_model().lower()).strip('-')}.json"
    )
    assert f"{cpu_model()}: measuring on" in out
    assert f"{cpu_model()}: 1 file written: {path}" in out
    assert "2 passed" in out
    run = json.loads(path.read_text())
    assert len(run["benchmarks"]) == 2
    assert run["kernel_suite"]["machine"]["threads"] == 1  # as the command was told, not by Ray
    assert held.splitlines() == ["None", "True", "None"]


def test_a_kind_is_a_name_of_a_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"a": "H200", "b": "Xeon", "c": options.OptionError("no CUDA device"), "d": "H200"}
    nodes = [{"NodeID": name, "NodeManagerHostname": f"node-{name}"} for name in said]
    monkeypatch.setattr(cluster.cluster, "nodes", lambda _: nodes)
    monkeypatch.setattr(cluster.cluster, "ask", lambda *_, of: [said[n["NodeID"]] for n in of])
    a, b, _, d = nodes
    assert cluster._kinds(None, None) == {"H200": [a, d], "Xeon": [b]}
    assert "node node-c is left out: no CUDA device" in capsys.readouterr().out
    said = dict.fromkeys(said, options.OptionError("no CUDA device"))
    with pytest.raises(options.OptionError, match="there is no node to measure on"):
        cluster._kinds(None, None)


def test_a_kind_without_a_free_node_is_refused(
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster, "alone", lambda *_: None)
    ray = SimpleNamespace(remote=lambda **_: lambda function: function)
    nodes = [{"NodeManagerHostname": name} for name in ("a", "b")]
    codes = cluster._on_all(ray, {"H200": nodes}, pytestconfig, Path("run.json"))
    assert codes == [pytest.ExitCode.TESTS_FAILED]
    assert "H200: not measured: other tasks held a, b for 60 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--cluster=auto"], "--cluster: name the runs' file with --benchmark-json or --out"),
        (["--cluster=auto", "--out=x", "--resume-bench"], "begins anew, no --resume-bench"),
        (["--cluster=127.0.0.1:1", "--out=x"], "--cluster 127.0.0.1:1: nothing answers there"),
    ],
)
def test_what_cannot_be_is_told(given: list[str], said: str) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    done = run_pytest("--benchmark-only", *given)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in done.stderr
