"""docs/features.md says what happens."""

import pytest

from linear_vit import kernels
from tests.kernels import features

COMPILING = (
    "`torch.compile(fullgraph=True)`",
    "the same with `dynamic=True`",
    "`torch.export`",
    "its package by AOTInductor, run without this project",
)


def test_the_page_has_every_feature_of_every_backend() -> None:
    columns = features.written()
    assert tuple(columns) == features.BACKENDS
    assert all(list(column) == list(features.FEATURES) for column in columns.values())
    assert features.PAGE.read_text() == features.page(columns)
    assert "yes" in columns["reference"].values()


@pytest.mark.parametrize("feature", [name for name in features.FEATURES if name not in COMPILING])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_the_page_is_right(backend: str, feature: str) -> None:
    reason = kernels.backends("linear_attention", "cpu")[backend]
    if reason is not None:
        pytest.skip(reason)
    assert features.cell(feature, backend) == features.written()[backend][feature]


@pytest.mark.slow
@pytest.mark.parametrize("backend", features.BACKENDS)
def test_every_cell_is_right(backend: str) -> None:
    assert features.in_own_process(backend) == features.written()[backend]
