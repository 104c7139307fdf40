"""Generation for prompts that share a prefix, with one forward pass over the shared tokens.

A prefill sweep sends one prompt with the first k tokens of one response prefix, for many k. Each of
these prompts is a prefix of the longest, so they form a *group*, and one forward pass over the
longest prompt of each group fills the key-value cache for all of them. The logits of that pass also
give the model's greedy next token at every position: a greedy answer is known for as long as it
agrees with the longest prompt, and all answers that diverge from it at the same position are equal.
From there, several *continuations* are generated in one row of the cache. Each has an attention
mask that hides the other continuations and the part of the longest prompt that it does not contain.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

Ids = list[int]
Pick = Callable[[Any], Any]  # scores (rows, vocabulary), float32 -> the next token of each row

_MAX_PER_ROW = 8  # continuations in one row: each step also computes the tokens of the others
_MIN_COMMON = 32  # tokens: a shorter prefix of all prompts is not worth a forward pass of its own
# Entries of a model's generation config that do not change what is generated here.
_INERT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"),
    *("do_sample", "num_beams", "temperature", "top_k", "top_p", "max_length", "max_new_tokens"),
    *("use_cache", "output_attentions", "output_hidden_states"),
}


def prefix_groups(prompts: Sequence[Ids]) -> list[list[int]]:
    """Groups of prompt indices: the first of each group is the longest prompt, and the others are
    prefixes of it, in order of decreasing length."""
    groups: list[list[int]] = []
    for n in sorted(range(len(prompts)), key=prompts.__getitem__, reverse=True):
        if groups and prompts[groups[-1][0]][: len(prompts[n])] == prompts[n]:
            groups[-1].append(n)
        else:
            groups.append([n])
    return groups


@dataclass(frozen=True)
class SharedPrefixes:
    """Prompts, grouped by shared prefix, and the layout of the cache that holds the longest prompt
    of each group: one row per group, padded to equal width after the tokens common to all."""

    prompts: Sequence[Ids]

    @cached_property
    def groups(self) -> list[list[int]]:
        """Indices of the prompts of each group, see `prefix_groups`."""
        return prefix_groups(self.prompts)

    @cached_property
    def longest(self) -> list[Ids]:
        """Token ids of the longest prompt of each group."""
        return [self.prompts[group[0]] for group in self.groups]

    @cached_property
    def common(self) -> int:
        """Number of leading tokens that all groups share, computed once; 0 where too few."""
        # In lexicographic order, what the first and the last share, all between them share, too.
        first, last = min(self.longest), max(self.longest)
        equal = [a == b for a, b in zip(first, last, strict=False)]
        # Each prompt keeps at least its last token out of the common ones.
        common = min([*equal, False].index(False), min(map(len, self.prompts)) - 1)
        return common if len(self.longest) > 1 and common >= _MIN_COMMON else 0

    @cached_property
    def padding(self) -> list[int]:
        """Number of padding tokens in the row of each group."""
        width = max(map(len, self.longest))
        return [width - len(ids) for ids in self.longest]

    @property
    def positions(self) -> Any:
        """(groups, width): the position of each cache entry in its prompt; -1 for padding."""
        import torch

        columns = torch.arange(max(map(len, self.longest)))
        padding = torch.tensor(self.padding)[:, None]
        after_common = columns >= self.common
        is_padding = after_common & (columns < self.common + padding)
        return torch.where(is_padding, -1, columns - padding * after_common)

    @property
    def worthwhile(self) -> bool:
        """Whether sharing at least halves the number of prompt tokens to compute, padding
        included."""
        width = max(map(len, self.longest))
        shared = self.common + (width - self.common) * len(self.longest)
        return 2 * shared <= width * len(self.prompts)


def unwrapped(model: Any) -> Any:
    """The model inside a PEFT wrapper whose adapter only changes layers; any other model as it
    is."""
    adapter = getattr(model, "active_peft_config", None)
    return model.get_base_model() if adapter and not adapter.is_prompt_learning else model


def unsupported_reason(model: Any, width: int) -> str:
    """Why prefixes cannot be shared with this model, or "" where they can.

    The model's next token must depend only on its parameters and on a cache of one key and value
    per position, of at least `width` positions.
    """
    from transformers import DynamicCache, PreTrainedModel
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if not isinstance(model, PreTrainedModel):
        return "the model is wrapped"
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        return "the model keeps state outside of a key-value cache"
    generation = model.generation_config
    config = model.config.get_text_config(decoder=True)
    if generation.use_cache is False or generation.cache_implementation:
        return "the generation config sets another cache, or none"
    if generation.prefill_chunk_size:
        return "the generation config sets prefill_chunk_size"
    if not set(generation.to_diff_dict()) <= _INERT:
        return "the generation config changes the scores"
    if config._attn_implementation not in ("sdpa", "eager"):
        return "the attention implementation does not take a custom mask"
    rope = str(getattr(config, "rope_parameters", ""))
    if any(kind in rope for kind in ("dynamic", "longrope")):
        return "the position embeddings depend on the sequence length"
    if not {"position_ids", "past_key_values"} <= _forward_parameters(model):
        return "forward() takes no position_ids or no past_key_values"
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"the cache has a {type(layer).__name__}"
        if getattr(layer, "sliding_window", width + 1) <= width:
            return "the attention window is shorter than the batch"
    return ""


def check_equivalence(model: Any, ids: Ids) -> None:
    """Compare the logits with and without sharing, for prompts made of these ids.

    Raises RuntimeError where they differ by more than rounding.
    """
    import torch

    prompts = [ids[:64], ids[:48], ids[:32] + ids[40:56]]
    prefixes = SharedPrefixes(prompts)
    cache, _ = _fill_cache(model, prefixes, 1)
    group_of = {n: index for index, group in enumerate(prefixes.groups) for n in group}
    continuations = [Continuation(group_of[n], prompt, 1) for n, prompt in enumerate(prompts)]
    batch = ContinuationBatch(model, cache, prefixes, continuations)
    shared = batch.scores([prompt[-1] for prompt in prompts])
    for prompt, scores in zip(prompts, shared, strict=True):
        prompt_ids = torch.tensor([prompt], device=model.device)
        expected = model(input_ids=prompt_ids, use_cache=False).logits[0, -1]
        rounding = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max()
        # Written so that NaN fails.
        if not bool((scores - expected).abs().max() <= rounding):
            raise RuntimeError("the logits with a shared prefix differ from those without")


def generate(
    model: Any,
    prefixes: SharedPrefixes,
    max_tokens: int,
    pick: Pick,
    *,
    greedy: bool,
    stops: set[int],
    stopped: Callable[[], bool],
) -> list[Ids]:
    """At most `max_tokens` tokens after each prompt, in the order of the prompts.

    Tokens after one of `stops` are to be ignored; once `stopped()` is true, all answers end early.
    Unless `greedy`, `pick` is called with one row of scores per prompt, in order.
    """
    prompts, groups = prefixes.prompts, prefixes.groups
    span = max(len(prompts[group[0]]) - len(prompts[group[-1]]) for group in groups)
    cache, predicted = _fill_cache(model, prefixes, span + 1 if greedy else 1)
    known: list[Ids] = [[] for _ in prompts]  # the beginning of each answer
    # Answers with the same key have the same continuation. The key is (group, position of the
    # divergence from the longest prompt) if greedy, else (group, prompt).
    keys: dict[int, tuple[int, int]] = {}
    for index, group in enumerate(groups):
        for n in group:
            if greedy:
                rest = prefixes.longest[index][len(prompts[n]) :]
                known[n] = _accepted(rest, predicted[index][-len(rest) - 1 :], max_tokens, stops)
                if len(known[n]) == max_tokens or known[n][-1] in stops:
                    continue
            keys[n] = index, len(prompts[n]) + len(known[n]) if greedy else n
    continuations: dict[tuple[int, int], Continuation] = {}
    for n, key in sorted(keys.items()):
        longest = continuations[key].max_tokens if key in continuations else 0
        remaining = max(max_tokens - len(known[n]), longest)
        continuations[key] = Continuation(key[0], prompts[n] + known[n], remaining)
    if continuations:
        batch = ContinuationBatch(model, cache, prefixes, list(continuations.values()))
        generated = dict(zip(continuations, batch.generate(pick, stops, stopped), strict=True))
        for n, key in keys.items():
            known[n] = (known[n] + generated[key])[:max_tokens]
    return known


def _accepted(rest: Ids, predicted: Ids, max_tokens: int, stops: set[int]) -> Ids:
    """The greedy answer of a prompt as far as it is known from the pass over the longest prompt.

    `rest` is what follows the prompt in the longest prompt; `predicted` are the model's greedy next
    tokens after the prompt and after each token of `rest`. The result ends with the first token
    that differs from `rest`.
    """
    n = 0
    limit = min(len(rest), max_tokens - 1)
    while n < limit and predicted[n] == rest[n] and predicted[n] not in stops:
        n += 1
    return predicted[: n + 1]


def _fill_cache(model: Any, prefixes: SharedPrefixes, last: int) -> tuple[Any, list[Ids]]:
    """A cache of the longest prompts, and the greedy next token at their `last` positions."""
    import torch
    from transformers.cache_utils import Cache

    cache = Cache(layer_class_to_replicate=_growing_layer())
    common = prefixes.common
    if common:
        ids = torch.tensor([prefixes.longest[0][:common]])
        _forward(model, cache, ids, torch.arange(common)[None], torch.ones_like(ids), 1)
        cache.batch_repeat_interleave(len(prefixes.longest))
    padded = [
        [0] * padding + ids[common:]
        for padding, ids in zip(prefixes.padding, prefixes.longest, strict=True)
    ]
    ids, positions = torch.tensor(padded), prefixes.positions
    mask = (positions >= 0).long()
    logits = _forward(model, cache, ids, positions[:, common:].clamp(min=0), mask, last)
    return cache, logits.argmax(-1).tolist()


def _forward(model: Any, cache: Any, ids: Any, positions: Any, mask: Any, last: int) -> Any:
    """Logits of the `last` tokens."""
    keep = {"logits_to_keep": last} if "logits_to_keep" in _forward_parameters(model) else {}
    logits = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=positions.to(model.device),
        past_key_values=cache,
        use_cache=True,
        **keep,
    ).logits
    if cache.get_seq_length() != mask.shape[-1]:
        raise RuntimeError("the model does not fill the cache that it is given")
    return logits[:, -last:]


@dataclass(frozen=True)
class Continuation:
    """At most `max_tokens` tokens to generate after `ids`. All of `ids` but the last token are in
    the cache row of `group`."""

    group: int
    ids: Ids
    max_tokens: int


class ContinuationBatch:
    """Continuations that are generated together, several in each row of the cache. The batch takes
    over the cache and appends to it."""

    def __init__(
        self,
        model: Any,
        cache: Any,
        prefixes: SharedPrefixes,
        continuations: Sequence[Continuation],
    ) -> None:
        import torch

        self.model, self.cache, self.continuations = model, cache, continuations
        by_group = [
            [n for n, continuation in enumerate(continuations) if continuation.group == group]
            for group in range(len(prefixes.longest))
        ]
        # A row costs about as much as four continuations, and unused slots of a row cost as well.
        self.per_row = min(
            range(1, _MAX_PER_ROW + 1),
            key=lambda per_row: (per_row + 4) * sum(-(-len(own) // per_row) for own in by_group),
        )
        rows = [
            (group, own[start : start + self.per_row])
            for group, own in enumerate(by_group)
            for start in range(0, len(own), self.per_row)
        ]
        group_of_row = torch.tensor([group for group, _ in rows])
        cache.batch_select_indices(group_of_row)
        # (rows, per_row): how many tokens of the longest prompt each continuation can attend to.
        self.prefix_lengths = torch.zeros(len(rows), self.per_row, dtype=torch.long)
        # (continuations): row * per_row + column of each continuation.
        self.slots = torch.zeros(len(continuations), dtype=torch.long)
        for row, (_, own) in enumerate(rows):
            for column, n in enumerate(own):
                self.prefix_lengths[row, column] = len(continuations[n].ids) - 1
                self.slots[n] = row * self.per_row + column
        positions = prefixes.positions[group_of_row][:, None]
        # (rows, per_row, cache entries): which entries each continuation can attend to.
        self.visible = (positions >= 0) & (positions < self.prefix_lengths[:, :, None])
        self.step = 0

    def scores(self, tokens: Sequence[int]) -> Any:
        """Append one token to each continuation. Returns the logits of the next one:
        (continuations, vocabulary), float32."""
        import torch

        ids = torch.zeros(self.prefix_lengths.numel(), dtype=torch.long)
        ids[self.slots] = torch.tensor(tokens)
        own = torch.eye(self.per_row, dtype=torch.bool).expand(len(self.prefix_lengths), -1, -1)
        self.visible = torch.cat([self.visible, own], -1)
        dtype = self.model.dtype
        mask = torch.zeros(self.visible.shape, dtype=dtype).masked_fill(
            ~self.visible, torch.finfo(dtype).min
        )
        logits = _forward(
            self.model,
            self.cache,
            ids.view(self.prefix_lengths.shape),
            self.prefix_lengths + self.step,
            mask[:, None],
            self.per_row,
        )
        self.step += 1
        return logits.flatten(0, 1)[self.slots.to(logits.device)].float()

    def generate(self, pick: Pick, stops: set[int], stopped: Callable[[], bool]) -> list[Ids]:
        """The tokens of each continuation, up to its `max_tokens` or one of `stops`."""
        written: list[Ids] = [[] for _ in self.continuations]
        tokens = [continuation.ids[-1] for continuation in self.continuations]
        unfinished = set(range(len(tokens)))
        while unfinished and not stopped():
            tokens = pick(self.scores(tokens)).tolist()
            for n in list(unfinished):
                written[n].append(tokens[n])
                if tokens[n] in stops or len(written[n]) == self.continuations[n].max_tokens:
                    unfinished.remove(n)
        return written


@cache
def _growing_layer() -> Any:
    """A cache layer class that reserves a quarter more space where it is full, instead of copying
    keys and values for every token."""
    import torch
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):  # type: ignore[misc]
        filled = 0

        def get_seq_length(self) -> int:
            return self.filled

        def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
            begin, self.filled = self.filled, self.filled + keys.shape[-2]
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
                self.keys, self.values = keys, values
                return keys, values
            if self.filled > self.keys.shape[-2]:
                self.keys = self._enlarged(self.keys[:, :, :begin])
                self.values = self._enlarged(self.values[:, :, :begin])
            self.keys[:, :, begin : self.filled] = keys
            self.values[:, :, begin : self.filled] = values
            return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

        def _enlarged(self, used: Any) -> Any:
            extra = self.filled * 5 // 4 - used.shape[-2]
            return torch.cat([used, used.new_empty(*used.shape[:2], extra, used.shape[-1])], -2)

    return GrowingLayer


def _forward_parameters(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)
