"""A model on disk or on the hub: where it is, and an identity that changes with its content."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

from .. import organism
from ..records import LeadlineError
from ..text import one_line

_BLOCK, _BLOCKS = 65536, 64  # what a fingerprint reads of a large weights file
_DECISIVE = (
    *("config.json", "generation_config.json", "adapter_config.json", "*.safetensors"),
    *("*token*", "*.model", "vocab*", "merges.txt", "*.jinja", "chat_template*"),
)


@dataclass(frozen=True)
class Checkpoint:
    """Where a model lies, and what it is: a fingerprint of its folder, or a hub id's commit."""

    name: str
    path: str
    revision: str
    local: bool

    @staticmethod
    def find(name: str | Path) -> Checkpoint:
        shipped = str(name).startswith("organism:")
        home = organism.path(str(name)) if shipped else folder(name)
        if home is None:
            return Checkpoint(str(name), str(name), commit(str(name), None), False)
        check_folder(home)
        return Checkpoint(str(name), str(home), fingerprint(home), True)

    @property
    def pinned(self) -> str | None:
        return None if self.local else self.revision


def folder(path: str | Path) -> Path | None:
    """The folder of a local model; None for a hub id; LeadlineError for neither."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path)):
        what = "it is a file" if local.exists() else "there is no such folder"
        raise LeadlineError(
            f"model {path}: {what}: give a folder that save_pretrained wrote, or a hub id"
        )
    return None


def commit(hub_id: str, revision: str | None) -> str:
    """The commit that a hub id stands for here: of the snapshot in the cache, or the hub's own.
    Raises LeadlineError where there is neither, without the minutes that a download would try."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    names = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")
    try:
        for name in names:
            file = try_to_load_from_cache(hub_id, name, revision=revision)
            if isinstance(file, str):
                return Path(file).parent.name
        found = str(HfApi().model_info(hub_id, revision=revision, timeout=10).sha)
    except Exception as error:
        raise LeadlineError(
            f"model {hub_id}: neither in the cache nor at the hub ({one_line(error)}): check the "
            "id and the network, or give a folder"
        ) from error
    for name in names:
        with suppress(Exception):  # only so that the cache knows the commit when offline
            hf_hub_download(hub_id, name, revision=revision)
            break
    return found


def adapter_base(home: Path) -> str | None:
    """The model that the PEFT adapter in this folder was trained on, if it is one."""
    config = home / "adapter_config.json"
    if not config.is_file():
        return None
    try:
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise LeadlineError(
            f"{config}: not an adapter's config ({one_line(error)}): save the adapter again"
        ) from error
    return str(base)


def fingerprint(home: Path) -> str:
    """BLAKE2b-128 over what decides a folder's answers: settings and tokenizer files in full, of
    each weights file the size and up to 64 evenly spaced blocks of 64 KiB."""
    digest = blake2b(digest_size=16)
    files = {file for pattern in _DECISIVE for file in home.glob(pattern)}
    for file in sorted(files):
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"\0{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                if file.suffix != ".safetensors" or size <= _BLOCK * _BLOCKS:
                    digest.update(stream.read())
                    continue
                for block in range(_BLOCKS):
                    stream.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                    digest.update(stream.read(_BLOCK))
    base = adapter_base(home)
    if base and (local := Path(base)).is_dir():
        digest.update(fingerprint(local).encode())
    return digest.hexdigest()


def check_folder(home: Path) -> None:
    """The mistakes that transformers answers with a paragraph."""
    adapter = adapter_base(home) is not None
    if not adapter and not (home / "config.json").is_file():
        raise LeadlineError(
            f"model {home}: no config.json, so not a model: give a folder that save_pretrained "
            "wrote"
        )
    if not any(home.glob("*.safetensors")):
        pickled = any(home.glob("*.bin")) or any(home.glob("*.pt*"))
        why = "its weights are pickled, which can run code" if pickled else "it has no weights"
        raise LeadlineError(
            f"model {home}: {why}: save it with save_pretrained, which writes safetensors"
        )
    if adapter and not find_spec("peft"):
        raise LeadlineError(f"model {home} is an adapter, which needs peft: pip install peft")
