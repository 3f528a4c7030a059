"""Other libraries' implementations, on what is installed here and on stand-ins of what is not."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from linear_vit.bench import peers
from linear_vit.bench.peers import flash_bla
from linear_vit.bench.peers.features import phi
from linear_vit.bench.problems import (
    FORWARD_BACKWARD,
    AttentionShape,
    check,
    expected_of_peer,
    make_problem,
)
from linear_vit.bench.sweep import Asked, make_sweep
from linear_vit.kernels.accuracy import compare

CPU = torch.device("cpu")
FLASH_BLA = "flash_bla.ops.linear_attn.fused"
SHAPE = AttentionShape(B=2, H=3, Hk=3, N=37, M=37, D=16)


@pytest.mark.parametrize("name", ["sdpa_math", "sdpa_flash"])
def test_sdpa_kernels_are_right(name: str) -> None:
    problem = make_problem("softmax_attention", SHAPE, torch.float32, CPU)
    for verdict in check(problem, name, FORWARD_BACKWARD, problem.expected()).values():
        assert verdict.passed, verdict


def causal_stand_in(q, k, v, scale, output_final_state, normalize):
    """What fla's causal kernel returns, (B, N, H, ·) in and out, by its definition."""
    assert (scale, output_final_state, normalize) == (1.0, True, False)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT).tril()
    return (scores @ v).transpose(1, 2), k.mT @ v


def bidirectional_stand_in(q, k, v):
    """What flash_bla's operation is defined as: a mean normaliser."""
    normaliser = q @ k.mean(-2, keepdim=True).mT
    return q @ (k.mT @ v) / k.shape[-2] / (normaliser + 1e-6)


@pytest.mark.parametrize(
    ("name", "module", "attribute", "function"),
    [
        ("fla", "fla.ops.linear_attn", "chunk_linear_attn", causal_stand_in),
        ("flash_bla", FLASH_BLA, "linear_attention", bidirectional_stand_in),
        ("flash_bla_given", FLASH_BLA, "linear_attention", bidirectional_stand_in),
    ],
)
def test_adapters_make_our_function_of_theirs(
    monkeypatch, name: str, module: str, attribute: str, function
) -> None:
    setattr(stand_in_for(monkeypatch, module), attribute, function)
    monkeypatch.setattr(flash_bla, "compiled", lambda function, *_: function)
    problem = make_problem("linear_attention", SHAPE, torch.float32, CPU)
    other = peers.other_function(name) is not None
    expected = expected_of_peer(problem, name) if other else problem.expected()
    for verdict in check(problem, name, FORWARD_BACKWARD, expected).values():
        assert verdict.passed, verdict


def stand_in_for(monkeypatch, module: str) -> ModuleType:
    """An empty module of this name, that can be imported."""
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        made = ModuleType(".".join(parts[:i]))
        made.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), made)
        if i > 1:
            setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], made)
    return sys.modules[module]


def test_features_that_are_given_are_made_once_and_anew_for_other_values(monkeypatch) -> None:
    taken: list[torch.Tensor] = []

    def attend(q, k, v):
        taken.append(q)
        return bidirectional_stand_in(q, k, v)

    stand_in_for(monkeypatch, FLASH_BLA).linear_attention = attend  # type: ignore[attr-defined]
    made: list[int] = []
    monkeypatch.setattr(flash_bla, "phi", lambda x: (made.append(1), phi(x))[1])
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    run = peers.PEERS["flash_bla_given"].run
    assert torch.equal(run(q, k, v), run(q, k, v))
    assert len(made) == 2  # of q and of k
    q.copy_(-q)
    run(q, k, v)
    assert len(made) == 3
    assert torch.equal(taken[-1], phi(q))


def test_autotuning_is_pruned_to_what_takes_all_features_at_once(monkeypatch) -> None:
    pytest.importorskip("triton")

    class Autotuner:
        def __init__(self) -> None:
            self.configs = [SimpleNamespace(kwargs={"BL": 32, "BK": 32, "BV": 32})] * 144
            self.cache = {"L": "found"}

    kernel = Autotuner()
    module = stand_in_for(monkeypatch, FLASH_BLA)
    module.linear_attention = bidirectional_stand_in  # type: ignore[attr-defined]
    module.fused_fwd_kernel_o = kernel  # type: ignore[attr-defined]
    monkeypatch.setattr(flash_bla, "compiled", lambda function, *_: function)
    x = torch.randn(1, 1, 8, 48)
    run = peers.PEERS["flash_bla"].run
    run(x, x, x)
    assert len(kernel.configs) == 12
    assert {config.kwargs["BK"] for config in kernel.configs} == {128}
    assert not kernel.cache
    kernel.cache["L"] = "of these"
    run(x, x, x)
    assert kernel.cache == {"L": "of these"}
    run(*[x[..., :16]] * 3)
    assert {config.kwargs["BK"] for config in kernel.configs} == {32}
    assert not kernel.cache


def test_an_emulation_is_called_one() -> None:
    assert "causal kernel" in str(peers.PEERS["fla"].emulation)
    assert peers.PEERS["flash_bla"].emulation is None


def test_litemla_is_checked_against_its_own_function_and_marked(monkeypatch) -> None:
    from linear_vit.bench.peers import litemla

    class StandIn:
        """timm's LiteMLA._attn by its definition: the last column of v is ones."""

        def _attn(self, q, k, v):
            out = q @ (k.mT @ v)
            return out[..., :-1] / (out[..., -1:] + 1e-6)

    if importlib.util.find_spec("timm") is None:
        monkeypatch.setattr(litemla, "_module", StandIn)
    problem = make_problem("linear_attention", SHAPE, torch.float32, CPU)
    theirs = expected_of_peer(problem, "litemla")
    for verdict in check(problem, "litemla", FORWARD_BACKWARD, theirs).values():
        assert verdict.passed, verdict
    ours = problem.expected()
    assert not compare(theirs.values["out"].float(), ours.values["out"], gradient=False).passed
    assert "one-sided" in str(peers.other_function("litemla"))
    assert peers.other_function("fla") is None


def test_what_is_missing_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reasons = peers.backends("linear_attention", CPU)
    assert reasons["fla"] == "fla-core is not installed: pip install fla-core"
    assert reasons["litemla"] == "timm is not installed: pip install timm"
    assert "fla-org's repository" in str(reasons["flash_bla"])


def test_peers_are_timed_when_asked_for() -> None:
    common = {"device": "cpu", "operations": ["softmax_attention"], "tokens": [64]}
    plain = make_sweep(Asked(**common))
    assert not {case.backend for case in plain.cases} & set(peers.PEERS)
    named = make_sweep(Asked(**common, backends=["torch", "sdpa_math"]))
    assert {case.backend for case in named.cases} == {"torch", "sdpa_math"}
    all_of_them = make_sweep(Asked(**common, with_peers=True))
    assert {"torch", "sdpa_math", "sdpa_flash"} <= {case.backend for case in all_of_them.cases}
    assert "no cudnn kernel" in all_of_them.left_out["sdpa_cudnn, softmax_attention float32"]


def test_features_are_those_of_the_kernels() -> None:
    x = torch.tensor([[-2.0, 0.0, 3.0]])
    assert phi(x).tolist() == [[0.0, 0.0, 3.0, 2.0, 0.0, 0.0]]
