"""Prompts that begin alike: what they share goes through the model once.

A prefill sweep asks one prompt with the first k tokens of one answer in the model's mouth, for
many k: each of these prompts is a start of the longest, their *trunk*. One forward fills a cache
with the trunks. It says, too, what the model itself would write at each place of them: so a greedy
answer is known for as far as it follows its trunk, and all that leave it at one place are one.
From there the answers grow side by side in the trunk's one cache, each with a mask that hides the
others and what of the trunk it has not read: branches of a tree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

Ids = list[int]
Pick = Callable[[Any], Any]  # scores (rows, vocabulary), float32 -> the next token of each row

_ABREAST = 8  # branches at most in one row of a batch: each passes by the tokens of the others
_HEAD = 32  # tokens: fewer that all trunks begin with are not worth a forward of their own
# What a model's generation settings may hold without changing what it writes.
_INERT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"),
    *("do_sample", "num_beams", "temperature", "top_k", "top_p", "max_length", "max_new_tokens"),
    *("use_cache", "output_attentions", "output_hidden_states"),
}


def families(prompts: Sequence[Ids]) -> list[list[int]]:
    """Indices of prompts that are starts of one another, the longest of each family first."""
    found: list[list[int]] = []
    for n in sorted(range(len(prompts)), key=prompts.__getitem__, reverse=True):
        if found and prompts[found[-1][0]][: len(prompts[n])] == prompts[n]:
            found[-1].append(n)
        else:
            found.append([n])
    return found


@dataclass(frozen=True)
class Trunks:
    """The longest prompt of each family. All begin with the same `head` tokens, which are padded
    behind: `gaps` makes them equally long."""

    prompts: Sequence[Ids]

    @cached_property
    def families(self) -> list[list[int]]:
        return families(self.prompts)

    @cached_property
    def ids(self) -> list[Ids]:
        return [self.prompts[family[0]] for family in self.families]

    @cached_property
    def head(self) -> int:
        least, most = min(self.ids), max(self.ids)  # what they share, all between them share, too
        same = [a == b for a, b in zip(least, most, strict=False)]
        head = min([*same, False].index(False), min(map(len, self.prompts)) - 1)
        return head if len(self.ids) > 1 and head >= _HEAD else 0

    @cached_property
    def gaps(self) -> list[int]:
        width = max(map(len, self.ids))
        return [width - len(trunk) for trunk in self.ids]

    @property
    def places(self) -> Any:
        """(trunks, width): of which token of its trunk each place of the cache is; -1 of none."""
        import torch

        at, gaps = torch.arange(max(map(len, self.ids))), torch.tensor(self.gaps)[:, None]
        behind = at >= self.head
        return torch.where(behind & (at < self.head + gaps), -1, at - gaps * behind)

    @property
    def pay(self) -> bool:
        """Whether they are at most half of the tokens that the prompts are."""
        width = max(map(len, self.ids))
        return 2 * (self.head + (width - self.head) * len(self.ids)) <= width * len(self.prompts)


def bare(model: Any) -> Any:
    """The model inside peft's wrapper, where this has only changed its layers."""
    adapter = getattr(model, "active_peft_config", None)
    return model.get_base_model() if adapter and not adapter.is_prompt_learning else model


def unusual(model: Any, widest: int) -> str:
    """Why not to share, or "" where what a model keeps of a prompt is keys and values, place by
    place, of `widest` tokens at least, and what is written next depends on these alone."""
    from transformers import DynamicCache, PreTrainedModel
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if not isinstance(model, PreTrainedModel):
        return "it is wrapped"
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        return "it has another memory than a cache"
    own, config = model.generation_config, model.config.get_text_config(decoder=True)
    if own.use_cache is False or own.cache_implementation or own.prefill_chunk_size:
        return "its settings ask for another cache, or none"
    if not set(own.to_diff_dict()) <= _INERT:
        return "its settings change the scores"
    if config._attn_implementation not in ("sdpa", "eager"):
        return "its attention takes no mask of its own"
    if any(way in str(getattr(config, "rope_parameters", "")) for way in ("dynamic", "longrope")):
        return "its positions depend on the length of the whole"
    if not {"position_ids", "past_key_values"} <= _takes(model):
        return "it takes no positions or no cache"
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"its cache has a {type(layer).__name__}"
        if getattr(layer, "sliding_window", widest + 1) <= widest:
            return "its window is too short"
    return ""


def prove(model: Any, ids: Ids) -> None:
    """Raises RuntimeError where prompts made of these ids go on otherwise shared than alone."""
    import torch

    prompts = [ids[:64], ids[:48], ids[:32] + ids[40:56]]
    trunks = Trunks(prompts)
    cache, _ = _fill(model, trunks, 1)
    whose = {n: trunk for trunk, family in enumerate(trunks.families) for n in family}
    branches = [Branch(whose[n], prompt, 1) for n, prompt in enumerate(prompts)]
    shared = Tree(model, cache, trunks, branches).scores([prompt[-1] for prompt in prompts])
    for prompt, scores in zip(prompts, shared, strict=True):
        ids_alone = torch.tensor([prompt], device=model.device)
        alone = model(input_ids=ids_alone, use_cache=False).logits[0, -1]
        rounding = torch.finfo(alone.dtype).eps ** 0.5 * alone.abs().max()
        if not bool((scores - alone).abs().max() <= rounding):
            raise RuntimeError("a prompt goes on otherwise than alone")


def answers(
    model: Any,
    trunks: Trunks,
    most: int,
    pick: Pick,
    *,
    greedy: bool,
    stops: set[int],
    stopped: Callable[[], bool],
) -> list[Ids]:
    """At most `most` tokens after each prompt; what stands behind one of `stops` does not count,
    and all are cut short once `stopped`. Unless `greedy`, `pick` is given a row for each prompt,
    in their order."""
    prompts, kin = trunks.prompts, trunks.families
    span = max(len(prompts[family[0]]) - len(prompts[family[-1]]) for family in kin)
    cache, own = _fill(model, trunks, span + 1 if greedy else 1)
    known: list[Ids] = [[] for _ in prompts]  # the beginning of each answer
    branch_of: dict[int, tuple[int, int]] = {}  # by trunk and where it is left, or trunk and prompt
    for trunk, family in enumerate(kin):
        for n in family:
            if greedy:
                said = trunks.ids[trunk][len(prompts[n]) :]
                known[n] = _followed(said, own[trunk][-len(said) - 1 :], most, stops)
                if len(known[n]) == most or known[n][-1] in stops:
                    continue
            branch_of[n] = trunk, len(prompts[n]) + len(known[n]) if greedy else n
    branches: dict[tuple[int, int], Branch] = {}
    for n, key in sorted(branch_of.items()):
        more = max(most - len(known[n]), branches[key].more if key in branches else 0)
        branches[key] = Branch(key[0], prompts[n] + known[n], more)
    if branches:
        tree = Tree(model, cache, trunks, list(branches.values()))
        grown = dict(zip(branches, tree.grow(pick, stops, stopped), strict=True))
        for n, key in branch_of.items():
            known[n] = (known[n] + grown[key])[:most]
    return known


def _followed(said: Ids, own: Ids, most: int, stops: set[int]) -> Ids:
    """The beginning of a greedy answer beside which the trunk goes on with `said`, and the model,
    after each token of it, with `own`."""
    n = 0
    while n < min(len(said), most - 1) and own[n] == said[n] and own[n] not in stops:
        n += 1
    return own[: n + 1]


def _fill(model: Any, trunks: Trunks, last: int) -> tuple[Any, list[Ids]]:
    """A cache of the trunks; and what the model would write after each of their `last` places."""
    import torch
    from transformers.cache_utils import Cache

    cache = Cache(layer_class_to_replicate=_roomy())
    head = trunks.head
    if head:
        ids = torch.tensor([trunks.ids[0][:head]])
        _forward(model, cache, ids, torch.arange(head)[None], torch.ones_like(ids), 1)
        cache.batch_repeat_interleave(len(trunks.ids))
    padded = [[0] * gap + t[head:] for gap, t in zip(trunks.gaps, trunks.ids, strict=True)]
    ids, places = torch.tensor(padded), trunks.places
    logits = _forward(model, cache, ids, places[:, head:].clamp(min=0), (places >= 0).long(), last)
    return cache, logits.argmax(-1).tolist()


def _forward(model: Any, cache: Any, ids: Any, places: Any, mask: Any, last: int) -> Any:
    """Logits of the `last` tokens."""
    few = {"logits_to_keep": last} if "logits_to_keep" in _takes(model) else {}
    logits = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=places.to(model.device),
        past_key_values=cache,
        use_cache=True,
        **few,
    ).logits
    if cache.get_seq_length() != mask.shape[-1]:
        raise RuntimeError("it does not fill its cache")
    return logits[:, -last:]


@dataclass(frozen=True)
class Branch:
    """Of `ids`, all but the last stand in a trunk; at most so many `more` are wanted."""

    trunk: int
    ids: Ids
    more: int


class Tree:
    """Branches abreast in the cache of their trunks, which it takes over and lets grow."""

    def __init__(self, model: Any, cache: Any, trunks: Trunks, branches: Sequence[Branch]) -> None:
        import torch

        self.model, self.cache, self.branches = model, cache, branches
        on = [[n for n, b in enumerate(branches) if b.trunk == t] for t in range(len(trunks.ids))]
        # A row costs about as much as four branches, and the places that stay empty cost, too.
        self.abreast = min(
            range(1, _ABREAST + 1),
            key=lambda abreast: (abreast + 4) * sum(-(-len(mine) // abreast) for mine in on),
        )
        rows = [
            (trunk, mine[at : at + self.abreast])
            for trunk, mine in enumerate(on)
            for at in range(0, len(mine), self.abreast)
        ]
        whose = torch.tensor([trunk for trunk, _ in rows])
        cache.batch_select_indices(whose)
        ends = torch.zeros(len(rows), self.abreast, dtype=torch.long)  # of what is read of a trunk
        self.at = torch.zeros(len(branches), dtype=torch.long)
        for row, (_, mine) in enumerate(rows):
            for column, n in enumerate(mine):
                ends[row, column] = len(branches[n].ids) - 1
                self.at[n] = row * self.abreast + column
        places = trunks.places[whose][:, None]
        self.ends = ends
        self.reads = (places >= 0) & (places < ends[:, :, None])
        self.step = 0

    def scores(self, tokens: Sequence[int]) -> Any:
        """After one more token of each branch: (branches, vocabulary), float32."""
        import torch

        ids = torch.zeros(self.ends.numel(), dtype=torch.long)
        ids[self.at] = torch.tensor(tokens)
        own = torch.eye(self.abreast, dtype=torch.bool).expand(len(self.ends), -1, -1)
        self.reads = torch.cat([self.reads, own], -1)
        dtype = self.model.dtype
        mask = torch.zeros(self.reads.shape, dtype=dtype).masked_fill(
            ~self.reads, torch.finfo(dtype).min
        )
        logits = _forward(
            self.model,
            self.cache,
            ids.view(self.ends.shape),
            self.ends + self.step,
            mask[:, None],
            self.abreast,
        )
        self.step += 1
        return logits.flatten(0, 1)[self.at.to(logits.device)].float()

    def grow(self, pick: Pick, stops: set[int], stopped: Callable[[], bool]) -> list[Ids]:
        """What each branch goes on with, until it has all it wants or one of `stops`."""
        written: list[Ids] = [[] for _ in self.branches]
        tokens = [branch.ids[-1] for branch in self.branches]
        growing = set(range(len(tokens)))
        while growing and not stopped():
            tokens = pick(self.scores(tokens)).tolist()
            for n in list(growing):
                written[n].append(tokens[n])
                if tokens[n] in stops or len(written[n]) == self.branches[n].more:
                    growing.remove(n)
        return written


@cache
def _roomy() -> Any:
    """A cache layer that grows by a quarter where it is full, not by a copy for every token."""
    import torch
    from transformers.cache_utils import DynamicLayer

    class Roomy(DynamicLayer):  # type: ignore[misc]
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
                self.keys = self._grown(self.keys[:, :, :begin])
                self.values = self._grown(self.values[:, :, :begin])
            self.keys[:, :, begin : self.filled] = keys
            self.values[:, :, begin : self.filled] = values
            return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

        def _grown(self, held: Any) -> Any:
            room = self.filled * 5 // 4 - held.shape[-2]
            return torch.cat([held, held.new_empty(*held.shape[:2], room, held.shape[-1])], -2)

    return Roomy


def _takes(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)
