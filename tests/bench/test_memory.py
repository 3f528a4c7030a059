"""Memory of a call, and memory that a process keeps: what --keep-memory asks of glibc."""

import platform
import subprocess
import sys

import pytest
import torch

from linear_vit.bench.instruments import memory


def test_what_is_older_than_the_profile_is_freed_without_a_remark(capfd) -> None:
    old = [torch.randn(1000) for _ in range(1001)]  # PyTorch remarks on each thousandth

    def call() -> tuple[torch.Tensor]:
        old.clear()
        return (torch.randn(3),)

    assert memory.peak_beyond_outputs(call, torch.device("cpu"))[0] == 0
    assert "Memory block" not in capfd.readouterr().err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="--keep-memory sets glibc's malloc")
@pytest.mark.slow
def test_memory_that_is_kept_is_not_cleared_again() -> None:
    """Page faults of the last of ten tensors of 64 MB, one after the other, in another process.

    The last, since glibc places a few first ones behind one another: an aligned block takes a
    little more room than the free one that it has left.
    """
    source = (
        "import resource, sys, torch\n"
        "from linear_vit.bench.instruments import memory\n"
        "if 'keep' in sys.argv: memory.keep_freed_memory()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10):\n"
        "    before = faults()\n"
        "    torch.ones(1 << 24)\n"
        "    of_one = faults() - before\n"
        "print(of_one)\n"
    )

    def faults(*arguments: str) -> int:
        command = [sys.executable, "-c", source, *arguments]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert 2 * faults("keep") + 20 < faults()  # of 4 KB or 2 MB each
