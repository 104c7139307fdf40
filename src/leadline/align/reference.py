"""Reference log-probs of the training tokens, computed before the first update and cached on disk.

They are stored as a column of the dataset, one float per token. The file's name is a hash of
everything that its content depends on: the reference's weights and config, the precision, and every
row's tokens, labels and sequence lengths. A second or resumed run therefore finds the file, and
another model, chat template, `max_length` or row leads to a new one. The reference needs no second
model in memory.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model, send_to_device
from datasets import Dataset, concatenate_datasets
from torch.nn.functional import pad

from ..records import LeadlineError

COLUMN = "reference_logps"
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
_log = logging.getLogger("leadline")
_CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq")  # adapter initializations


def model_hash(model: Any) -> str:
    """A hash of the reference's weights and config; weights of adapters are not included."""
    digest = blake2b(digest_size=16)
    # The model's location and the version that saved it do not influence what it computes.
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version")
    }
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    adapters = set(model.peft_config) if is_peft_model(model) else set()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor) and not adapters & set(name.split(".")):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(data.numpy().data)
    return digest.hexdigest()


def add_reference(
    dataset: Dataset,
    model: Any,
    *,
    reference_hash: str,
    folder: Path,
    collate: Collate,
    accelerator: Accelerator,
    batch_size: int,
    may_compute: bool = True,
) -> Dataset:
    """`dataset` with the column, read from `folder` or computed in one pass over the dataset, which
    all processes share.

    `reference_hash` is the `model_hash` of the reference. As long as `may_compute` is true, `model`
    still has the reference's weights (without its adapter, for a PEFT model). Raises LeadlineError
    where the column is not in `folder` and may not be computed.
    """
    if COLUMN in dataset.column_names:
        dataset = dataset.remove_columns(COLUMN)
    if dataset._indices is not None:  # filtered or shuffled: concatenation ignores the indices
        with accelerator.main_process_first():
            dataset = dataset.flatten_indices()
    columns = [c for c in ("input_ids", "labels", "seq_lengths") if c in dataset.column_names]
    tokens = dataset.select_columns(columns)
    data_hash, lengths = _hash_and_lengths(tokens)
    identity = f"1 {reference_hash} {accelerator.mixed_precision} {data_hash}"
    name = blake2b(identity.encode(), digest_size=16).hexdigest()
    file = folder / f"{broadcast_object_list([name])[0]}.arrow"
    # Machines may have separate disks, so the file is used only if every process finds it.
    if not all(gather_object([file.is_file()])):
        if not may_compute:
            raise LeadlineError(
                "this dataset has no reference log-probs, and the model in training is no longer "
                "the reference: give it to the trainer's constructor, as "
                "eval_dataset={name: dataset}"
            )
        computed = _compute(model, tokens, lengths, collate, accelerator, batch_size)
        rows = dict(gather_object(computed))
        if accelerator.is_local_main_process:
            _write_column(file, [rows[n] for n in range(len(lengths))])
        accelerator.wait_for_everyone()
    return concatenate_datasets([dataset, Dataset.from_file(str(file))], axis=1)


def check_responses(dataset: Dataset, name: str) -> None:
    """Raise LeadlineError for a sequence whose first token is trained: it has no prompt, so the
    start of its response is not known."""
    first = 0
    for table in dataset.with_format("arrow").iter(1000):
        ids, sizes = _flatten(table["input_ids"])
        labels = _flatten(table["labels"])[0] if "labels" in table.column_names else ids
        if "seq_lengths" in table.column_names:
            row_of = np.repeat(np.arange(len(sizes)), _flatten(table["seq_lengths"])[1])
            sizes = _flatten(table["seq_lengths"])[0]
        else:
            row_of = np.arange(len(sizes))
        row_of, sizes = row_of[sizes > 0], sizes[sizes > 0]
        invalid = row_of[labels[np.cumsum(sizes) - sizes] != -100]
        if len(invalid):
            raise LeadlineError(
                f"{name} dataset, row {first + invalid[0] + 1}: the loss covers the prompt, so the "
                "start of the response is not known: give prompt and completion columns, or "
                "messages with assistant_only_loss=True"
            )
        first += table.num_rows


def check_adapter(model: Any) -> None:
    """Raise LeadlineError for an adapter whose initialization changes the base model's weights,
    which are the reference."""
    for config in model.peft_config.values() if is_peft_model(model) else ():
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_CHANGES_WEIGHTS):
            raise LeadlineError(
                f"peft_config has init_lora_weights={start!r}, which changes the frozen weights, "
                "but the reference is the model without its adapter: use init_lora_weights=True"
            )


def _hash_and_lengths(dataset: Dataset) -> tuple[str, np.ndarray]:
    """A hash of all values of all columns, and the number of tokens of each row [rows]."""
    digest, lengths = blake2b(digest_size=16), []
    for table in dataset.with_format("arrow").iter(1000):
        for name in sorted(table.column_names):
            values, sizes = _flatten(table[name])
            digest.update(name.encode() + sizes.tobytes() + values.tobytes())
            if name == "input_ids":
                lengths.append(sizes)
    return digest.hexdigest(), np.concatenate([*lengths, np.empty(0, np.int64)])


def _flatten(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The concatenated values of a column of lists, and the length of each list."""
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
    """This process's share of the rows: (row, log-probs [tokens of the row])."""
    _log.info("computing reference log-probs of %d rows", len(lengths))
    # Rows of similar length share a batch. The longest come first, so that a lack of memory shows
    # at once.
    order = np.argsort(-lengths, kind="stable")[
        accelerator.process_index :: accelerator.num_processes
    ]
    computed: list[tuple[int, np.ndarray]] = []
    with as_reference(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size].tolist()
            columns = dataset[rows]
            examples = [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
            batch = send_to_device(collate(examples), accelerator.device)
            with accelerator.autocast():
                outputs = model(**batch, use_cache=False, fused_lm_head=True)
            # The first token has no log-prob. A padding-free batch is one row without gaps.
            logps = pad(outputs.log_probs.float(), (1, 0)).cpu().numpy()
            if len(logps) < len(rows):
                logps = np.split(logps[0], np.cumsum(lengths[rows])[:-1])
            computed += [(n, row[: lengths[n]]) for n, row in zip(rows, logps, strict=True)]
    return computed


@contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """Disable the adapter, dropout and gradients; on exit the model's mode is restored."""
    training = model.training
    without_adapter: AbstractContextManager[Any] = (
        model.disable_adapter() if is_peft_model(model) else nullcontext()
    )
    model.eval()
    try:
        with torch.no_grad(), without_adapter:
            yield
    finally:
        model.train(training)


def _write_column(file: Path, rows: Sequence[np.ndarray]) -> None:
    """Write to a temporary file that is then renamed, so that `file` is always complete."""
    offsets = np.cumsum([0, *map(len, rows)])
    values = np.concatenate([*rows, np.empty(0, np.float32)])
    table = pa.table({COLUMN: pa.LargeListArray.from_arrays(offsets, values)})
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    with pa.ipc.new_stream(part, table.schema) as stream:
        stream.write_table(table, max_chunksize=1000)
    part.replace(file)
