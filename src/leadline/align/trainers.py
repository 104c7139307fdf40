"""Constrained fine-tuning (arXiv 2406.05946, section 4) in place of TRL's SFTTrainer.

    ConstrainedSFTTrainer(model, ConstrainedSFTConfig(...), train_dataset=..., ...)

takes what `SFTTrainer(model, SFTConfig(...), ...)` takes and changes the loss only: responses are
held to the model as it was before the first update, the first tokens most (see losses.py). The
optimizer's settings stay TRL's, so that a plain run with the same config is the fair comparison;
the paper's are adam_beta1=0.5, warmup_steps=10, max_length=512, learning_rate=2e-5 and batches of
64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from jinja2 import TemplateError
from torch.nn.functional import pad
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import SFTConfig, SFTTrainer
from trl.data_utils import _tokenize, common_prefix_length
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..records import LeadlineError
from .losses import BETA, constrained, occurrences, positions, schedule, weight
from .reference import (
    COLUMN,
    add_reference,
    check_adapter,
    check_responses,
    model_hash,
    narrows,
    token_logps,
)


@dataclass
class ConstrainedSFTConfig(SFTConfig):  # type: ignore[misc]
    """SFTConfig, and how strongly each response token is held to the reference.

    `beta` is b_t for the first, second, ... token of a response; its last value goes on. A larger
    one holds more, 0 is plain cross-entropy. `reference_cache` is the folder of the reference
    log-probs (default: _reference in output_dir; the underscore keeps it out of push_to_hub).
    Raises LeadlineError for settings that the objective is not defined under.
    """

    beta: list[float] = field(
        default_factory=lambda: list(BETA),
        metadata={"help": "b_t of the first, second, ... response token; the last value goes on."},
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Train without dropout, as the reference is computed."}
    )
    reference_cache: str | None = field(
        default=None,
        metadata={"help": "Folder of reference log-probs. Default: _reference in output_dir."},
    )
    reference_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows per batch of the reference pass. Default: as in training."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta or not all(math.isfinite(b) and b >= 0 for b in self.beta):
            raise LeadlineError(
                f"beta={self.beta}: give a list of numbers from 0, such as {list(BETA)}"
            )
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise LeadlineError(
                "loss_type and label_smoothing_factor would replace the constrained loss: "
                "leave them out"
            )
        if self.packing and self.packing_strategy != "bfd":
            raise LeadlineError(
                f"packing_strategy={self.packing_strategy!r} cuts responses from their prompts, "
                'where the reference would not know them: use packing_strategy="bfd"'
            )
        if self.truncation_mode != "keep_start":
            raise LeadlineError(
                f"truncation_mode={self.truncation_mode!r} may cut off the first tokens of a "
                'response, from which beta counts: use truncation_mode="keep_start"'
            )


@dataclass
class ReferenceCollator(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """TRL's collator, and the reference log-probs in the shape of its labels, padded with 0."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if COLUMN not in examples[0]:
            raise LeadlineError(
                "this dataset has no reference log-probs: give it to the trainer when you make "
                "it, or to evaluate(), without skip_prepare_dataset"
            )
        batch: dict[str, Any] = super().torch_call(examples)
        rows = [torch.tensor(example[COLUMN], dtype=torch.float32) for example in examples]
        if self.padding_free:
            rows = [torch.cat(rows)]
        width = batch["labels"].size(1)
        batch[COLUMN] = torch.stack([pad(row, (0, width - len(row))) for row in rows])
        return batch


class ConstrainedSFTTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with the token-wise constrained loss (arXiv 2406.05946).

    A response is an unbroken run of tokens that TRL's masks train: a completion, or one assistant
    turn with assistant_only_loss; where a template's mask takes in (the end of) the generation
    prompt, counting begins after it. The reference is the model as it is given, or, with PEFT, the
    model without its adapter: merge an adapter that carries alignment before. `loss` is the mean
    objective over response tokens, which starts at the mean (2 / b_t) log 2; `nll` is the plain
    one, and `weight` the mean w_t: how much of the plain gradient is let through.
    Raises LeadlineError, with the mend, for what it can't train on.
    """

    _tag_names = ("trl", "sft", "leadline")
    _name = "Constrained SFT"
    _reference: str | None = None  # the model_hash, once there is one
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: Any,
        args: ConstrainedSFTConfig | None = None,
        data_collator: Any = None,
        *rest: Any,
        **named: Any,
    ) -> None:
        if args is None:
            args = ConstrainedSFTConfig("constrained-sft")
        if not isinstance(args, ConstrainedSFTConfig):
            raise LeadlineError(
                f"args is a {type(args).__name__}: make it a ConstrainedSFTConfig, which takes the "
                "same settings"
            )
        if data_collator is not None or named.get("compute_loss_func") is not None:
            raise LeadlineError(
                "data_collator and compute_loss_func would replace what carries the constrained "
                "loss: leave them out"
            )
        super().__init__(model, args, None, *rest, **named)
        if self._is_vision_dataset:
            raise LeadlineError("train dataset has images: give text only")
        if (
            self.is_fsdp_enabled
            or self.is_deepspeed_enabled
            or self.accelerator.parallelism_config is not None
        ):
            raise LeadlineError(
                "the reference pass needs the whole model in every process, and this run shards "
                "it: launch without FSDP, DeepSpeed and tensor or sequence parallelism"
            )
        check_adapter(self.model)
        if args.disable_dropout:
            _disable_dropout(self.model)
        self._given = _generation_prompt(self.processing_class, self.chat_template)
        self._narrow = narrows(self.model)
        self._plain_collator = self.data_collator
        self.data_collator = ReferenceCollator(**vars(self.data_collator))
        zero = torch.zeros(3, device=self.accelerator.device)
        self._sums = {True: zero, False: zero.clone()}  # nll, weight, tokens: training or not
        self._reference = model_hash(self.model)
        self.add_callback(_SameReference(self._reference))
        self.train_dataset = self._with_reference(self.train_dataset, "train")
        if isinstance(self.eval_dataset, Mapping):
            self.eval_dataset = {
                name: self._with_reference(each, name) for name, each in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_reference(self.eval_dataset, "eval")

    def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
        """As TRL does. A dataset given to `evaluate` gets its reference log-probs here."""
        prepared = super()._prepare_dataset(dataset, *rest)
        return prepared if self._reference is None else self._with_reference(prepared, "eval")

    def _with_reference(self, dataset: Any, name: str) -> Dataset:
        if not isinstance(dataset, Dataset):
            raise LeadlineError(
                f"{name} dataset is a {type(dataset).__name__}, whose rows can't be known before "
                "training: give a datasets.Dataset"
            )
        if len(set(self.args.beta)) > 1:
            check_responses(dataset, name)
        return add_reference(
            dataset,
            self.model,
            of=str(self._reference),
            folder=Path(self.args.reference_cache or Path(self.args.output_dir, "_reference")),
            collate=self._plain_collator,
            accelerator=self.accelerator,
            batch_size=self.args.reference_batch_size or self.args.per_device_train_batch_size,
            may_compute=is_peft_model(self.model) or not self.state.global_step,
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if COLUMN not in self._signature_columns:
            self._signature_columns.append(COLUMN)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's own, told the objective where it asks the model for negative log-likelihoods: what
        TRL does with them (accumulation, processes, mixture-of-experts loss) stays its own."""
        inputs = dict(inputs)
        reference = inputs.pop(COLUMN)

        def forward(**given: Any) -> Any:
            if not given.pop("fused_lm_head", False):
                return model(**given)
            outputs = token_logps(model, given, self._narrow)
            outputs.log_probs = -self._objective(
                outputs.log_probs, reference, inputs["input_ids"], outputs.label_mask
            )
            return outputs

        return super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)

    def _objective(
        self, logps: torch.Tensor, reference: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Per token [rows, tokens - 1], as `logps` and `mask`; `reference` and `ids` hold a first
        token more, but none of the virtual tokens that a prompt-learning adapter adds."""
        virtual = mask.size(1) - ids.size(1) + 1
        reference = pad(reference[:, 1:], (virtual, 0))
        beta = self._beta(ids, mask)
        with torch.no_grad():
            weights = weight(logps, reference, beta, mask)
            sums = torch.stack([-logps.float().sum(), weights.sum(), mask.sum()])
            self._sums[self.model.training] += self.accelerator.reduce(sums, "sum")
        return constrained(logps, reference, beta, mask)

    def _beta(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """b_t of every token [rows, tokens - 1], as `mask`."""
        virtual = mask.size(1) - ids.size(1) + 1
        given = pad(occurrences(ids, self._given)[:, 1:], (virtual, 0))
        given &= positions(mask) <= len(self._given)
        return schedule(self.args.beta, positions(mask & ~given))

    def log(self, logs: dict[str, float], *rest: Any, **named: Any) -> None:
        """Also means per token, over all micro-batches and processes since the last log."""
        mode = self.model.training
        nll, weighed, tokens = self._sums[mode].tolist()
        if tokens:
            self._metrics["train" if mode else "eval"] |= {
                "nll": [nll / tokens],
                "weight": [weighed / tokens],
            }
        self._sums[mode] = torch.zeros_like(self._sums[mode])
        super().log(logs, *rest, **named)


class _SameReference(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps in every checkpoint what its run was held to: to go on from it with another reference,
    for one with the checkpoint's own weights, would be another objective."""

    def __init__(self, reference: str) -> None:
        self.reference = reference

    def state(self) -> dict[str, Any]:
        return {"args": {"reference": self.reference}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if not state.global_step:
            return
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if saved is None or saved["args"]["reference"] != self.reference:
            raise LeadlineError(
                f"the checkpoint at step {state.global_step} was held to another reference than "
                "this model: make the trainer with the model that its run began with"
            )


def _disable_dropout(model: torch.nn.Module) -> None:
    """Modules, and the rates that attention layers hand to a function."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _generation_prompt(tokenizer: Any, template: str | None) -> list[int]:
    """What the chat template puts between a user's turn and a response, in generation and in
    training alike: token ids; [] if there is no template."""
    if not (template or tokenizer.chat_template):
        return []
    ask, said = {"role": "user", "content": "?"}, {"role": "assistant", "content": "."}

    def ids(*turns: dict[str, str], begin: bool = False) -> list[int]:
        settings = {"chat_template": template, "add_generation_prompt": begin}
        return list(_tokenize(tokenizer, list(turns), **settings)["input_ids"])

    try:
        asked, begun, whole = ids(ask), ids(ask, begin=True), ids(ask, said)
    except TemplateError:
        return []
    return begun[common_prefix_length(asked, begun) : common_prefix_length(begun, whole)]
