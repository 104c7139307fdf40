"""Result files: only their owner can read them, and a reader never sees half of one.

Results hold harmful prompts and answers, so folders get mode 0700 and files 0600.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from .records import LeadlineError
from .secret import scrub


def private_folder(folder: Path) -> Path:
    """Create a folder that only its owner can open, and its missing parents, and return it. A
    folder that exists keeps its mode. Raises OSError."""
    if not folder.is_dir():
        private_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def private_file(path: Path) -> Path:
    """Create an empty file with mode 0600 if it is missing; set the mode of one that exists.
    Returns the path. Raises OSError."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    if path.stat().st_uid == os.geteuid():  # another user's file cannot be changed
        path.chmod(0o600)
    return path


def write_private(path: Path, text: str) -> None:
    """Write a text file with mode 0600, without the configured secrets, in a folder that is created
    if it is missing. The text goes to a temporary file that is then renamed, so that an
    interrupted write leaves the previous version. Raises LeadlineError if it cannot be written."""
    text, part = scrub(text), ""
    try:
        private_folder(path.parent)
        if path.exists() and not path.is_file():  # a pipe or a terminal
            path.write_text(text, encoding="utf-8")
            return
        handle, part = tempfile.mkstemp(prefix=".leadline-", suffix=".part", dir=path.parent)
        with open(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(part, path.resolve())
    except OSError as error:
        if part:
            with suppress(OSError):
                os.unlink(part)
        raise LeadlineError(
            f"cannot write {path} ({error.strerror}): free space or correct the permissions, or "
            "write to another folder"
        ) from None
