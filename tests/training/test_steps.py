"""A training step as a case of the harness: its names, its facts, and what can't be timed."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linear_vit import kernels
from linear_vit.bench import problems
from linear_vit.training.config import MODELS, model_settings, resolve
from linear_vit.training.errors import UserError
from linear_vit.training.step import training_step
from linear_vit.training.steps import (
    DEFAULT,
    SIZES,
    STEP,
    TRAINING_STEP,
    compared_backends,
    step_case,
    step_of,
    time_steps,
    were_timed,
    why_not,
)

CPU = torch.device("cpu")
SAVED = Path(__file__).parents[2] / "reports/measurements/xeon-2.5ghz-2-cores/benchmark.json"


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The loss of every step that is made."""
    seen: list[Tensor] = []

    def recording(*arguments: object, **options: object) -> tuple[Tensor, Tensor]:
        loss, hits = training_step(*arguments, **options)  # type: ignore[arg-type]
        seen.append(loss)
        return loss, hits

    monkeypatch.setattr("linear_vit.training.steps.training_step", recording)
    return seen


def cases_of_a_sweep(*tokens: int) -> list[problems.Case]:
    """Those of all models on a CPU, on the backends they take by themselves."""
    [dtype] = TRAINING_STEP.dtypes("cpu", ("float16",))
    assert TRAINING_STEP.usual_backends == (DEFAULT,)
    [backend] = TRAINING_STEP.usual_backends
    return [
        problems.Case(TRAINING_STEP.name, mode, dtype, shape, backend)
        for shape in TRAINING_STEP.sizes("cpu", "quick", tokens, None)
        for mode in TRAINING_STEP.modes
    ]


@pytest.mark.parametrize("name", ["baseline", "ripple", "hydra-local"])
def test_a_step_trains(name: str, losses: list[Tensor]) -> None:
    step = step_of(resolve({**SIZES["cpu"], **model_settings(name), "batch_size": 8}), CPU)
    for _ in range(6):
        step()
    assert losses[-1] < losses[0] - 0.1


def test_unknown_models_are_refused() -> None:
    with pytest.raises(UserError, match="unknown model 'vit'; there are baseline, "):
        model_settings("vit")


def test_a_case_trains_its_model_and_returns_nothing(losses: list[Tensor]) -> None:
    [case, *_] = cases_of_a_sweep()
    call = problems.make_problem(TRAINING_STEP.name, case.shape, torch.float32, CPU).call(
        case.backend, case.mode
    )
    assert [call(), call()] == [(), ()]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_it_is_found_as_an_operation_that_has_nothing_to_check() -> None:
    assert problems.operation("training_step") is TRAINING_STEP
    assert not TRAINING_STEP.check_shapes(64)
    assert not TRAINING_STEP.static_shapes(64, ragged=True)
    assert not TRAINING_STEP.lengths("cpu", "full")
    assert TRAINING_STEP.name not in kernels.OPERATIONS


def test_names_groups_and_facts_are_those_of_saved_runs() -> None:
    """Of every training step in a saved run: old and new ones compare by name and group."""
    cases = {TRAINING_STEP.case_name(case): case for case in cases_of_a_sweep()}
    assert set(cases) == {f"{model}-default" for model in MODELS}
    found = 0
    for saved in json.loads(SAVED.read_text())["benchmarks"]:
        if not saved["name"].startswith("test_training_step["):
            continue
        found += 1
        case, extra = cases[saved["param"]], saved["extra_info"]
        assert saved["name"] == f"test_training_step[{TRAINING_STEP.case_name(case)}]"
        assert TRAINING_STEP.group(case) == saved["group"]
        assert (case.mode, case.dtype, case.backend) == (
            extra["pass"],
            extra["dtype"],
            extra["backend"],
        )
        facts = TRAINING_STEP.facts(case, saved["stats"]["median"])
        assert facts.pop("images_per_s") == pytest.approx(extra["images_per_s"])
        assert facts == {name: extra[name] for name in facts}
    assert found >= 6


def test_a_sweep_has_the_models_where_their_length_is_asked_for() -> None:
    assert len(cases_of_a_sweep()) == len(cases_of_a_sweep(16, 64)) == len(MODELS)
    assert not cases_of_a_sweep(65)
    assert len({TRAINING_STEP.turn_key(case.shape) for case in cases_of_a_sweep()}) == 1
    assert set(TRAINING_STEP.backends(CPU, ("torch", "cuda"))) == {"torch", "cuda"}


def test_a_rehearsal_is_tiny_and_runs(losses: list[Tensor]) -> None:
    for case in cases_of_a_sweep():
        shape = TRAINING_STEP.rehearsal(case.shape)
        TRAINING_STEP.problem(shape, torch.float32, CPU).call("torch", STEP)()
        assert shape.B == 2
    assert len(losses) == len(MODELS)


def test_cases_of_one_setting_take_turns_and_variants_have_names_of_their_own(
    tmp_path: Path,
) -> None:
    settings = {**SIZES["cpu"], **model_settings("ripple")}
    configs = [resolve({**settings, "ripple_stages": stages, "dim": 16}) for stages in (1, 2)]
    cases = [
        step_case(config, "torch", f"ripple_stages={config.ripple_stages}") for config in configs
    ]
    assert not were_timed(cases, tmp_path / "run.json", CPU)
    path = time_steps(cases, tmp_path / "run.json", CPU, seconds=0.01)
    assert [found.name for found in tmp_path.iterdir()] == ["run.json"]
    saved = json.loads(path.read_text())["benchmarks"]
    assert [one["name"] for one in saved] == [
        "test_training_step[ripple-ripple_stages=1-torch]",
        "test_training_step[ripple-ripple_stages=2-torch]",
    ]
    assert [one["extra_info"]["settings"]["ripple_stages"] for one in saved] == [1, 2]
    assert len({one["extra_info"]["turns"] for one in saved}) == 1
    assert were_timed(cases, path, CPU)
    assert not were_timed([step_case(configs[0], "compiled"), *cases], path, CPU)


def test_what_cannot_be_timed_says_why() -> None:
    config = resolve({**SIZES["cpu"], **model_settings("hydra"), "dim": 16})
    assert why_not(step_case(config, "torch"), CPU) is None
    assert why_not(step_case(config), CPU) is None
    assert "CUDA kernels run on CUDA devices" in str(why_not(step_case(config, "cuda"), CPU))
    assert why_not(step_case(config, "triton"), CPU)
    with pytest.raises(UserError, match="unknown backend 'magic'; there are reference, torch"):
        why_not(step_case(config, "magic"), CPU)
    assert compared_backends() == ["torch", "cpu", "triton", "cuda"]


def test_the_dtype_says_autocast() -> None:
    for amp, dtype in {"off": "float32", "bf16": "bfloat16 autocast"}.items():
        case = step_case(resolve({"dataset": "digits", "preset": "small", "amp": amp}))
        assert (case.dtype, case.mode) == (dtype, STEP)


def test_special_sweeps_take_the_dtypes_a_device_is_used_with() -> None:
    for sweep, dtypes in {
        "cpu": ["float32", "bfloat16 autocast"],
        "gpu": ["bfloat16 autocast"],
    }.items():
        wanted = TRAINING_STEP.special(sweep)
        assert list(dict.fromkeys(one.dtype for one in wanted)) == dtypes
        cases = [problems.Case(TRAINING_STEP.name, STEP, w.dtype, w.shape, "torch") for w in wanted]
        names = {problems.case_name(case) for case in cases}
        assert len(names) == len(dtypes) * len(MODELS)
        for case in cases:
            assert step_case(case.shape.config).dtype == case.dtype
