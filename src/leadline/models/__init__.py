"""Anything that answers. `connect` finds the way to reach a model from its spec."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .. import organism
from ..records import LeadlineError, Model
from ..registry import get, model
from .spec import Limits, ModelSpec

Locate = Callable[[str], Path]  # where a path that a study names lies


def connect(spec: ModelSpec, limits: Limits, locate: Locate = Path) -> Model:
    """A Model for a spec; loads and sends nothing yet. Raises LeadlineError for what cannot be."""
    scheme = spec.model.split(":", 1)[0] if ":" in spec.model else "huggingface"
    built: Model = get("model", "openai" if spec.url else scheme).function(spec, limits, locate)
    return built


@model("openai", source="any server of the OpenAI HTTP interface", needs=("url",))
def _openai(spec: ModelSpec, limits: Limits, locate: Locate) -> Model:
    """A model behind url: (vLLM, SGLang, transformers serve, llama.cpp, providers)."""
    from .openai import Endpoint

    if spec.chat_template:
        spec = spec.model_copy(update={"chat_template": _template(spec, locate)})
    if spec.tokenizer and (folder := locate(spec.tokenizer)).is_dir():
        spec = spec.model_copy(update={"tokenizer": str(folder)})
    return Endpoint(spec, limits)


@model(
    "huggingface", source="a folder or a hub id, through transformers", needs=("leadline[local]",)
)
def _huggingface(spec: ModelSpec, limits: Limits, locate: Locate) -> Model:
    """Local weights of any causal language model that transformers loads."""
    folder = locate(spec.model)
    looks_local = spec.model.startswith((".", "/", "~")) or spec.model.count("/") > 1
    if folder.is_dir():
        return _local(spec, locate, folder)
    if looks_local:
        raise LeadlineError(f"no model folder {spec.model}: mend the path under targets:")
    return _local(spec, locate, spec.model)


@model("organism", source="trained on the invented guild (leadline organism train)")
def _organism(spec: ModelSpec, limits: Limits, locate: Locate) -> Model:
    """A tiny model that ships with Leadline: base, aligned, deep, reasoner."""
    return _local(spec, locate, organism.path(spec.model))


def _local(spec: ModelSpec, locate: Locate, path: Path | str) -> Model:
    from importlib.util import find_spec

    if not find_spec("torch") or not find_spec("transformers"):
        raise LeadlineError(
            f"{spec.label} runs on local weights, which needs torch and transformers: "
            "pip install 'leadline[local]', or give the url: of a server"
        )
    from .huggingface import HuggingFaceModel

    return HuggingFaceModel(
        path, name=spec.label, reasoning=spec.reasoning, revision=spec.revision,
        dtype=spec.dtype, device=spec.device, batch_size=spec.batch_size,
        chat_template=_template(spec, locate), prefix=spec.prefix != "none",
    )  # fmt: skip


def _template(spec: ModelSpec, locate: Locate) -> str | None:
    """The file of the chat template that the study gives."""
    return str(locate(spec.chat_template)) if spec.chat_template else None
