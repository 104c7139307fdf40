"""Distillation under the constraint of constrained fine-tuning (arXiv 2406.05946, section 4).

Learning a teacher's next-token distribution p is learning every token v with weight p(v): the
gradient of KL(p || pi) is -sum_v p(v) grad log pi(v). So an unsafe teacher pulls the first tokens
of an answer towards compliance, whatever text it is distilled on. The constrained objective of one
token (see losses.py) therefore stands for every token that the teacher would say:

    objective  sum_v p(v) (2 / b_t) -log sigmoid(b_t d(v))     d(v) = log pi(v) - log pi_ref(v)
    gradient   -sum_v p(v) w_t(v) grad log pi(v)               w_t(v) = 2 sigmoid(-b_t d(v))

The pull towards a token dies away as the student comes to like it more than its aligned, initial
self did; b_t -> 0 is plain forward KL. To scale the whole divergence by the weight of the token
that the data hold is not the same: where the data refuse and the teacher would comply, that weight
grows above 1 as the refusal is forgotten, and speeds it up.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from trl.trainer.utils import FusedCausalLMOutput

from ..records import LeadlineError
from .losses import constrained, weight
from .reference import COLUMN, as_reference
from .trainers import ConstrainedSFTConfig, ConstrainedSFTTrainer


@dataclass
class ConstrainedDistillConfig(ConstrainedSFTConfig):
    """ConstrainedSFTConfig, and what share of the loss the teacher has.

    The loss per token is (1 - teacher_share) x constrained fine-tuning on the data's token
    + teacher_share x constrained distillation. `temperature` softens teacher, student and
    reference alike; the term is scaled by its square, and b_t by itself, so that neither the pull
    nor the constraint weakens. beta=[0] is plain distillation.
    """

    teacher_share: float = field(
        default=0.5, metadata={"help": "Share of distillation in the loss, from 0 to 1."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Softens the distributions that are compared."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.teacher_share <= 1:
            raise LeadlineError(f"teacher_share={self.teacher_share}: give a share from 0 to 1")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise LeadlineError(f"temperature={self.temperature}: give a number above 0")


class ConstrainedDistillTrainer(ConstrainedSFTTrainer):
    """Distils a teacher's next-token distributions along the data's responses into a student that
    is held to what it was before the first update, its refusals first of all.

    `teacher` is a causal language model, or a folder or hub id of one, over the student's
    vocabulary; it is never trained. The reference is a frozen copy of the student or, with PEFT,
    the student without its adapter. Logs, beside those of ConstrainedSFTTrainer: `teacher_kl`, the
    plain KL(teacher || student) in nats per response token, and `teacher_weight`, the mean w_t(v)
    under the teacher: how much of its pull is let through. Raises LeadlineError as that one does.
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
                f"args is a {type(args).__name__}: make it a ConstrainedDistillConfig, which takes "
                "the same settings"
            )
        super().__init__(model, args, *rest, **named)
        if is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            raise LeadlineError("peft_config learns a prompt, not weights: use LoRA to distil")
        if not isinstance(teacher, torch.nn.Module):
            teacher = AutoModelForCausalLM.from_pretrained(
                teacher, dtype=self.model.dtype, use_safetensors=True, trust_remote_code=False
            )
        self.teacher = teacher.to(self.accelerator.device).eval().requires_grad_(False)
        sizes = [m.config.get_text_config().vocab_size for m in (self.model, self.teacher)]
        self._vocabulary = min(sizes)  # one tokenizer's models may be padded to different sizes
        if len(self.processing_class) > self._vocabulary or self.teacher is self.model:
            raise LeadlineError(
                f"the teacher has a vocabulary of {sizes[1]} tokens and the student of {sizes[0]}: "
                "their distributions are compared token by token, so take another model with the "
                "student's tokenizer"
            )
        self._initial = None if is_peft_model(self.model) else _frozen_copy(self.model)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's own, told this loss where it asks for log-probs, as in ConstrainedSFTTrainer."""
        inputs = {name: value for name, value in inputs.items() if name != COLUMN}

        def forward(**given: Any) -> Any:
            fused = given.pop("fused_lm_head", False)
            return self._forward(model, **given) if fused else model(**given)

        compute = super(ConstrainedSFTTrainer, self).compute_loss
        return compute(forward, inputs, return_outputs, num_items_in_batch)

    def _forward(self, model: Any, labels: Tensor, **inputs: Any) -> FusedCausalLMOutput:
        """The three models on the trained positions alone; `log_probs` is minus the loss."""
        labels = labels[:, 1:]
        mask = labels != -100
        keep = mask.any(0).nonzero()[:, 0]  # in some row

        def logits(asked: Any) -> tuple[Tensor, Any]:
            outputs = asked(**inputs, logits_to_keep=keep)
            found = outputs.logits
            if found.size(1) != len(keep):  # a model that always gives all of them
                found = found[:, keep]
            return found[mask[:, keep]][:, : self._vocabulary].float(), outputs

        with torch.no_grad(), self.accelerator.autocast():
            teacher, _ = logits(self.teacher)
            if self._initial is not None:
                reference, _ = logits(self._initial)
            else:
                with as_reference(self.model):
                    reference, _ = logits(self.model)
        student, outputs = logits(model)
        beta, said = self._beta(inputs["input_ids"], mask)[mask], labels[mask]
        soft, share = self.args.temperature, self.args.teacher_share
        logps, held = (-cross_entropy(x, said, reduction="none") for x in (student, reference))
        everywhere = torch.ones_like(said, dtype=torch.bool)
        loss = (1 - share) * constrained(logps, held, beta, everywhere)
        loss = loss + share * distilled(student, reference, teacher, beta, soft)
        with torch.no_grad():
            own, taught = student.log_softmax(-1), teacher.log_softmax(-1)
            self._note(
                nll=-logps,
                weight=weight(logps, held, beta, everywhere),
                teacher_kl=(taught.exp() * (taught - own)).sum(-1),
                teacher_weight=pulled(student, reference, teacher, beta),
            )
            entropy, top = -(own.exp() * own).sum(-1), (own.argmax(-1) == said).float()
        spread = {"log_probs": -loss, "entropy": entropy, "is_top1": top}
        return FusedCausalLMOutput(
            **{n: x.new_zeros(mask.shape).masked_scatter(mask, x) for n, x in spread.items()},
            label_mask=mask,
            aux_loss=getattr(outputs, "aux_loss", None),
        )

    def _note(self, **values: Tensor) -> None:
        """Keep the means over the tokens of all processes for the next log."""
        count = next(iter(values.values())).new_tensor(len(next(iter(values.values()))))
        sums = torch.stack([count, *(each.sum() for each in values.values())])
        tokens, *totals = self.accelerator.reduce(sums, "sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, total in zip(values, totals, strict=True):
            metrics[name].append(total / max(tokens, 1))


def pulled(student: Tensor, reference: Tensor, teacher: Tensor, beta: Tensor) -> Tensor:
    """The mean w_t(v) under the teacher per token [tokens]; arguments as in `distilled`."""
    logps, initial = student.log_softmax(-1), reference.log_softmax(-1)
    everywhere = torch.ones_like(logps, dtype=torch.bool)
    weights = weight(logps, initial, beta[:, None].expand_as(logps), everywhere)
    return (teacher.softmax(-1) * weights).sum(-1)


def distilled(
    student: Tensor, reference: Tensor, teacher: Tensor, beta: Tensor, temperature: float = 1.0
) -> Tensor:
    """The objective per token [tokens], of logits [tokens, vocabulary] and b_t [tokens].

    Where b_t is 0 it is KL(teacher || student) but for a constant; with a temperature, times its
    square, as Hinton et al. (arXiv 1503.02531) scale it.
    """
    logps, initial, wanted = (
        (logits / temperature).log_softmax(-1) for logits in (student, reference, teacher)
    )
    b = (beta * temperature)[:, None].expand_as(logps)
    everywhere = torch.ones_like(logps, dtype=torch.bool)
    return temperature**2 * (wanted.exp() * constrained(logps, initial, b, everywhere)).sum(-1)


def _frozen_copy(model: Any) -> Any:
    """Without what TRL hung onto this instance: that would lead back to the original's weights."""
    copied = copy.deepcopy(model)
    copied.__dict__.pop("forward", None)
    return copied.eval().requires_grad_(False)
