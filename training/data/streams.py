"""Seeds for independent random streams: what a draw depends on is what its stream is named by."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream(*key: int | str) -> int:
    """A seed in [0, 2^63) that is the same in every process, and another one for any other key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator at the start of the stream ``key``."""
    return torch.Generator().manual_seed(stream(*key))


@contextmanager
def drawing_from(*key: int | str) -> Iterator[None]:
    """Global CPU draws inside come from the stream ``key``; outside, they go on as before.

    For libraries that draw from PyTorch's global generator. (``torch.manual_seed`` would start the
    CUDA generators, those of dropout, anew as well.)
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream(*key))
        yield
