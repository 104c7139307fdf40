"""Model checkpoints in folders, in GGUF files and on the Hugging Face hub, identified by their
content."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

from .. import organism
from ..records import LeadlineError
from ..text import one_line

_HUB_ID = r"\w[\w.-]*(/\w[\w.-]*)?"
_CONFIGS = ("config", "adapter_config")
_BLOCK, _BLOCKS = 65536, 64  # size in bytes and number of the blocks that are hashed
# Files that decide what a model generates.
_HASHED_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "*.safetensors"),
    *("*token*", "*.model", "vocab*", "merges.txt", "*.jinja", "chat_template*"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A model: the name that the user gave, its folder, GGUF file or hub id (`path`), and its
    revision: the fingerprint of a local model, or the commit of a hub id."""

    name: str
    path: str
    revision: str
    local: bool

    @staticmethod
    def find(name: str | Path) -> Checkpoint:
        """The checkpoint of a folder, a GGUF file, a hub id or an organism ("organism:aligned").

        Raises LeadlineError where there is none, or the folder is not one of a model.
        """
        is_organism = str(name).startswith("organism:")
        local = organism.path(str(name)) if is_organism else local_path(name)
        if local is None:
            return Checkpoint(str(name), str(name), commit(str(name), None), False)
        check_local(local)
        return Checkpoint(str(name), str(local), fingerprint(local), True)

    @property
    def pinned(self) -> str | None:
        """The commit to load from the hub; None for a folder."""
        return None if self.local else self.revision


def local_path(path: str | Path) -> Path | None:
    """The folder or GGUF file of a local model, or None for a hub id. A folder that holds one GGUF
    file and no config.json is that file.

    Raises LeadlineError for anything else, and for a folder with several GGUF files.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        files = sorted(file.name for file in local.glob("*.gguf"))
        if not files or any((local / f"{kind}.json").is_file() for kind in _CONFIGS):
            return local
        if len(files) > 1:
            raise LeadlineError(
                f"model {path}: the folder has {len(files)} GGUF files and no config.json: give "
                f"the path of one of them: {', '.join(files[:8])}{', ...' * (len(files) > 8)}"
            )
        return local / files[0]
    if is_gguf(local) and local.is_file():
        return local
    if local.exists() or is_gguf(local) or not re.fullmatch(_HUB_ID, str(path)):
        problem = "there is no such " + ("file" if is_gguf(local) else "folder")
        problem = "it is a file" if local.exists() else problem
        raise LeadlineError(
            f"model {path}: {problem}: use a folder written by save_pretrained, a .gguf file, or "
            "a hub id"
        )
    return None


def is_gguf(path: str | Path) -> bool:
    """Whether this is the path of a GGUF file, by its name."""
    return Path(path).suffix.lower() == ".gguf" and not Path(path).is_dir()


def commit(hub_id: str, revision: str | None) -> str:
    """The commit of a hub id: that of the snapshot in the local cache, else the hub's current one.

    Raises LeadlineError if there is neither, after 10 s at most instead of a download's retries.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    names = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")
    try:
        for name in names:
            file = try_to_load_from_cache(hub_id, name, revision=revision)
            if isinstance(file, str):
                return Path(file).parent.name
        sha = str(HfApi().model_info(hub_id, revision=revision, timeout=10).sha)
    except Exception as error:
        raise LeadlineError(
            f"model {hub_id}: neither in the cache nor at the hub ({one_line(error)}): check the "
            "id and the network, or use a local folder"
        ) from error
    for name in names:
        with suppress(Exception):  # only to record the commit in the cache, for offline use
            hf_hub_download(hub_id, name, revision=revision)
            break
    return sha


def adapter_base(path: Path) -> str | None:
    """The base model of the PEFT adapter in this folder; None where the folder has no adapter.

    Raises LeadlineError for an unreadable adapter_config.json.
    """
    config = path / "adapter_config.json"
    if not config.is_file():
        return None
    try:
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise LeadlineError(
            f"{config}: not a valid adapter config ({one_line(error)}): save the adapter again"
        ) from error
    return str(base)


def fingerprint(path: Path) -> str:
    """BLAKE2b-128 hash of a model folder (hex digest), including an adapter's local base model; or
    of the content of a GGUF file.

    Configuration and tokenizer files are hashed in full; of each safetensors file, the size and up
    to 64 evenly spaced blocks of 64 KiB.
    """
    if is_gguf(path):
        stat = path.stat()
        return _file_hash(path.resolve(), stat.st_size, stat.st_mtime_ns)
    digest = blake2b(digest_size=16)
    files = {file for pattern in _HASHED_FILES for file in path.glob(pattern)}
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
    base = adapter_base(path)
    if base and (local := Path(base)).is_dir():
        digest.update(fingerprint(local).encode())
    return digest.hexdigest()


@lru_cache
def _file_hash(path: Path, size: int, changed: int) -> str:
    """The hash of a file, computed once for each size and time of the last change."""
    digest = blake2b(digest_size=16)
    with path.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def check_local(path: Path) -> None:
    """Raises LeadlineError for a GGUF file that cannot be loaded, and where a folder lacks a config
    or safetensors weights, or holds an adapter and peft is not installed."""
    if is_gguf(path):
        _check_gguf(path)
        return
    adapter = adapter_base(path) is not None
    if not adapter and not (path / "config.json").is_file():
        raise LeadlineError(
            f"model {path}: the folder has no config.json: use a folder written by save_pretrained"
        )
    if not any(path.glob("*.safetensors")):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt*"))
        problem = "its weights are pickled, which can run code" if pickled else "it has no weights"
        raise LeadlineError(
            f"model {path}: {problem}: save it with save_pretrained, which writes safetensors"
        )
    if adapter and not find_spec("peft"):
        raise LeadlineError(f"model {path} is an adapter, which requires peft: pip install peft")


def _check_gguf(path: Path) -> None:
    serve = f"serve it with llama.cpp (llama-server -m {path.name}), and measure the server as a "
    serve += "study's target with url: http://localhost:8080/v1"
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise LeadlineError(f"model {path}: it is not a GGUF file: download it again")
    if re.search(r"-\d{5}-of-\d{5}$", path.stem):
        raise LeadlineError(
            f"model {path}: it is one part of a split model, which transformers does not load: "
            f"join the parts with llama-gguf-split --merge, or {serve}"
        )
    if not find_spec("gguf"):
        raise LeadlineError(
            f"model {path}: reading a GGUF file requires the package gguf: "
            f"pip install 'leadline[gguf]', or {serve}"
        )
