"""How check-noise judges: on made-up runs, whose truth is known."""

from pathlib import Path

import numpy as np
import pytest

from linear_vit.bench import noise
from tests.reports import saved, synthetic

BACKENDS = ("torch", "compiled")


def runs(folder: Path, planted: float, luck: float = 1.0) -> list[Path]:
    rng = np.random.default_rng(0)
    name = "linear_attention-forward-float32-N{}-compiled"
    factors = {"before": {}, "same": {name.format(512): luck}}
    factors["slower"] = {name.format(n): planted for n in synthetic.LENGTHS}
    return [
        saved.save(folder / f"{stem}.json", synthetic.run(rng, "independent", slower, BACKENDS))
        for stem, slower in factors.items()
    ]


def test_a_tenth_that_is_seen_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert noise._judge(*runs(tmp_path, 1.1), "compiled") == 0
    assert "the same code in compiled: same; a tenth more work: slower" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("planted", "luck"),
    [
        pytest.param(1.0, 1.0, id="unseen"),
        pytest.param(1.1, 1.5, id="alarm", marks=pytest.mark.slow),
    ],
)
def test_a_tenth_unseen_and_a_false_alarm_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], planted: float, luck: float
) -> None:
    assert noise._judge(*runs(tmp_path, planted, luck), "compiled") == 1
    assert "FAILED: wanted slower of a tenth more work" in capsys.readouterr().err
