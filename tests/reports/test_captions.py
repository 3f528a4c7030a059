"""What is said below a figure, on cases where something stands out, and where nothing does."""

from pathlib import Path
from typing import Any

import pytest

from linear_vit.reports.groups import MEMORY, OVER_TORCH, TIME, Group, groups, picture_data
from linear_vit.reports.page import (
    answer,
    captions,
    kernel_sections,
    sources,
    training_sections,
)
from linear_vit.reports.page.cases import cases
from linear_vit.reports.page.parts import Figure, Seen
from linear_vit.reports.saved import documents
from linear_vit.reports.saved.runs import MEASUREMENTS, load
from linear_vit.reports.statistics.seeds import t_interval
from linear_vit.reports.tables import steps
from linear_vit.reports.tables.table import Table
from tests.reports import saved

LENGTHS = [2**i for i in range(6, 11)]


def timed(folder: Path, changes: dict[str, dict[str, Any]], **of_run: Any) -> Seen:
    """A run of linear attention, forward, by these backends; each changes its cases."""
    made = saved.run() | {"benchmarks": []}
    made["kernel_suite"] |= of_run
    for backend, change in changes.items():
        for length in change.get("lengths", LENGTHS):
            case = saved.case("linear_attention", backend, "forward", length)
            case["stats"] = saved.stats(1e-6 * length * change.get("factor", 1.0))
            case["extra_info"] |= change.get("info", {})
            if (disturbed := change.get("disturbed", {}).get(length)) is not None:
                case["extra_info"]["disturbed"] = disturbed
            made["benchmarks"].append(case)
    found = documents.Documents(load([saved.save(folder / "run.json", made)]))
    assert found.runs is not None
    return Seen(found, groups(found.runs))


def said(seen: Seen, picture: Any) -> str:
    (group,) = seen.groups
    return captions.of_curves(group, picture, "forward", cases(picture_data(group, picture)))


def heat(group: Group) -> str:
    return captions.of_heat(cases(picture_data(group, OVER_TORCH)))


def test_the_fastest_is_named_where_it_is_apart(tmp_path: Path) -> None:
    seen = timed(tmp_path, {"torch": {"factor": 2.0}, "cpu": {}})
    assert "takes 1.02 ms at best (cpu, 2.0× as fast as torch), growing as N^1.00" in said(
        seen, TIME
    )
    assert "Of 5 cases over torch: faster in 5." in heat(seen.groups[0])


def test_backends_alike_are_not_told_apart(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"torch": {}, "cpu": {"factor": 1.001}, "compiled": {"factor": 1.001}}
    seen = timed(tmp_path, changes)
    assert "with torch (cpu and compiled are not told apart from it)" in said(seen, TIME)
    assert "at best" not in said(seen, TIME)
    assert "Of 10 cases over torch: not told apart in 10." in heat(seen.groups[0])
    assert "cpu: 1× at every length." in said(seen, OVER_TORCH)


def test_one_backend_is_the_best_of_nothing(tmp_path: Path) -> None:
    seen = timed(tmp_path, {"cpu": {}})
    assert "1.02 ms with cpu, which no other backend was timed beside" in said(seen, TIME)


@pytest.mark.parametrize(
    ("torch", "cpu", "caption"),
    [
        (72 * 2**20, 0, "least with cpu, nothing; most with torch, 72 MiB."),
        (72 * 2**20, 36 * 2**20, "least with cpu, 36 MiB; most with torch, 72 MiB."),
        (2**20, 2**20, "1 MiB with torch and cpu."),
        (0, 0, "nothing with torch and cpu."),
        (2**20, None, "1 MiB with torch."),
    ],
)
def test_who_needs_no_memory_needs_the_least(
    tmp_path: Path, torch: int, cpu: int | None, caption: str
) -> None:
    of = {name: {"info": {"peak_memory_bytes": n}} for name, n in (("torch", torch), ("cpu", cpu))}
    assert said(timed(tmp_path, of), MEMORY) == f"Linear attention of 1,024 tokens: {caption}"


def test_what_was_disturbed_or_is_another_function_is_never_the_best(tmp_path: Path) -> None:
    why = dict.fromkeys(LENGTHS, "threads of ours waited")
    changes: dict[str, Any] = {
        "torch": {"factor": 2.0},
        "compiled": {"factor": 1.5},
        "cpu": {"factor": 0.1, "disturbed": why},
        "reference": {"factor": 0.01, "info": {"other_function": "no division"}},
    }
    seen = timed(tmp_path, changes)
    for text in (said(seen, TIME), heat(seen.groups[0]), *answer.sentences(seen)):
        assert "cpu" not in text
        assert "reference" not in text
    assert "at best (compiled, 1.3× as fast as torch)" in said(seen, TIME)
    alone = timed(tmp_path, {"cpu": {"disturbed": why}})
    assert said(alone, TIME) == "Every case of linear attention was disturbed."
    notes = [part for part in sources.section(alone) if isinstance(part, str)]
    assert any(
        note.startswith("Disturbed, so compared with nothing: test_kernel[linear_attention")
        and note.endswith("and 4 more: threads of ours waited.")
        for note in notes
    )


def rows(**values: list[float]) -> list[dict[str, Any]]:
    """Rows of a results table: accuracies by model, of seeds 0, 1, …"""
    base = values.get("baseline")
    found = []
    for model, own in values.items():
        row = {"model": model, "title": model, "seeds": list(range(len(own)))}
        gain = [a - b for a, b in zip(own, base or [], strict=False)]
        row |= {"accuracy": t_interval(own), "claim": None}
        row["gain"] = t_interval(gain) if gain and model != "baseline" else None
        found.append(row)
    return found


@pytest.mark.parametrize(
    ("values", "expected", "absent"),
    [
        (  # The seeds differ, the models don't.
            {"baseline": [90.0, 92.0, 94.0], "hydra": [90.2, 91.9, 94.1]},
            "Nothing stands out: 3 seeds tell no other model apart from it. None is told apart "
            "from the baseline.",
            "hydra are",
        ),
        (
            {"baseline": [90.0, 92.0, 94.0], "hydra": [95.0, 97.1, 98.9]},
            "Highest mean: hydra, 97.0 ± 4.8 %. It is told apart from every other model, paired by "
            "seed. Above the baseline, in points paired by seed: hydra (+5.0 ± 0.2).",
            "not told",
        ),
        (
            {"baseline": [90.0, 92.0, 94.0], "hydra": [95.0, 97.1, 98.9], "ripple": [95, 97, 98.8]},
            "ripple is not told apart from it. Above the baseline",
            "hydra is",
        ),
        (
            {"baseline": [95.0, 97.1, 98.9], "hydra": [90.0, 92.0, 94.0], "ripple": [95, 97, 99.0]},
            "Below the baseline, in points paired by seed: hydra (-5.0 ± 0.2); the others are not "
            "told apart from it.",
            "Above",
        ),
        (
            {"baseline": [90.0], "hydra": [95.0]},
            "Highest mean: hydra, 95.0 % (one seed). Nothing stands out: runs of one seed tell no",
            "baseline",
        ),
        ({"hydra": [95.0, 96.0]}, "Highest mean: hydra, 95.5 ± 6.4 %. Bars:", "told apart"),
    ],
    ids=["nothing stands out", "one", "two", "below", "one seed", "one model"],
)
def test_accuracies(values: dict[str, list[float]], expected: str, absent: str) -> None:
    text = captions.of_accuracies(rows(**values))
    assert expected in text
    assert absent not in text
    # The highest is never said to be like itself.
    best = text.partition("Highest mean: ")[2].partition(",")[0]
    assert f"{best} is not told apart from it" not in text


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"A": 0.3, "B": 0.1}, "takes 30% of a step of A and 10% of B;"),
        ({"A": 0.3}, "takes 30% of a step of A;"),
        ({"A": 0.3, "B": 0.3}, "takes 30% of a step of every model;"),
    ],
)
def test_shares(shares: dict[str, float], expected: str) -> None:
    found = [{"title": name, "shares": {"attention": share}} for name, share in shares.items()]
    assert expected in captions.of_shares(found)


def test_a_backend_that_was_timed_is_not_said_to_be_left_out(tmp_path: Path) -> None:
    """It can't run one operation; of the others it has cases."""
    why = {"backend cpu": "softmax attention is PyTorch's", "backend cuda": "no CUDA device"}
    seen = timed(tmp_path, {"torch": {}, "cpu": {}}, not_timed=why)
    notes = [part for part in sources.section(seen) if isinstance(part, str)]
    assert "Not timed: some operations with cpu: softmax attention is PyTorch's." in notes
    assert "Not timed: backend cuda: no CUDA device." in notes
    assert not any("backend cpu" in note for note in notes)


def rivals(folder: Path, softmax: dict[int, float], disturbed: str = "") -> Seen:
    """Linear attention takes N µs, softmax attention so much more, by length."""
    made = saved.run() | {"benchmarks": []}
    for operation, factors in (("linear_attention", dict.fromkeys(softmax, 1.0)),
                               ("softmax_attention", softmax)):  # fmt: skip
        for length, factor in factors.items():
            case = saved.case(operation, "torch", "forward", length)
            case["stats"] = saved.stats(1e-6 * length * factor)
            case["extra_info"]["disturbed"] = "waiting" if operation == disturbed else None
            made["benchmarks"].append(case)
    found = documents.Documents(load([saved.save(folder / "run.json", made)]))
    assert found.runs is not None
    return Seen(found, groups(found.runs))


@pytest.mark.parametrize(
    ("softmax", "expected"),
    [
        ({64: 0.5, 128: 0.8, 256: 2.0, 512: 4.0},
         "up to N = 128 softmax attention with torch (PyTorch), from 256 on linear attention with"),
        ({64: 2.0, 128: 2.0}, "from N = 64 to 128 is linear attention with torch (PyTorch)."),
        ({64: 0.5}, "the fastest at N = 64 is softmax attention with torch (PyTorch)."),
        # Within the interval nobody takes the lead.
        ({64: 0.5, 128: 1.0001, 256: 0.5}, "the fastest from N = 64 to 256 is softmax attention"),
    ],
    ids=["a crossing", "none", "one length", "a tie"],
)  # fmt: skip
def test_the_page_answers_what_is_fastest_from_which_length(
    tmp_path: Path, softmax: dict[int, float], expected: str
) -> None:
    (text,) = answer.sentences(rivals(tmp_path, softmax))
    assert text.startswith("Linear attention and softmax attention, forward, float32, one sequence")
    assert expected in text


def test_what_is_beside_a_figure_closes_what_it_opens(tmp_path: Path) -> None:
    seen = rivals(tmp_path, {64: 0.5, 128: 0.8, 256: 2.0, 512: 4.0})
    told = [text for fact in answer.facts(seen) for text in fact]
    assert any(
        text.startswith("crossover with SDPA (torch, forward, float32): N ") for text in told
    )
    assert not [text for text in told if "))" in text or text.count("(") != text.count(")")]


def test_there_is_no_fastest_of_one(tmp_path: Path) -> None:
    """Beside a busy neighbour all cases of the other operation may have been disturbed."""
    (text,) = answer.sentences(rivals(tmp_path, {64: 2.0, 128: 2.0}, disturbed="linear_attention"))
    assert text.endswith(": no length was measured undisturbed for more than one of them.")


def test_the_answer_says_what_each_model_reaches(tmp_path: Path) -> None:
    saved.save(tmp_path / "table.json", saved.table())
    found = documents.load([], tmp_path)
    found.runs = None
    assert answer.sentences(Seen(found)) == [
        "Test accuracy on scikit-learn digits (preset small, 12 epochs, 3 seeds): "
        "Ripple 97.2 ± 0.4 % and Baseline 95.5 ± 0.4 %."
    ]


def test_a_page_of_the_repositorys_own_data_says_so(tmp_path: Path) -> None:
    nothing = Seen(documents.load([], tmp_path / "nothing"))
    text = sources.of_the_repository(nothing)
    assert text.startswith("These are the measurements that the repository came with, made on ")
    (run,) = MEASUREMENTS.glob("*/benchmark.json")
    assert "repository came with" in sources.of_the_repository(
        Seen(documents.load([run], tmp_path))
    )
    # One's own, though compiled kernels and counted bytes are still the repository's.
    saved.save(tmp_path / "run.json", saved.run())
    assert sources.of_the_repository(Seen(documents.load([], tmp_path))) == ""
    # One's own table beside the repository's run.
    saved.save(tmp_path / "table.json", saved.table())
    mixed = sources.of_the_repository(Seen(documents.load([run], tmp_path)))
    assert mixed.startswith("Not measured here, but part of the repository: reports/measurements/")


def test_what_was_not_run_is_said_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        saved.save(tmp_path / name / "table.json", saved.table())
    parts = list(training_sections.results(Seen(documents.load([], tmp_path))))
    titles = [part.title for part in parts if not isinstance(part, str)]
    assert sum(title.startswith("CIFAR-100: Not run") for title in titles) == 1
    notes = [part for part in parts if isinstance(part, str)]
    assert len(notes) == len(set(notes))
    # Of a data set that two tables have, the figures' titles say which is which.
    figures = [part.title for part in parts if isinstance(part, Figure)]
    assert all("dim 64" in title for title in figures)


def test_disturbed_cases_are_marked_and_compared_with_nothing(tmp_path: Path) -> None:
    why = "another process used the GPU"
    changes: dict[str, Any] = {
        "torch": {"factor": 2.0, "disturbed": {128: why}},
        "cpu": {"disturbed": {64: why, 256: why}},
        "compiled": {"factor": 1.5},
    }
    seen = timed(tmp_path, changes)
    parts = list(kernel_sections.speed(seen))
    (table,) = (part for part in parts if isinstance(part, Table))
    marks = {
        (line["N"].text, name): line[name].mark
        for line in table.lines
        for name in ("torch", "cpu", "compiled")
    }
    assert [at for at, mark in marks.items() if mark == "disturbed"] == [
        ("64", "cpu"), ("128", "torch"), ("256", "cpu")
    ]  # fmt: skip
    assert [at for at, mark in marks.items() if mark == "best"] == [
        ("64", "compiled"), ("128", "cpu"), ("256", "compiled"), ("512", "cpu"), ("1,024", "cpu")
    ]  # fmt: skip
    cell = table.lines[0]["cpu"]
    assert cell.text == "‡ 64.0 µs"
    assert cell.tip.startswith(f"disturbed: {why}\n")
    assert table.note.endswith(f"so compared with nothing: {why}.")
    # No ratio has one of them on either side.
    (drawn,) = (part for part in parts if isinstance(part, Figure) and part.kind == "heat")
    at = {s["backend"]: [point["x"] for point in s["points"]] for s in drawn.data["series"]}
    assert at == {"cpu": [512, 1024], "compiled": [64, 256, 512, 1024]}
    # On the curves of times their points are drawn otherwise, and say why.
    curves = next(p for p in kernel_sections.complexity(seen) if isinstance(p, Figure))
    shaken = {
        (s["backend"], point["x"]): point["disturbed"]
        for s in curves.data["series"]
        for point in s["points"]
        if "disturbed" in point
    }
    assert shaken == {("torch", 128): why, ("cpu", 64): why, ("cpu", 256): why}


def test_a_disturbed_step_gains_nothing(tmp_path: Path) -> None:
    made = saved.step_speed()
    (before,) = steps.groups(load([saved.save(tmp_path / "a.json", made)]))
    assert before.gain("hydra") == pytest.approx(saved.STEP_SPEEDUP)
    made["benchmarks"][1]["extra_info"]["disturbed"] = "the package throttled"
    (after,) = steps.groups(load([saved.save(tmp_path / "b.json", made)]))
    table = steps.as_table(after)
    assert table.lines[0]["C++"].text == "‡ 18.0 ms"
    assert after.gain("hydra") is None
    assert "compared with nothing: the package throttled." in table.note


def test_no_share_of_a_limit_is_above_all_of_it_without_a_word(tmp_path: Path) -> None:
    beaten = {"share_of_limit": 1.5, "limit": "copy"}
    seen = timed(tmp_path, {"cpu": {"info": beaten | {"limit_note": "in the L2 cache"}}})
    (table,) = (part for part in kernel_sections.speed(seen) if isinstance(part, Table))
    assert table.lines[0]["of limit"].text == "§ 150% copy"
    assert "in the L2 cache" in table.lines[0]["of limit"].tip
    assert table.note.endswith("§ in the L2 cache")
    (table,) = (
        part
        for part in kernel_sections.speed(timed(tmp_path, {"cpu": {"info": beaten}}))
        if isinstance(part, Table)
    )
    assert "§ above the limit: its data were in a cache" in table.note
    kept = timed(tmp_path, {"cpu": {"info": beaten | {"share_of_limit": 0.5}}})
    (table,) = (part for part in kernel_sections.speed(kept) if isinstance(part, Table))
    assert table.lines[0]["of limit"].text == "50% copy"
    assert "§" not in table.note
