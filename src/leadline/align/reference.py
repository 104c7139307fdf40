"""Reference log-probs of the training tokens: one pass before the first update, kept on disk.

One float per token, as a column of the dataset. The file's name is a hash of all that decides its
content: the reference's weights and config, the precision, and every row's tokens, labels and
sequence lengths. So a second run or a resumed one finds it, and another model, template,
`max_length` or row makes a new one. No second model is ever in memory.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model, send_to_device
from datasets import Dataset, concatenate_datasets
from torch.nn.functional import cross_entropy, pad
from trl.trainer.utils import FusedCausalLMOutput

from ..records import LeadlineError

COLUMN = "reference_logps"
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
_log = logging.getLogger("leadline")
_MOVED = ("pissa", "olora", "corda", "loftq")


def narrows(model: Any) -> bool:
    """Whether `token_logps` may leave the fused head: on a CPU, where TRL's scores prompts and
    padding, too. A prompt-learning adapter moves the positions, so it may not."""
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        return False
    base = model.get_base_model() if is_peft_model(model) else model
    return model.device.type == "cpu" and "logits_to_keep" in signature(base.forward).parameters


def token_logps(model: Any, inputs: Mapping[str, Any], narrow: bool) -> FusedCausalLMOutput:
    """What `model(**inputs, fused_lm_head=True)` returns: per token [rows, tokens - 1] log_probs,
    entropy, is_top1 and label_mask. With `narrow`, from logits of the trained positions alone."""
    if not narrow:
        fused: FusedCausalLMOutput = model(**inputs, fused_lm_head=True)
        return fused
    given = dict(inputs)
    labels = given.pop("labels")[:, 1:]
    mask = labels != -100
    columns = mask.any(0).nonzero()[:, 0]  # in some row
    outputs = model(**given, logits_to_keep=columns)
    logits = outputs.logits.flatten(0, 1).float()
    kept = labels[:, columns].flatten()
    logps = -cross_entropy(logits, kept, reduction="none")  # 0 where the label is -100
    with torch.no_grad():  # some rows at a time: two more copies of all logits would be much
        chances = (rows.log_softmax(-1) for rows in logits.split(32))
        parts = [(-(rows.exp() * rows).sum(-1), rows.argmax(-1)) for rows in chances]
        entropy, best = (torch.cat(part) for part in zip(*parts, strict=True))

    def spread(values: torch.Tensor) -> torch.Tensor:
        shape = (len(labels), len(columns))
        return values.new_zeros(mask.shape).index_copy(1, columns, values.view(shape))

    return FusedCausalLMOutput(
        log_probs=spread(logps),
        entropy=spread(entropy.where(kept != -100, 0)),
        is_top1=spread(best == kept),
        label_mask=mask,
        aux_loss=getattr(outputs, "aux_loss", None),
    )


def model_hash(model: Any) -> str:
    """Of the weights and the config that the reference pass runs; an adapter's are left out."""
    seen = blake2b(digest_size=16)
    # Where a model lies and what wrote it decide nothing that it computes.
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version")
    }
    seen.update(json.dumps(config, sort_keys=True, default=str).encode())
    adapters = set(model.peft_config) if is_peft_model(model) else set()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor) and not adapters & set(name.split(".")):
            seen.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            seen.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()


def add_reference(
    dataset: Dataset,
    model: Any,
    *,
    of: str,
    folder: Path,
    collate: Collate,
    accelerator: Accelerator,
    batch_size: int,
    may_compute: bool = True,
) -> Dataset:
    """`dataset` with the column, from `folder` or by one pass over it that all processes share.

    `of` is the model_hash of the reference, of which `model` holds the weights (under an adapter,
    where it has one) as long as `may_compute`.
    """
    if COLUMN in dataset.column_names:
        dataset = dataset.remove_columns(COLUMN)
    if dataset._indices is not None:  # filtered or shuffled: a column stands beside whole rows
        with accelerator.main_process_first():
            dataset = dataset.flatten_indices()
    columns = [c for c in ("input_ids", "labels", "seq_lengths") if c in dataset.column_names]
    tokens = dataset.select_columns(columns)
    digest, lengths = _scan(tokens)
    named = blake2b(f"1 {of} {accelerator.mixed_precision} {digest}".encode(), digest_size=16)
    file = folder / f"{broadcast_object_list([named.hexdigest()])[0]}.arrow"
    # All ask before any computes: disks may differ between machines.
    if not all(gather_object([file.is_file()])):
        if not may_compute:
            raise LeadlineError(
                "no reference log-probs of this dataset, and the model is no longer the reference: "
                "give it to the trainer when you make it, in eval_dataset={name: dataset}"
            )
        mine = _compute(model, tokens, lengths, collate, accelerator, batch_size)
        rows = dict(gather_object(mine))
        if accelerator.is_local_main_process:
            _write(file, [rows[n] for n in range(len(lengths))])
        accelerator.wait_for_everyone()
    return concatenate_datasets([dataset, Dataset.from_file(str(file))], axis=1)


def check_responses(dataset: Dataset, name: str) -> None:
    """Raises LeadlineError for a sequence whose loss begins with its first token: it has no prompt,
    so there is no saying where in it a response begins."""
    first = 0
    for table in dataset.with_format("arrow").iter(1000):
        ids, sizes = _flat(table["input_ids"])
        labels = _flat(table["labels"])[0] if "labels" in table.column_names else ids
        if "seq_lengths" in table.column_names:
            row_of = np.repeat(np.arange(len(sizes)), _flat(table["seq_lengths"])[1])
            sizes = _flat(table["seq_lengths"])[0]
        else:
            row_of = np.arange(len(sizes))
        row_of, sizes = row_of[sizes > 0], sizes[sizes > 0]
        wrong = row_of[labels[np.cumsum(sizes) - sizes] != -100]
        if len(wrong):
            raise LeadlineError(
                f"{name} dataset, row {first + wrong[0] + 1}: the loss covers the prompt, so there "
                "is no response to count tokens of: give prompt and completion columns, or "
                "messages with assistant_only_loss=True"
            )
        first += table.num_rows


def check_adapter(model: Any) -> None:
    """Raises LeadlineError for an adapter that moves the weights which the reference needs."""
    for config in model.peft_config.values() if is_peft_model(model) else ():
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_MOVED):
            raise LeadlineError(
                f"peft_config has init_lora_weights={start!r}, which changes the frozen weights, "
                "and the reference is the model without its adapter: use init_lora_weights=True"
            )


def _scan(dataset: Dataset) -> tuple[str, np.ndarray]:
    """A hash of every value of every column, and every row's number of tokens."""
    seen, lengths = blake2b(digest_size=16), []
    for table in dataset.with_format("arrow").iter(1000):
        for name in sorted(table.column_names):
            values, sizes = _flat(table[name])
            seen.update(name.encode() + sizes.tobytes() + values.tobytes())
            if name == "input_ids":
                lengths.append(sizes)
    return seen.hexdigest(), np.concatenate([*lengths, np.empty(0, np.int64)])


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists: all values one after another, and every list's length."""
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    sizes = pc.list_value_length(column).to_numpy()
    return values.astype(np.int64), sizes.astype(np.int64)


def _compute(
    model: Any,
    dataset: Dataset,
    lengths: np.ndarray,
    collate: Collate,
    accelerator: Accelerator,
    batch_size: int,
) -> list[tuple[int, np.ndarray]]:
    """This process's share: (row, log-probs [tokens of the row])."""
    _log.info("reference log-probs of %d rows, once", len(lengths))
    # Rows of like length share a batch, and the longest come first: if memory ends, at once.
    order = np.argsort(-lengths, kind="stable")[
        accelerator.process_index :: accelerator.num_processes
    ]
    narrow, done = narrows(model), []
    with as_reference(model):
        for at in range(0, len(order), batch_size):
            rows = order[at : at + batch_size].tolist()
            columns = dataset[rows]
            examples = [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
            batch = send_to_device(collate(examples), accelerator.device)
            with accelerator.autocast():
                logps = token_logps(model, {**batch, "use_cache": False}, narrow).log_probs
            # The first token has none. A padding-free batch is one row, without gaps.
            found = pad(logps.float(), (1, 0)).cpu().numpy()
            if len(found) < len(rows):
                found = np.split(found[0], np.cumsum(lengths[rows])[:-1])
            done += [(n, row[: lengths[n]]) for n, row in zip(rows, found, strict=True)]
    return done


@contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """Without adapter, dropout and gradients; the model is left as it was found."""
    training = model.training
    plain: AbstractContextManager[Any] = (
        model.disable_adapter() if is_peft_model(model) else nullcontext()
    )
    model.eval()
    try:
        with torch.no_grad(), plain:
            yield
    finally:
        model.train(training)


def _write(file: Path, rows: Sequence[np.ndarray]) -> None:
    """Whole or not at all: a killed run leaves no half file behind under the file's name."""
    offsets = np.cumsum([0, *map(len, rows)])
    values = np.concatenate([*rows, np.empty(0, np.float32)])
    table = pa.table({COLUMN: pa.LargeListArray.from_arrays(offsets, values)})
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    with pa.ipc.new_stream(part, table.schema) as stream:
        stream.write_table(table, max_chunksize=1000)
    part.replace(file)
