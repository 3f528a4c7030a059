"""Reads and writes files: what is damaged is named, and what is written is whole."""

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it can't be read or is no JSON; the message says which.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"unreadable ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"damaged: no valid JSON ({error})") from error


def write_text(path: Path, text: str) -> Path:
    """Write a text file in one step: whoever reads it sees the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_json(path: Path, content: Any) -> Path:
    """Likewise of JSON; NaN has no place in it and raises ValueError."""
    return write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
