"""Constrained fine-tuning (arXiv 2406.05946, section 4) as a replacement for TRL's SFTTrainer.

    ConstrainedSFTTrainer(model, ConstrainedSFTConfig(...), train_dataset=..., ...)

takes the arguments of `SFTTrainer(model, SFTConfig(...), ...)` and changes only the loss: responses
are constrained to the model as it was before the first update, most strongly in their first tokens
(see losses.py). The optimizer's settings are TRL's, so that plain fine-tuning with the same config
is a fair comparison. The paper's are adam_beta1=0.5, warmup_steps=10, max_length=512,
learning_rate=2e-5 and batches of 64 (`leadline finetune --preset paper`).
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
from .losses import BETA, constrained_loss, gradient_weight, occurrences, positions, schedule
from .output_layer import use_learned_tokens
from .reference import (
    COLUMN,
    add_reference,
    check_adapter,
    check_responses,
    model_hash,
)


@dataclass
class ConstrainedSFTConfig(SFTConfig):  # type: ignore[misc]
    """SFTConfig, plus the strength of the constraint on each response token.

    `beta` is b_t of the first, second, ... token of a response; its last value applies to all later
    tokens. A larger b_t is a stronger constraint, 0 is plain cross-entropy. `weight_floor` is the
    smallest weight w_t of a token's gradient, and `loss` and `weight` in the log include it; the
    paper's equation has none (0), its official code uses 1e-3. `reference_cache` is
    the folder of the reference log-probs (default: `_reference` in output_dir; the underscore keeps
    it out of push_to_hub). Raises LeadlineError for settings under which the objective is not
    defined.
    """

    beta: list[float] = field(
        default_factory=lambda: list(BETA),
        metadata={
            "help": "b_t of the first, second, ... response token; the last value applies to all "
            "later tokens."
        },
    )
    weight_floor: float = field(
        default=0.0,
        metadata={
            "help": "Smallest share of a token's plain gradient that the constraint leaves, from 0 "
            "to less than 1."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Train without dropout, since the reference is computed without it."},
    )
    reference_cache: str | None = field(
        default=None,
        metadata={"help": "Folder of the reference log-probs. Default: _reference in output_dir."},
    )
    reference_batch_size: int | None = field(
        default=None,
        metadata={"help": "Batch size of the reference pass. Default: that of training."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta or not all(math.isfinite(b) and b >= 0 for b in self.beta):
            raise LeadlineError(
                f"beta={self.beta}: give a list of finite numbers from 0, such as {list(BETA)}"
            )
        if not 0 <= self.weight_floor < 1:
            raise LeadlineError(
                f"weight_floor={self.weight_floor}: give a number from 0 to less than 1, such as "
                "1e-3"
            )
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise LeadlineError(
                "loss_type and label_smoothing_factor would replace the constrained loss: "
                "remove them"
            )
        if self.packing and self.packing_strategy != "bfd":
            raise LeadlineError(
                f"packing_strategy={self.packing_strategy!r} separates responses from their "
                'prompts: use packing_strategy="bfd"'
            )
        if self.truncation_mode != "keep_start":
            raise LeadlineError(
                f"truncation_mode={self.truncation_mode!r} may truncate the first tokens of a "
                'response, which beta is counted from: use truncation_mode="keep_start"'
            )


@dataclass
class ReferenceCollator(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """TRL's collator, plus the reference log-probs in the shape of the labels, padded with 0."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate one batch. Raises LeadlineError where an example has no reference log-probs."""
        if COLUMN not in examples[0]:
            raise LeadlineError(
                "this dataset has no reference log-probs: give it to the trainer's constructor or "
                "to evaluate(), without skip_prepare_dataset"
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
    turn with assistant_only_loss. Where a template's mask includes (the end of) the generation
    prompt, counting starts after it. The reference is the model as given, or, with PEFT, the model
    without its adapter; an adapter that was trained for alignment has to be merged first.

    Logs `loss`, the mean objective over response tokens, which starts at the mean of
    (2 / b_t) log 2; `nll`, the plain loss; and `weight`, the mean w_t: the share of the plain
    gradient that remains. Raises LeadlineError, with a fix, for unsupported data and settings.
    """

    _tag_names = ("trl", "sft", "leadline")
    _name = "Constrained SFT"
    _reference: str | None = None  # the reference's model_hash, once it is known
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
                f"args is a {type(args).__name__}: use a ConstrainedSFTConfig, which takes the "
                "same settings"
            )
        if data_collator is not None or named.get("compute_loss_func") is not None:
            raise LeadlineError(
                "data_collator and compute_loss_func would replace the constrained loss: remove "
                "them"
            )
        super().__init__(model, args, None, *rest, **named)
        if self._is_vision_dataset:
            raise LeadlineError("the train dataset has images: give text only")
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
        use_learned_tokens(self.model)
        if args.disable_dropout:
            _disable_dropout(self.model)
        self._generation_prompt_ids = _generation_prompt(self.processing_class, self.chat_template)
        self._plain_collator = self.data_collator
        self.data_collator = ReferenceCollator(**vars(self.data_collator))
        zeros = torch.zeros(3, device=self.accelerator.device)
        # Sums of nll, weight and tokens since the last log, in training (True) and evaluation.
        self._sums = {True: zeros, False: zeros.clone()}
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
        """TRL's method. A dataset given to `evaluate` gets its reference log-probs here."""
        prepared = super()._prepare_dataset(dataset, *rest)
        return prepared if self._reference is None else self._with_reference(prepared, "eval")

    def _with_reference(self, dataset: Any, name: str) -> Dataset:
        if not isinstance(dataset, Dataset):
            raise LeadlineError(
                f"the {name} dataset is a {type(dataset).__name__}, whose rows are not known "
                "before training: give a datasets.Dataset"
            )
        if len(set(self.args.beta)) > 1:
            check_responses(dataset, name)
        return add_reference(
            dataset,
            self.model,
            reference_hash=str(self._reference),
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
        """TRL's method, with a model whose log-probs are replaced by minus the objective. What TRL
        does with them (accumulation, processes, mixture-of-experts loss) is unchanged."""
        inputs = dict(inputs)
        reference = inputs.pop(COLUMN)

        def forward(**arguments: Any) -> Any:
            if not arguments.pop("fused_lm_head", False):
                return model(**arguments)
            outputs = model(**arguments, fused_lm_head=True)
            outputs.log_probs = -self._objective(
                outputs.log_probs, reference, inputs["input_ids"], outputs.label_mask
            )
            return outputs

        return super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)

    def _objective(
        self, logps: torch.Tensor, reference: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """The objective per token, in the shape of `logps` and `mask` [rows, tokens - 1].

        `reference` and `ids` [rows, tokens] also have the first token, but not the virtual tokens
        that a prompt-learning adapter adds to `logps`.
        """
        virtual = mask.size(1) - ids.size(1) + 1
        reference = pad(reference[:, 1:], (virtual, 0))
        beta, floor = self._beta(ids, mask), self.args.weight_floor
        with torch.no_grad():
            weights = gradient_weight(logps, reference, beta, mask, floor)
            sums = torch.stack([-logps.float().sum(), weights.sum(), mask.sum()])
            self._sums[self.model.training] += self.accelerator.reduce(sums, "sum")
        return constrained_loss(logps, reference, beta, mask, floor)

    def _beta(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """b_t of every token, in the shape of `mask` [rows, tokens - 1]."""
        virtual = mask.size(1) - ids.size(1) + 1
        prompt = pad(occurrences(ids, self._generation_prompt_ids)[:, 1:], (virtual, 0))
        prompt &= positions(mask) <= len(self._generation_prompt_ids)
        return schedule(self.args.beta, positions(mask & ~prompt))

    def log(self, logs: dict[str, float], *rest: Any, **named: Any) -> None:
        """Also log `nll` and `weight`: means per token over all micro-batches and processes since
        the last log."""
        mode = self.model.training
        nll, weight, tokens = self._sums[mode].tolist()
        if tokens:
            self._metrics["train" if mode else "eval"] |= {
                "nll": [nll / tokens],
                "weight": [weight / tokens],
            }
        self._sums[mode] = torch.zeros_like(self._sums[mode])
        super().log(logs, *rest, **named)


class _SameReference(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Stores the reference's hash in every checkpoint, and refuses to resume from a checkpoint with
    another reference (such as the checkpoint's own weights): that would change the objective.

    Checkpoints store the name of this class.
    """

    def __init__(self, reference: str) -> None:
        self.reference = reference

    def state(self) -> dict[str, Any]:
        """What the trainer saves in a checkpoint."""
        return {"args": {"reference": self.reference}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Raise LeadlineError where the resumed checkpoint has another reference."""
        if not state.global_step:
            return
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if saved is None or saved["args"]["reference"] != self.reference:
            raise LeadlineError(
                f"the checkpoint at step {state.global_step} was trained with another reference "
                "than this model: create the trainer with the model that the run started from"
            )


def _disable_dropout(model: torch.nn.Module) -> None:
    """Set dropout to 0 in modules, and in the rates that attention layers pass to functions."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _generation_prompt(tokenizer: Any, template: str | None) -> list[int]:
    """Token ids that the chat template puts between a user's turn and a response, in generation
    and in training; [] where there is no template."""
    if not (template or tokenizer.chat_template):
        return []
    user, assistant = {"role": "user", "content": "?"}, {"role": "assistant", "content": "."}

    def ids(*turns: dict[str, str], generation_prompt: bool = False) -> list[int]:
        settings = {"chat_template": template, "add_generation_prompt": generation_prompt}
        return list(_tokenize(tokenizer, list(turns), **settings)["input_ids"])

    try:
        request = ids(user)
        prompted = ids(user, generation_prompt=True)
        chat = ids(user, assistant)
    except TemplateError:
        return []
    return prompted[common_prefix_length(request, prompted) : common_prefix_length(prompted, chat)]
