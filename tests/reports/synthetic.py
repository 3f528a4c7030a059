"""Pairs of runs whose truth is known: rounds drawn with the noise that machines have."""

from typing import Any

import numpy as np

from tests.reports import saved

BACKENDS = ("torch", "compiled", "reference")
LENGTHS = tuple(2**i for i in range(6, 12))
ROUNDS = 60
NOISES = ("independent", "dependent", "spikes", "drift", "process", "machine", "speeds")
LUCK = 0.03


def run(
    rng: np.random.Generator,
    noise: str,
    slower: dict[str, float] | None = None,
    backends: tuple[str, ...] = BACKENDS,
    turns: bool = True,
) -> dict[str, Any]:
    """A run of linear attention; ``slower`` multiplies the times of the cases it names.

    Args:
        rng: draws everything.
        noise: ``independent``: 2 % a round; ``dependent``: each round much like the last;
            ``spikes``: one round in ten up to five times as long; ``drift``: the machine is some
            4 % off as a whole, differently for each length, and wanders while rounds take turns;
            ``process``: each case is 1 % off for as long as its process lives; ``machine``: drift,
            spikes and process at once, and each backend 0.7 % off in all of a process's cases;
            ``speeds``: the machine has two, one 1.6 times the other, keeps each for some 15 turns,
            and the backends of a case stop after different numbers of rounds; ``luck``: each
            backend is 3 % off in all of a process's cases.
        slower: factors by the names of cases.
        backends: those that take turns.
        turns: whether the run says so; the runs of earlier versions don't.
    """
    benchmarks = []
    luck = {backend: 0.007 * rng.standard_normal() for backend in backends}
    whole = 0.04 * rng.standard_normal()
    for tokens in LENGTHS:
        place = whole + 0.02 * rng.standard_normal()
        wander = np.cumsum(0.004 * rng.standard_normal(ROUNDS))
        slow = (np.cumsum(rng.random(ROUNDS) < 1 / 15) + rng.integers(2)) % 2
        for backend in backends:
            case = saved.case("linear_attention", backend, "forward", tokens)
            logs = 0.02 * rng.standard_normal(ROUNDS)
            if noise == "dependent":
                for i in range(1, ROUNDS):
                    logs[i] = 0.7 * logs[i - 1] + 0.7 * logs[i]
            if noise in ("spikes", "machine"):
                hit = rng.random(ROUNDS) < 0.1
                logs[hit] += np.log(rng.uniform(1, 5, hit.sum()))
            if noise in ("drift", "machine"):
                logs += place + wander
            if noise in ("process", "machine"):
                logs += 0.01 * rng.standard_normal()
            if noise == "machine":
                logs += luck[backend]
            if noise == "luck":
                logs += luck[backend] * LUCK / 0.007
            if noise == "speeds":
                logs = (logs + np.log(1.6) * slow)[: rng.integers(10, ROUNDS + 1)]
            truth = case["stats"]["median"] * (slower or {}).get(case["param"], 1.0)
            seconds = truth * np.exp(logs)
            q1, median, q3 = (float(x) for x in np.quantile(seconds, (0.25, 0.5, 0.75)))
            stats = {"median": median, "q1": q1, "q3": q3, "rounds": len(seconds)}
            case["stats"] = stats | {"data": seconds.tolist()}
            if turns:
                case["extra_info"]["turns"] = f"those at {tokens}"
            benchmarks.append(case)
    return saved.run() | {"benchmarks": benchmarks}
