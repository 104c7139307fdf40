"""Model interfaces: HTTP endpoints, local weights, organisms. `connect` makes a Model of a spec."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import orjson

from .. import organism
from ..records import LeadlineError, Model
from ..registry import get, model
from ..secret import trace
from ..text import one_line
from .checkpoint import is_gguf
from .spec import Limits, ModelSpec

log = logging.getLogger("leadline")

# Resolves a path in a study file (relative to the file) to a path on disk.
Locate = Callable[[str], Path]


def connect(spec: ModelSpec, limits: Limits, locate: Locate = Path) -> Model:
    """Return a Model for `spec` without loading weights or sending requests.

    `spec.url` selects the HTTP interface; otherwise the scheme before the colon in `spec.model`
    selects it ("organism:deep"), with huggingface as the default. Raises LeadlineError for an
    unknown scheme, a missing model folder or a missing dependency.
    """
    scheme = spec.model.split(":", 1)[0] if ":" in spec.model else "huggingface"
    plugin = get("model", "openai" if spec.url else scheme)
    who = f"{spec.label}: the model plug-in {plugin.name!r}"
    with _named(who):
        connected: Model = plugin.function(spec, limits, locate)
    return checked(connected, who)


def checked(model: Model, who: str) -> Model:
    """The model, whose properties have been read once, so that a plug-in's errors are found before
    the first request. Raises LeadlineError, which names it as `who`."""
    with _named(who):
        if type(model.concurrency) is not int or model.concurrency < 1:
            raise TypeError("concurrency is not a positive whole number")
        if not isinstance(model.name, str):
            raise TypeError("name is not a string")
        if not isinstance(model.identity, Mapping):
            raise TypeError("identity is not a mapping")
        orjson.dumps(dict(model.identity))  # raises for values that are not JSON
    return model


async def prepare(model: Model, *, prefix: bool = False) -> str:
    """`Model.prepare`. Raises LeadlineError, which names the model, whatever a plug-in raises."""
    with _named(f"the model {model.name}"):
        reason = await model.prepare(prefix=prefix)
        if not isinstance(reason, str):
            raise TypeError("prepare returned no string")
        return reason


async def close(model: Model) -> None:
    """`Model.close`; an error is logged, since the responses are stored already."""
    try:
        await model.close()
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        log.warning("the model %s raised %s when it closed: %s", model.name, kind, one_line(error))


@contextmanager
def _named(who: str) -> Iterator[None]:
    """Turn exceptions of a plug-in into a LeadlineError that names it."""
    try:
        yield
    except LeadlineError:
        raise
    except (Exception, SystemExit) as error:
        log.debug("%s raised:\n%s", who, trace(error))
        raise LeadlineError(
            f"{who} raised {type(error).__name__}: {one_line(error)}: check its fields in the "
            "study, or the plug-in's package"
        ) from error


@model("openai", source="any server with the OpenAI HTTP API", needs=("url",))
def _openai(spec: ModelSpec, limits: Limits, locate: Locate) -> Model:
    """A model behind url: (vLLM, SGLang, transformers serve, llama.cpp, providers)."""
    from .openai import Endpoint

    if spec.chat_template:
        spec = spec.model_copy(update={"chat_template": _template(spec, locate)})
    if spec.tokenizer and (folder := locate(spec.tokenizer)).is_dir():
        spec = spec.model_copy(update={"tokenizer": str(folder)})
    return Endpoint(spec, limits)


@model(
    "huggingface",
    source="a folder, a .gguf file or a hub id, through transformers",
    needs=("leadline[local]",),
)
def _huggingface(spec: ModelSpec, limits: Limits, locate: Locate) -> Model:
    """Local weights of any causal language model that transformers loads."""
    path = locate(spec.model)
    looks_local = spec.model.startswith((".", "/", "~")) or spec.model.count("/") > 1
    if path.is_dir() or (is_gguf(path) and path.is_file()):
        return _local(spec, locate, path)
    if is_gguf(path):
        raise LeadlineError(f"no model file {spec.model}: correct the path under targets:")
    if looks_local:
        raise LeadlineError(f"no model folder {spec.model}: correct the path under targets:")
    return _local(spec, locate, spec.model)


@model("organism", source="trained on a synthetic guild world (leadline organism train)")
def _organism(spec: ModelSpec, limits: Limits, locate: Locate) -> Model:
    """A tiny model organism that ships with Leadline: base, aligned, deep, reasoner."""
    return _local(spec, locate, organism.path(spec.model))


def _local(spec: ModelSpec, locate: Locate, path: Path | str) -> Model:
    from importlib.util import find_spec

    if not find_spec("torch") or not find_spec("transformers"):
        raise LeadlineError(
            f"{spec.label}: local weights need torch and transformers: "
            "pip install 'leadline[local]', or set url: to use a server"
        )
    from .huggingface import HuggingFaceModel

    return HuggingFaceModel(
        path, name=spec.label, reasoning=spec.reasoning, revision=spec.revision,
        dtype=spec.dtype, device=spec.device, batch_size=spec.batch_size,
        chat_template=_template(spec, locate), prefix=spec.prefix != "none",
    )  # fmt: skip


def _template(spec: ModelSpec, locate: Locate) -> str | None:
    """The path of the study's chat template file, or None."""
    return str(locate(spec.chat_template)) if spec.chat_template else None
