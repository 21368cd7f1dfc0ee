# SPDX-License-Identifier: Apache-2.0
"""Files that take long to make, kept in .cache/ between runs of the tests."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "tests"
# Files of one name: every change of what they are made from adds one.
MOST = 16


def digest(*parts: str | bytes) -> str:
    """One number, in hex, for all that a file is made from."""
    found = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        found.update(f"{len(content)} ".encode() + content)
    return found.hexdigest()


def digest_of_files(*paths: Path) -> str:
    """The names and contents of files, in this order."""
    parts: list[str] = []
    for path in paths:
        parts += [path.name, hashlib.sha256(path.read_bytes()).hexdigest()]
    return digest(*parts)


def place(name: str, key: str) -> Path:
    """Where the file of that name and key is, or would be.

    Args:
        name: What it is; the end of the file's name.
        key: `digest` of everything that decides its content.
    """
    return FOLDER / f"{key}.{name}"


def keep(path: Path, make: Callable[[Path], None]) -> None:
    """Make the file at a `place`: whole or, when `make` raises, not at all."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        made = Path(folder) / path.name
        make(made)
        os.replace(made, path)
    name = path.name.partition(".")[2]
    of_one_name = sorted(FOLDER.glob(f"*.{name}"), key=lambda file: file.stat().st_mtime)
    for old in of_one_name[:-MOST]:
        old.unlink()


@contextlib.contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Tests that run side by side and want the same file wait for each other here."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
