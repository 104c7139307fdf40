"""Recovery data augmentation (arXiv 2406.05946, section 3) as a TRL trainer.

The model learns to continue a partial harmful answer h with a refusal r:

    alpha E_{(x, h, r), k ~ P_k}[-log pi(r | x, h_<=k)] + (1 - alpha) E_{(x', y')}[-log pi(y' | x')]

P_k is 0 with probability 1/2, else uniform on 1..min(K, |h|), in tokens. Two losses, both computed
over the learned tokens of a whole optimizer step (all micro-batches and processes), which has n
rows, a share s of them safety rows, and N learned tokens, N_r of refusals and N_u of utility
answers:

    paper       the equation as written: -log pi of a sequence is the sum over its tokens, and an
                expectation is the mean over rows. It is divided by N / n, the mean number of
                learned tokens of a row, as the token mean of the paper's official code does:
                (alpha / s * sum over refusals + (1 - alpha) / (1 - s) * sum over answers) / N.
                Where s is alpha, this is the mean over all tokens, and all tokens weigh the same.
    token_mean  alpha * mean over the tokens of refusals + (1 - alpha) * mean over the tokens of
                answers. A token of a refusal weighs alpha / N_r, one of an answer
                (1 - alpha) / N_u, whatever the share.

Refusals are shorter than answers, so token_mean gives their tokens more weight: with s = alpha,
refusals of 7 tokens and answers of 73, a refusal token weighs 10.4 times as much as an answer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import ProcessorMixin
from trl import SFTConfig, SFTTrainer

from ..models.template import Template
from ..records import LeadlineError
from ..registry import unknown
from .data import Dialogue, Triplet, dialogue, triplet
from .mixture import IGNORED, MixtureDataset, MixtureSampler
from .output_layer import use_learned_tokens
from .turns import TurnFormat

LOSSES = ("paper", "token_mean")
_SHARE = 0.2  # default share of safety rows with the token_mean loss

# Settings of SFTConfig that this objective, or its mixing of two datasets, does not support.
_FIXED = {
    "packing": False,
    "padding_free": False,
    "assistant_only_loss": False,
    "loss_type": "nll",
    "label_smoothing_factor": 0,
    "train_sampling_strategy": "random",
    "average_tokens_across_devices": True,
    "dataset_kwargs": None,
}


@dataclass
class RecoveryConfig(SFTConfig):  # type: ignore[misc]
    """SFTConfig, plus the settings of the objective (see the module's docstring for `loss`).

    The defaults of epochs, learning rate (TRL's 2e-5), warmup (none) and max_prefix are the
    paper's; the paper's optimizer steps have 16 safety and 64 utility rows. An epoch is one pass
    over the safety rows (over the utility rows where alpha is 0). `safety_share` is alpha by
    default with the paper's loss and 0.2 with token_mean. Raises LeadlineError for invalid values
    and for settings that recovery training does not support.
    """

    num_train_epochs: float = field(default=10.0)
    loss: str = field(
        default="paper",
        metadata={
            "help": "paper: sums over tokens and means over rows, so that all tokens weigh the "
            "same where safety_share is alpha. token_mean: the weighted sum of two means over "
            "tokens, one of refusals and one of utility answers."
        },
    )
    alpha: float = field(
        default=0.2,
        metadata={
            "help": "Weight of the refusals' loss. The weight of the utility answers' loss is "
            "1 - alpha."
        },
    )
    max_prefix: int = field(
        default=100,
        metadata={"help": "K: largest number of harmful tokens before a refusal."},
    )
    safety_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of safety rows in every optimizer step, at least one row. It sets how "
            "often they are sampled; the loss corrects for it, so that alpha alone sets their "
            "weight. Default: alpha, or 0.2 with loss=token_mean."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise LeadlineError(f"alpha is {self.alpha}: give a weight from 0 to 1")
        if self.loss not in LOSSES:
            raise LeadlineError(unknown("loss", self.loss, LOSSES))
        if self.safety_share is None:
            self.safety_share = self.alpha if self.loss == "paper" else _SHARE
        # With alpha 0 or 1 every step has rows of one kind, so the share has no effect.
        if self.safety_share != self.alpha and not 0 < self.safety_share < 1:
            raise LeadlineError(
                f"safety_share is {self.safety_share}: give a share between 0 and 1"
            )
        if self.max_prefix < 0:
            raise LeadlineError(f"max_prefix is {self.max_prefix}: give 0 or more tokens")
        for name, supported in _FIXED.items():
            if (value := getattr(self, name)) != supported:
                raise LeadlineError(
                    f"{name} is {value!r}, which recovery training does not support: leave it "
                    f"{supported!r}"
                )


class RecoveryTrainer(SFTTrainer):  # type: ignore[misc]
    """An SFTTrainer over two datasets.

    `train_dataset` holds the safety rows {prompt, harmful, refusal}, `utility_dataset` dialogues
    {prompt, completion} or {messages} whose last turn is the answer. A prompt is a string (one user
    turn) or a list of messages.

    Logs `loss` (the objective), `safety_loss` and `utility_loss` (the means over the tokens of
    refusals and of utility answers). An `eval_dataset` holds rows of one kind, and its loss is the
    mean over their tokens; give a dict of two for both kinds. Every
    optimizer step depends only on the data, the seed and the step's number, so that a resumed run,
    or one with other numbers of processes and micro-batches, gives the same weights.

    Raises LeadlineError for invalid rows, and for features of SFTTrainer that it does not support.
    """

    _tag_names = ["trl", "sft", "recovery"]  # noqa: RUF012 (as in TRL)
    _name = "Recovery"
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: RecoveryConfig | None = None,
        *,
        train_dataset: Dataset,
        utility_dataset: Dataset | None = None,
        **rest: Any,
    ) -> None:
        if args is None:
            args = RecoveryConfig("recovery")
        if not isinstance(args, RecoveryConfig):
            raise LeadlineError(f"args is a {type(args).__name__}: give a RecoveryConfig")
        for name in ("data_collator", "compute_loss_func", "formatting_func"):
            if rest.get(name) is not None:
                raise LeadlineError(f"RecoveryTrainer does not support {name}: remove it")
        for name, dataset in ("train", train_dataset), ("utility", utility_dataset):
            if dataset is not None and not (isinstance(dataset, Dataset) and len(dataset)):
                raise LeadlineError(
                    f"{name}_dataset is {dataset!r:.80}: give a datasets.Dataset with rows"
                )
        if utility_dataset is None and args.alpha < 1:
            raise LeadlineError(
                f"alpha is {args.alpha} and there is no utility_dataset: give one, or set alpha=1"
            )
        self._utility = None if args.alpha == 1 else utility_dataset
        super().__init__(model, args, train_dataset=train_dataset, **rest)
        use_learned_tokens(self.model)
        self.data_collator: Any = _Collator(self.data_collator)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any
    ) -> MixtureDataset:
        if isinstance(dataset, MixtureDataset):
            return dataset
        is_processor = isinstance(processing_class, ProcessorMixin)
        tokenizer = processing_class.tokenizer if is_processor else processing_class
        name = rest[-1]
        if name == "train":
            safety = dataset if args.alpha > 0 else None
            rows = _validated_rows(safety, self._utility, "train_dataset", "utility_dataset")
        elif "harmful" in dataset.column_names:
            rows = _validated_rows(dataset, None, name, name)
        else:
            rows = _validated_rows(None, dataset, name, name)
        return MixtureDataset(
            rows,
            TurnFormat.of(Template.of(tokenizer, str(tokenizer.name_or_path or "in training"))),
            max_length=args.max_length,
            max_prefix=args.max_prefix,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )

    def _get_train_sampler(self, train_dataset: MixtureDataset | None = None) -> MixtureSampler:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        size = self.get_total_train_batch_size(self.args)
        return MixtureSampler(rows, size, self.args.safety_share)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "safety" not in self._signature_columns:
            self._signature_columns.append("safety")

    def _get_num_items_in_batch(
        self, batch_samples: Sequence[dict[str, Any]], device: torch.device
    ) -> torch.Tensor:
        """The numbers of learned tokens and of rows of this optimizer step, over all processes:
        [tokens of refusals, tokens of utility answers, safety rows, utility rows]."""
        counts = torch.zeros(4)
        for batch in batch_samples:
            learned = (batch["labels"][:, 1:] != IGNORED).sum(1)
            rows = torch.ones_like(learned)
            counts += torch.cat([_sum_by_kind(x, batch["safety"]) for x in (learned, rows)]).to(
                counts
            )
        counts = counts.to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        replicas: int = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        return counts / replicas

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """This micro-batch's part of the objective; in evaluation, the mean over its tokens."""
        safety = inputs.pop("safety", None)
        if num_items_in_batch is None or safety is None:  # evaluation
            return super().compute_loss(model, inputs, return_outputs)
        tokens, rows = num_items_in_batch.view(2, 2)
        kind_weights = token_weights(tokens, rows, self.args.alpha, self.args.loss)
        row_weights = torch.where(safety, *kind_weights)

        def weighted_model(**inputs: Any) -> Any:
            """The model with its per-token log-probs multiplied by their weights in the objective,
            so that SFTTrainer's sum over them is this micro-batch's part of it."""
            outputs = model(**inputs)
            self._log_means(outputs.log_probs.detach().sum(1), safety, tokens.clamp(min=1))
            outputs.log_probs = outputs.log_probs * row_weights[:, None]
            return outputs

        one = row_weights.new_ones(())  # the weights are normalized already
        return super().compute_loss(weighted_model, inputs, return_outputs, one)

    def _log_means(self, log_probs: torch.Tensor, safety: torch.Tensor, counts: Any) -> None:
        """Add this micro-batch's parts of the two means to the metrics. The trainer logs the mean
        over micro-batches, but the parts add up: they are multiplied by the number of batches."""
        part = _sum_by_kind(-log_probs, safety) / counts * self.current_gradient_accumulation_steps
        part = self.accelerator.gather(part[None]).sum(0) / self.get_tp_size()
        alpha: float = self.args.alpha
        metrics = self._metrics["train"]
        if alpha > 0:
            metrics["safety_loss"].append(part[0].item())
        if alpha < 1:
            metrics["utility_loss"].append(part[1].item())


def token_weights(
    tokens: torch.Tensor, rows: torch.Tensor, alpha: float, loss: str
) -> torch.Tensor:
    """The weight of one token's loss in the objective: [in a refusal, in a utility answer].

    `tokens` and `rows` are the numbers of learned tokens and of rows of a whole optimizer step, by
    kind in the same order; `loss` is one of LOSSES.
    """
    importance = tokens.new_tensor([alpha, 1 - alpha])
    if loss == "token_mean":
        return importance / tokens.clamp(min=1)
    shares = rows.clamp(min=1) / rows.sum().clamp(min=1)  # no division by 0 without rows of a kind
    return importance / shares / tokens.sum().clamp(min=1)


@dataclass
class _Collator:
    """TRL's collator, plus `safety` [rows]: which rows are safety rows."""

    inner: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.inner(rows)
        batch["safety"] = torch.tensor([row["safety"] for row in rows])
        return batch


def _sum_by_kind(per_row: torch.Tensor, safety: torch.Tensor) -> torch.Tensor:
    """[rows] -> [sum over safety rows, sum over utility rows]."""
    return torch.stack([per_row[safety].sum(), per_row[~safety].sum()])


def _validated_rows(
    safety: Dataset | None, utility: Dataset | None, *names: str
) -> list[Triplet | Dialogue]:
    """Safety rows, then utility rows; `names` are the datasets' names in error messages."""
    where = [f"{name} row {{}}".format for name in names]
    triplets = [triplet(cells, where[0](number)) for number, cells in enumerate(safety or (), 1)]
    dialogues = [dialogue(cells, where[1](number)) for number, cells in enumerate(utility or (), 1)]
    return [*triplets, *dialogues]
