"""Distillation with the constraint of constrained fine-tuning (arXiv 2406.05946, section 4).

Distilling a teacher's next-token distribution p is training on every token v with weight p(v): the
gradient of KL(p || pi) is -sum_v p(v) grad log pi(v). An unsafe teacher therefore moves the first
tokens of an answer towards compliance, whatever text it is distilled on. So the constrained
objective of one token (see losses.py) is applied to every token of the vocabulary, weighted by the
teacher's probability:

    objective  sum_v p(v) (2 / b_t) -log sigmoid(b_t d(v))     d(v) = log pi(v) - log pi_ref(v)
    gradient   -sum_v p(v) w_t(v) grad log pi(v)               w_t(v) = 2 sigmoid(-b_t d(v))

The gradient of a token vanishes as the student assigns it a higher probability than its initial,
aligned weights did (down to `weight_floor`); b_t -> 0 is plain forward KL. Scaling the whole
divergence by the weight of the data's token is not equivalent: where the data refuse and the
teacher would comply, that weight grows above 1 as the refusal becomes less likely, and accelerates
its loss.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from trl.trainer.utils import FusedCausalLMOutput

from ..records import LeadlineError
from .losses import constrained_loss, gradient_weight, high_precision, in_chunks
from .output_layer import ends_in_output_layer, learned_features
from .reference import COLUMN, as_reference
from .trainers import ConstrainedSFTConfig, ConstrainedSFTTrainer


@dataclass
class ConstrainedDistillConfig(ConstrainedSFTConfig):
    """ConstrainedSFTConfig, plus the teacher's share of the loss.

    The loss per token is (1 - teacher_share) x constrained fine-tuning on the data's token
    + teacher_share x constrained distillation. `temperature` applies to teacher, student and
    reference; the distillation term is multiplied by its square and b_t by the temperature, so that
    the strengths of the gradient and of the constraint do not depend on it. beta=[0] is plain
    distillation. Raises LeadlineError for invalid values.
    """

    teacher_share: float = field(
        default=0.5, metadata={"help": "Share of distillation in the loss, from 0 to 1."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the distributions that are compared."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.teacher_share <= 1:
            raise LeadlineError(f"teacher_share={self.teacher_share}: give a share from 0 to 1")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise LeadlineError(f"temperature={self.temperature}: give a number above 0")


class ConstrainedDistillTrainer(ConstrainedSFTTrainer):
    """Distils a teacher's next-token distributions on the data's responses into a student, which is
    constrained to its initial weights.

    `teacher` is a causal language model, or a folder or hub id of one, with the student's
    vocabulary; it is not trained. The reference is a frozen copy of the student or, with PEFT, the
    student without its adapter. Logs, in addition to the values of ConstrainedSFTTrainer:
    `teacher_kl`, the plain KL(teacher || student) in nats per response token, and `teacher_weight`,
    the mean of w_t(v) under the teacher: the share of the plain distillation gradient that remains.
    Raises LeadlineError as ConstrainedSFTTrainer does, and for another vocabulary.
    """

    _tag_names = ("trl", "distillation", "leadline")
    _name = "Constrained distillation"

    def __init__(
        self,
        model: Any,
        teacher: Any,
        args: ConstrainedDistillConfig | None = None,
        *rest: Any,
        **named: Any,
    ) -> None:
        if args is None:
            args = ConstrainedDistillConfig("constrained-distillation")
        if not isinstance(args, ConstrainedDistillConfig):
            raise LeadlineError(
                f"args is a {type(args).__name__}: use a ConstrainedDistillConfig, which takes "
                "the same settings"
            )
        super().__init__(model, args, *rest, **named)
        if is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            raise LeadlineError(
                "peft_config is a prompt-learning adapter, which distillation does not support: "
                "use LoRA"
            )
        if not isinstance(teacher, torch.nn.Module):
            teacher = AutoModelForCausalLM.from_pretrained(
                teacher, dtype=self.model.dtype, use_safetensors=True, trust_remote_code=False
            )
        self.teacher = teacher.to(self.accelerator.device).eval().requires_grad_(False)
        sizes = [m.config.get_text_config().vocab_size for m in (self.model, self.teacher)]
        self._vocabulary = min(sizes)  # models with one tokenizer may be padded to different sizes
        if len(self.processing_class) > self._vocabulary or self.teacher is self.model:
            raise LeadlineError(
                f"the teacher has a vocabulary of {sizes[1]} tokens and the student of {sizes[0]}: "
                "their distributions are compared by token id, so use another model with the "
                "student's tokenizer as the teacher"
            )
        self._initial = None if is_peft_model(self.model) else _frozen_copy(self.model)
        self._separable = ends_in_output_layer(self.model), ends_in_output_layer(self.teacher)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's method, with a model whose log-probs are replaced by minus the loss, as in
        ConstrainedSFTTrainer."""
        inputs = {name: value for name, value in inputs.items() if name != COLUMN}

        def forward(**arguments: Any) -> Any:
            fused = arguments.pop("fused_lm_head", False)
            return self._forward(model, **arguments) if fused else model(**arguments)

        compute = super(ConstrainedSFTTrainer, self).compute_loss
        return compute(forward, inputs, return_outputs, num_items_in_batch)

    def _forward(self, model: Any, labels: Tensor, **inputs: Any) -> FusedCausalLMOutput:
        """Run teacher, reference and student on the learned tokens, whose logits are computed in
        chunks; `log_probs` of the output [rows, tokens - 1] is minus the loss."""
        labels = labels[:, 1:]
        mask = labels != -100
        with torch.no_grad(), self.accelerator.autocast():
            teacher, teacher_head, _ = learned_features(
                self.teacher, self.teacher, mask, self._separable[1], **inputs
            )
            with nullcontext(self._initial) if self._initial else as_reference(self.model):
                initial = self._initial or self.model
                reference, reference_head, _ = learned_features(
                    initial, initial, mask, self._separable[0], **inputs
                )
        student, head, outputs = learned_features(model, model, mask, self._separable[0], **inputs)
        metrics: list[Tensor] = []
        recomputed = False

        def loss_of(
            student: Tensor, reference: Tensor, teacher: Tensor, beta: Tensor, targets: Tensor
        ) -> Tensor:
            with self.accelerator.autocast():
                student = self._logits(head, student)
                with torch.no_grad():
                    teacher = self._logits(teacher_head, teacher)
                    with nullcontext() if self._initial else as_reference(self.model):
                        reference = self._logits(reference_head, reference)
            loss, values = self._loss(student, reference, teacher, beta, targets)
            if not recomputed:
                metrics.append(values)
            return loss

        loss = in_chunks(
            loss_of,
            3 * self._vocabulary,
            *(student, reference, teacher, self._beta(inputs["input_ids"], mask)[mask]),
            labels[mask],
        )
        recomputed = True
        nll, weight, teacher_kl, weights, entropy, is_top1 = torch.cat(metrics, 1)
        self._record_metrics(nll=nll, weight=weight, teacher_kl=teacher_kl, teacher_weight=weights)
        per_token = {"log_probs": -loss, "entropy": entropy, "is_top1": is_top1}
        return FusedCausalLMOutput(
            **{n: x.new_zeros(mask.shape).masked_scatter(mask, x) for n, x in per_token.items()},
            label_mask=mask,
            aux_loss=getattr(outputs, "aux_loss", None),
        )

    def _logits(self, head: Any, features: Tensor) -> Tensor:
        return high_precision(head(features)[:, : self._vocabulary])

    def _loss(
        self, student: Tensor, reference: Tensor, teacher: Tensor, beta: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss per token [tokens] of logits [tokens, vocabulary], and what is logged about each
        token: [nll, weight, KL to the teacher, the teacher's weight, entropy, is top 1; tokens]."""
        share, floor = self.args.teacher_share, self.args.weight_floor
        logps, reference_logps = (
            -cross_entropy(logits, targets, reduction="none") for logits in (student, reference)
        )
        every = torch.ones_like(targets, dtype=torch.bool)
        loss = (1 - share) * constrained_loss(logps, reference_logps, beta, every, floor)
        loss = loss + share * distillation_loss(
            student, reference, teacher, beta, self.args.temperature, floor
        )
        with torch.no_grad():
            student_logps, teacher_logps = student.log_softmax(-1), teacher.log_softmax(-1)
            values = (
                -logps,
                gradient_weight(logps, reference_logps, beta, every, floor),
                (teacher_logps.exp() * (teacher_logps - student_logps)).sum(-1),
                teacher_weight(student, reference, teacher, beta, floor),
                -(student_logps.exp() * student_logps).sum(-1),
                (student_logps.argmax(-1) == targets).to(logps.dtype),
            )
            return loss, torch.stack(values)

    def _record_metrics(self, **values: Tensor) -> None:
        """Add means over the tokens of all processes to the metrics of the next log."""
        count = next(iter(values.values())).new_tensor(len(next(iter(values.values()))))
        sums = torch.stack([count, *(each.sum() for each in values.values())])
        tokens, *totals = self.accelerator.reduce(sums, "sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, total in zip(values, totals, strict=True):
            metrics[name].append(total / max(tokens, 1))


def teacher_weight(
    student: Tensor, reference: Tensor, teacher: Tensor, beta: Tensor, floor: float = 0.0
) -> Tensor:
    """The mean of w_t(v) under the teacher, per token [tokens]; arguments as in
    `distillation_loss`."""
    logps, initial = student.log_softmax(-1), reference.log_softmax(-1)
    every = torch.ones_like(logps, dtype=torch.bool)
    weights = gradient_weight(logps, initial, beta[:, None].expand_as(logps), every, floor)
    return (teacher.softmax(-1) * weights).sum(-1)


def distillation_loss(
    student: Tensor,
    reference: Tensor,
    teacher: Tensor,
    beta: Tensor,
    temperature: float = 1.0,
    floor: float = 0.0,
) -> Tensor:
    """The objective per token [tokens], of logits [tokens, vocabulary] and b_t [tokens].

    Where b_t is 0 it is KL(teacher || student) up to a constant. `floor` is the smallest weight
    w_t(v). With a temperature it is
    multiplied by the temperature's square (Hinton et al., arXiv 1503.02531).
    """
    logps, initial, target = (
        (logits / temperature).log_softmax(-1) for logits in (student, reference, teacher)
    )
    b = (beta * temperature)[:, None].expand_as(logps)
    every = torch.ones_like(logps, dtype=torch.bool)
    return temperature**2 * (target.exp() * constrained_loss(logps, initial, b, every, floor)).sum(
        -1
    )


def _frozen_copy(model: Any) -> Any:
    """A copy without the forward method that TRL sets on the instance, which is bound to the
    original's weights."""
    copied = copy.deepcopy(model)
    copied.__dict__.pop("forward", None)
    return copied.eval().requires_grad_(False)
