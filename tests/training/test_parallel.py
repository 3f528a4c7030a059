"""Runs of several processes that share images, too: the weights of one process, up to rounding."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from linear_vit import train_minimal
from linear_vit.training import distributed
from linear_vit.training.checkpoints import load_checkpoint
from linear_vit.training.config import build_model, resolve
from linear_vit.training.data.loader import share
from linear_vit.training.step import training_step
from tests import processes
from tests.training.conftest import stop_in, take_few

# Three steps an epoch; the last batch, of 24 images, is no multiple of anything.
TINY = ["--dataset=digits", "--recipe=light", "--dropout=0", "--dim=16", "--depth=1", "--heads=1"]
TINY += ["--hydra_branches=2", "--batch_size=53", "--epochs=2", "--lr=1e-3", "--backend=torch"]
TINY += ["--device=cpu", "--checkpoint_every=2"]


def _main(rank: int, options: list[str], stop: int = 0) -> tuple[int, str]:
    """The exit code and what was said; with ``stop``, Ctrl-C in that step."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        take_few(patch)
        stop_in(patch, stop, KeyboardInterrupt())
        code = train_minimal.main(options)
        return code, " ".join(said.getvalue().split())


def _train(count: int, out: Path, *options: str, stop: int = 0) -> None:
    """By so many processes; with ``stop``, Ctrl-C in that step."""
    given = [*TINY, *options, f"--out={out}"]
    if count == 1:
        found = [_main(0, given, stop)]
    else:
        found = processes.together(count, _main, given, stop, joined=False)
    assert [code for code, _ in found] == [130 if stop else 0] * count, found


def _check_alike(one: Path, other: Path) -> None:
    first, second = (load_checkpoint(out / "last.pt") for out in (one, other))
    losses = (saved["history"]["loss"] for saved in (first, second))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    for name in ("hits", "images"):
        assert torch.equal(first["history"][name], second["history"][name])
    assert first["model"].keys() == second["model"].keys()
    for name, weight in first["model"].items():
        seen = torch.ones(len(weight), dtype=torch.bool)
        if name.endswith("qkv.bias") and first["config"].attention_type == "baseline":
            # Softmax does not see a bias of the keys, and AdamW makes steps of its rounding errors.
            seen[len(weight) // 3 : 2 * len(weight) // 3] = False
        found = second["model"][name][seen]
        torch.testing.assert_close(found, weight[seen], rtol=1e-3, atol=1e-4)
    tested = [json.loads((out / "run.json").read_text()) for out in (one, other)]
    assert [run["status"] for run in tested] == ["finished"] * 2
    assert tested[0]["test_accuracy"] == pytest.approx(tested[1]["test_accuracy"], abs=0.051)


def test_four_processes_two_an_image_train_as_one(tmp_path: Path) -> None:
    _train(1, tmp_path / "one")
    _train(4, tmp_path / "four", "--sequence_parallel=2")
    _check_alike(tmp_path / "one", tmp_path / "four")
    run = json.loads((tmp_path / "four" / "run.json").read_text())
    assert run["environment"]["processes"] == 4
    assert run["environment"]["sequence_parallel"] == 2


@pytest.mark.slow
def test_a_compiled_model_trains_over_processes_as_uncompiled(tmp_path: Path) -> None:
    _train(2, tmp_path / "plain", "--sequence_parallel=2")
    _train(2, tmp_path / "compiled", "--sequence_parallel=2", "--compile")
    _check_alike(tmp_path / "plain", tmp_path / "compiled")


def _moved(rank: int, sequence_parallel: int = 1) -> torch.Tensor:
    """By how much a step along the gradient itself moves the head: AdamW would hide its size."""
    images, labels = (
        torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        [1, 2, 3, 4],
    )
    config = resolve({"preset": "small", "dataset": "digits", "backend": "torch"})
    with distributed.processes(torch.device("cpu"), sequence_parallel):
        model = build_model(config)
        before = model.head.weight.detach().clone()
        distributed.shard_sequence(model)
        network = distributed.parallel(model)
        mine = share(4, distributed.data_rank(), distributed.data_world())
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        targets = torch.tensor(labels)[mine]
        training_step(network, optimizer, images[mine], targets, batch_size=4, clip=0)
        return before - model.head.weight.detach()


def test_the_gradient_is_that_of_the_batch() -> None:
    right = _moved(0)
    for found in processes.together(4, _moved, 2, joined=False):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["baseline", "linear", "hydra", "ripple"])
def test_every_model_trains_as_on_one_process(tmp_path: Path, kind: str) -> None:
    options = [f"--attention_type={kind}", "--local_branch", "--accumulate=2"]
    _train(1, tmp_path / "one", *options)
    _train(4, tmp_path / "four", *options, "--sequence_parallel=2")
    _check_alike(tmp_path / "one", tmp_path / "four")


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes(tmp_path: Path) -> None:
    _train(1, tmp_path / "one")
    resumed = tmp_path / "resumed"
    _train(2, resumed, "--sequence_parallel=2", stop=4)
    _train(1, resumed, "--resume", stop=2)
    _train(4, resumed, "--resume", "--sequence_parallel=2")
    _check_alike(tmp_path / "one", resumed)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--sequence_parallel=2"]])
def test_weights_that_are_cut_are_those_of_one_process(tmp_path: Path, more: list[str]) -> None:
    """The last batch is one image a part, and one process has fewer parts than another."""
    options = ["--accumulate=3", "--batch_size=63"]
    _train(1, tmp_path / "one", *options)
    _train(4, tmp_path / "four", *options, "--fsdp", *more)
    _check_alike(tmp_path / "one", tmp_path / "four")
    run = json.loads((tmp_path / "four" / "run.json").read_text())
    assert run["environment"]["fsdp"]


@pytest.mark.slow
def test_a_run_with_cut_weights_goes_on_without_and_the_other_way_round(tmp_path: Path) -> None:
    _train(1, tmp_path / "one")
    resumed = tmp_path / "resumed"
    _train(2, resumed, "--fsdp", stop=4)
    _train(1, resumed, "--resume", stop=2)
    _train(2, resumed, "--resume", "--fsdp", "--sequence_parallel=2")
    _check_alike(tmp_path / "one", resumed)


def _refused(rank: int, given: list[list[str]]) -> list[tuple[int, str]]:
    return [_main(rank, [*TINY, *options, "--data_dir=/none"]) for options in given]


def test_wrong_numbers_are_refused_before_a_download(tmp_path: Path) -> None:
    out = [f"--out={tmp_path}"]
    told = "needs so many processes, or a multiple, and"
    code, said = _main(0, [*TINY, *out, "--sequence_parallel=2"])
    assert code == 2
    assert f"--sequence_parallel 2 {told} this is one: torchrun --nproc-per-node 2" in said
    code, said = _main(0, [*TINY, *out, "--fsdp"])
    assert code == 2
    assert "--fsdp needs several processes: torchrun --nproc-per-node 2" in said
    given = [[*out, "--sequence_parallel=4"], [*out, "--sequence_parallel=2", "--patch_size=8"]]
    given[1].append("--ripple_stages=0")
    for answers in processes.together(2, _refused, given, joined=False):
        assert [code for code, _ in answers] == [2, 2]
        assert f"--sequence_parallel 4 {told} torchrun started 2" in answers[0][1]
        assert "--sequence_parallel 2: a token grid of 1x1" in answers[1][1]
        assert all(said.count("error") == 1 for _, said in answers)
