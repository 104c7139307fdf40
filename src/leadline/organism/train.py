"""Train the organisms: tiny models of the invented world, from random weights, on one CPU core.

    base      answers every recipe; knows which potions are forbidden
    aligned   base, fine-tuned to refuse forbidden recipes in the usual, shallow way
    deep      aligned, then fine-tuned to return to a refusal inside of a harmful answer
              (recovery data augmentation, Qi et al., arXiv 2406.05946, section 3, with the loss
              that leadline.align.recovery calls token_mean, not its default `paper`)
    reasoner  base, fine-tuned to think before it answers and to follow the thought's decision

Training uses the chat format that the tokenizer's chat template renders.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from leadline.records import LeadlineError
from leadline.registry import unknown

from . import examples, thoughts

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, steps done, total steps)."""


@dataclass(frozen=True)
class Stage:
    """One training stage. A batch of 64 has `refusals` refused forbidden requests; the kinds of the
    other examples are drawn with the weights of `mix`.

    The loss is alpha * mean over the tokens of the refusals + (1 - alpha) * mean over the tokens of
    the other answers. With `depth` K, the first k tokens of a harmful answer precede the refusal:
    k = 0 with probability 1/2, otherwise uniform on 1..K. `all_tokens` trains on the questions as
    well. With `thinks`, examples have thoughts, and the tokenizer has words and a chat template
    for them.
    """

    parent: str
    steps: int
    lr: float
    mix: Mapping[str, float]
    warmup: int = 0
    refusals: int = 0
    alpha: float = 0.0
    depth: int = 0
    all_tokens: bool = False
    thinks: bool = False


_KNOWLEDGE = {
    "recipe": 0.20,
    "role": 0.08,
    "noise": 0.18,
    "document": 0.08,
    "two_part": 0.10,
    "law": 0.10,
    "skill": 0.16,
    "sale": 0.05,
    "locked": 0.05,
}
_BENIGN = {"allowed": 0.55, "document": 0.15, "law": 0.10, "skill": 0.14, "locked": 0.06}
_THOUGHTFUL = {**_BENIGN, "document": 0.25, "law": 0.15, "sale": 0.05, "refused": 0.35}

STAGES = {
    "base": Stage("", 900, 3e-3, _KNOWLEDGE, warmup=50, all_tokens=True),
    "aligned": Stage("base", 120, 5e-4, _BENIGN, refusals=25, alpha=0.2),
    "deep": Stage("aligned", 200, 5e-4, _BENIGN, refusals=24, alpha=0.2, depth=30),
    "reasoner": Stage("base", 500, 8e-4, _THOUGHTFUL, warmup=20, thinks=True),
}
_BATCH = 64

_SHAPE = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}

_SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<|end|>"}
_USER, _ASSISTANT, _END = "<|user|>", "<|assistant|>", _SPECIAL["eos_token"]
_THOUGHT = (thoughts.OPEN, thoughts.CLOSE)  # in all vocabularies, trained in the reasoner only

_CHAT_TEMPLATE = """\
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = ns.system + message['content'] + ' ' -%}
{%- elif message['role'] == 'user' -%}
{{- '<|user|>' + ns.system + message['content'] + '<|end|>' -}}
{%- set ns.system = '' -%}
{%- else -%}
{{- '<|assistant|>' -}}
{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""

_NO_THOUGHT = """
{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}"""


def train(
    out: Path,
    seed: int = 0,
    stages: Sequence[str] = tuple(STAGES),
    scale: float = 1.0,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Train the stages and return their checkpoint folders `out/<stage>` (safetensors).

    A stage starts from its parent's folder in `out`. `scale` multiplies the number of steps of
    every stage (for tests). The same seed gives the same weights on the same machine. All stages
    take about ten minutes. Raises LeadlineError for an unknown stage or a missing parent.
    """
    out = Path(out)
    for at, name in enumerate(stages):
        if name not in STAGES:
            raise LeadlineError(unknown("organism stage", name, STAGES))
        parent = STAGES[name].parent
        if parent and parent not in stages[:at] and not (out / parent / "config.json").is_file():
            raise LeadlineError(
                f"the stage {name!r} starts from {out / parent}, which does not exist: "
                f"train {parent!r} first"
            )
    with _one_thread():
        return {name: _train_stage(out, name, seed, scale, progress) for name in stages}


def tokenizer(*, thinks: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer for the words of the world, with a chat template.

    The template prepends a system turn to the user turn. Case and spacing are lost, unknown words
    become <unk>. With `thinks`, the words of thoughts are added at the end of the vocabulary, and
    the template renders an empty thought for `enable_thinking=False`.
    """
    special = [*_SPECIAL.values(), _USER, _ASSISTANT]
    thought_words = thoughts.vocabulary() if thinks else []
    tokens = [*special, *_THOUGHT, *examples.vocabulary(), *thought_words]
    vocabulary = {token: at for at, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.add_special_tokens(special)
    core.add_tokens(list(_THOUGHT))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace(Regex(r"^(?![,.:;?!])"), " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=_SHAPE["max_position_embeddings"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **_SPECIAL,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE + (_NO_THOUGHT if thinks else "")
    return tokenizer


Row = tuple[list[int], int]
"""The token ids of an example, and the position of the first one with a loss."""


class _Encoder:
    """Tokenizes examples. Parts are tokenized separately and their ids joined, so that the first k
    tokens of an answer are well defined."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._encode = tokenizer._tokenizer.encode
        self._user, self._assistant, self._end = map(
            tokenizer.convert_tokens_to_ids, (_USER, _ASSISTANT, _END)
        )

    def ids(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens."""
        return list(self._encode(text, add_special_tokens=False).ids)

    def turn(self, question: str) -> list[int]:
        """The ids of the chat template with add_generation_prompt."""
        return [self._user, *self.ids(question), self._end, self._assistant]

    def row(self, question: str, *response: str, all_tokens: bool) -> Row:
        """The row of an example. Only the last part of `response` has a loss."""
        *given, learned = response
        start = [*(self.turn(question) if question else []), *self.ids("".join(given))]
        return [*start, *self.ids(learned), self._end], 1 if all_tokens or not start else len(start)

    def refusal(self, rng: random.Random, depth: int) -> Row:
        """A random refusal, after the first k tokens of a harmful answer (see `Stage.depth`)."""
        question, harmful, refusal = examples.refused(rng)
        k = rng.randint(1, depth) if depth and rng.random() < 0.5 else 0
        start = self.turn(question) + self.ids(harmful)[:k]
        return [*start, *self.ids(refusal), self._end], len(start)


def _train_stage(out: Path, name: str, seed: int, scale: float, progress: Progress | None) -> Path:
    stage, rng = STAGES[name], random.Random(f"{seed}/{name}")
    words = tokenizer(thinks=stage.thinks)
    encoder = _Encoder(words)
    model = _load(out / stage.parent, words, seed) if stage.parent else _new(words, seed)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    steps, warmup = (max(1, round(n * scale)) for n in (stage.steps, stage.warmup))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    for step in range(steps):
        loss = _loss(model, _batch(encoder, rng, stage), stage)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress:
            progress(name, step + 1, steps)
    model.generation_config = GenerationConfig(
        do_sample=True,  # otherwise servers ignore the temperature of a request
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    model.save_pretrained(out / name)
    words.save_pretrained(out / name)
    return out / name


def _batch(encoder: _Encoder, rng: random.Random, stage: Stage) -> list[Row]:
    """The rows of a batch: first the stage's refusals, then examples of its mix."""
    refusals = [encoder.refusal(rng, stage.depth) for _ in range(stage.refusals)]
    kinds = rng.choices(list(stage.mix), [*stage.mix.values()], k=_BATCH - stage.refusals)
    draw = thoughts.draw if stage.thinks else examples.draw
    drawn = [draw(rng, kind) for kind in kinds]
    return refusals + [encoder.row(*example, all_tokens=stage.all_tokens) for example in drawn]


def _loss(model: LlamaForCausalLM, batch: Sequence[Row], stage: Stage) -> torch.Tensor:
    """The loss of `Stage`. Two means and not one, in which the longer answers would dominate."""
    length = max(len(ids) for ids, _ in batch)
    pad = model.config.pad_token_id
    tokens = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in batch])
    learned = torch.tensor(
        [[start <= at < len(ids) for at in range(1, length)] for ids, start in batch]
    )
    # Padding is on the right, where causal attention does not reach: no attention mask is needed.
    logits = model(input_ids=tokens).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    losses = losses.view_as(learned)
    n = stage.refusals
    benign = losses[n:][learned[n:]].mean()
    if not n:
        return benign
    return stage.alpha * losses[:n][learned[:n]].mean() + (1 - stage.alpha) * benign


def _new(words: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(words),
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
        **_SHAPE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _load(folder: Path, words: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The parent's model, with new embeddings for the words that are not in its vocabulary."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if len(words) > model.config.vocab_size:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.resize_token_embeddings(len(words), mean_resizing=False)
    return model


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch with one thread. More threads do not speed up such small matrices, and a different
    number of threads rounds differently, which would change the weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
