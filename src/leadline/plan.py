"""study -> trials, lazily: millions of trials are a generator, not a list."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zlib import crc32

import orjson

from . import registry
from .models.spec import ModelSpec
from .records import (
    Assist,
    Attempt,
    AttemptFailed,
    LeadlineError,
    NotApplicable,
    Prompt,
    Request,
    Sampling,
    Trial,
)
from .study import AttackPick, JudgePick, Study

log = logging.getLogger("leadline")
_SIDE_BY_SIDE = 64  # trials of a sweep: what a local model answers at once
NO_ATTACKER = "no attacker model: name one under attacker: in the study file"


@dataclass(frozen=True)
class Attack:
    """One attack of the study with its options; `label` is its name in results."""

    label: str
    plugin: registry.AttackPlugin
    options: Mapping[str, Any]

    @cached_property
    def assisted(self) -> bool:
        """Whether it asks an attacker model, and so is made while the study runs."""
        return inspect.iscoroutinefunction(self.plugin.function)

    @property
    def pool(self) -> str:
        """ "any": a prompt is broken if any of the attack's attempts breaks it."""
        return self.plugin.pool

    def attempts(self, prompt: Prompt, seed: int) -> list[Attempt]:
        """Same seed, prompt and attack: same attempts. Raises NotApplicable."""
        made = self.plugin.function(_shown(prompt), **self._arguments(prompt, seed))
        parts = made if isinstance(made, list) else [made]
        return [Attempt.ask(part) if isinstance(part, str) else part for part in parts]

    async def assisted_attempt(self, prompt: Prompt, seed: int, assist: Assist) -> Attempt:
        """Of an assisted attack. Raises NotApplicable or AttemptFailed."""
        arguments = self._arguments(prompt, seed)
        made = await self.plugin.function(_shown(prompt), assist=assist, **arguments)
        if isinstance(made, str):
            return Attempt.ask(made)
        if not isinstance(made, Attempt):
            raise TypeError(f"an assisted attack makes one attempt, not a {type(made).__name__}")
        return made

    @cached_property
    def asks_attacker(self) -> bool:
        """Whether an attacker model makes its attempts or decodes their answers."""
        needs = "attacker" in self.plugin.needs
        return needs or inspect.iscoroutinefunction(self.plugin.decode)

    def _arguments(self, prompt: Prompt, seed: int) -> dict[str, Any]:
        arguments = dict(self.options)
        if "rng" in self.plugin.options:
            arguments["rng"] = random.Random(f"{seed}|{self.label}|{prompt.dataset}|{prompt.id}")
        return arguments

    async def decode(self, answer: str, assist: Assist) -> str:
        """The answer as text to judge: decoded where it came back encoded and can be. Raises
        AttemptFailed where a model has to decode and fails."""
        decode = self.plugin.decode
        if decode is None:
            return answer
        try:
            if inspect.iscoroutinefunction(decode):
                return str(await decode(answer, assist))
            return str(decode(answer))
        except ValueError:
            return answer
        except NotApplicable as why:
            raise AttemptFailed(str(why)) from None


def _shown(prompt: Prompt) -> Prompt:
    """As a model is shown it: the context before the request."""
    if not prompt.context:
        return prompt
    return replace(prompt, text=f"{prompt.context}\n\n---\n\n{prompt.text}")


@dataclass(frozen=True)
class Plan:
    """A study with its prompts loaded and its names resolved; mappings are by dataset."""

    study: Study
    prompts: Mapping[str, tuple[Prompt, ...]]
    attacks: Mapping[str, tuple[Attack, ...]]
    judges: Mapping[str, tuple[JudgePick, ...]]  # the first is what the report shows

    def applying(self, dataset: str, prompt: Prompt) -> Iterator[Attack]:
        """The attacks on a prompt: harmless ones are asked plainly only; one that carries an
        attack already (SORRY-Bench's mutations) is asked as it stands and counts as that."""
        for attack in self.attacks[dataset]:
            if attack.label == "direct" and prompt.mutation:
                yield _carried(prompt.mutation)
            elif attack.label == "direct" or (prompt.harmful and not prompt.mutation):
                yield attack

    @property
    def every_attack(self) -> dict[str, Attack]:
        """All attacks by label, those that prompts carry too."""
        found = {a.label: a for attacks in self.attacks.values() for a in attacks}
        carried = {p.mutation for ps in self.prompts.values() for p in ps if p.mutation}
        return {label: _carried(label) for label in carried} | found


@cache
def _carried(mutation: str) -> Attack:
    """The plain request under the name of the attack that it carries, with that one's decode."""
    plain = registry.get("attack", "direct")
    known = {p.name: p for p in registry.plugins("attack")}.get(mutation, plain)
    plugin = replace(known, function=plain.function, needs=(), pool="one")
    return Attack(mutation, plugin, {})


@dataclass(frozen=True)
class Target:
    """What planning needs to know of a target. `no_prefix` is why it takes no response prefix."""

    spec: ModelSpec
    identity: Mapping[str, Any]
    no_prefix: str = ""


def load(study: Study, limit: int | None = None, *, counting: bool = False) -> Plan:
    """Load the datasets; `limit` takes at most that many prompts of each. `counting`, for a dry
    run, makes do with the published counts of those that are not here.

    Raises LeadlineError where a dataset cannot be read."""
    prompts: dict[str, tuple[Prompt, ...]] = {}
    judges: dict[str, tuple[JudgePick, ...]] = {}
    attacks: dict[str, tuple[Attack, ...]] = {}
    for pick in study.datasets:
        plugin = pick.plugins()[0]
        options = {k: v for k, v in pick.options.items() if k in plugin.options}
        if isinstance(options.get("path"), str):
            options["path"] = str(study.locate(options["path"]))
        try:
            rows = list(plugin.function(**options))
        except TypeError as error:
            raise LeadlineError(f"dataset {pick.name}: {error}") from None
        except LeadlineError:
            rows = published_counts(plugin, options) if counting else []
            if not rows:
                raise
            log.warning("%s is not here: counted as the %d published", pick.name, len(rows))
        label = str(pick.options.get("name") or (rows[0].dataset if rows else pick.name))
        if not rows:
            raise LeadlineError(f"dataset {label} holds no prompts: check its path and options")
        if label in prompts:
            raise LeadlineError(
                f"two datasets are called {label!r}: give one of them another name: option"
            )
        most = min(x for x in (limit, pick.options.get("limit"), len(rows)) if x)
        chosen = (rows[i * len(rows) // most] for i in range(most))  # spread over the whole set
        prompts[label] = tuple(replace(p, dataset=label) for p in chosen)
        default = JudgePick(name=plugin.judge)
        judges[label] = tuple(study.judges) or (default,)
        attacks[label] = _attacks(pick.attacks or study.attacks, study.locate)
        _try_out(attacks[label], prompts[label], study.seed)
    return Plan(study, prompts, attacks, judges)


def _try_out(attacks: Iterable[Attack], prompts: Sequence[Prompt], seed: int) -> None:
    """Make one attempt of each attack, so that a wrong option is told before anything is asked."""
    prompt = next((p for p in prompts if p.harmful), prompts[0])
    for attack in attacks:
        if not attack.assisted:
            try:
                attack.attempts(prompt, seed)
            except LeadlineError as error:
                raise LeadlineError(f"attack {attack.label}: {error}") from None
            except Exception:
                log.debug("attack %s", attack.label, exc_info=True)  # `trials` records it


def published_counts(plugin: registry.DatasetPlugin, options: Mapping[str, Any]) -> list[Prompt]:
    """Stand-ins for a public dataset that is not here: as many prompts as are published, of a
    usual length. None for one that is here, whose fault has to be mended, or of unknown size."""
    path, rows = options.get("path"), plugin.rows or 0
    if "hub" not in plugin.options or (path and Path(path).expanduser().exists()):
        return []
    found = (Prompt(str(n), "", plugin.name) for n in range(rows))
    if outline := plugin.outline:
        found = outline(**options)
    return [replace(prompt, text="?" * 100) for prompt in found]


_FILES = ("table", "suffixes")  # options of attacks that name a file


def _attacks(picks: Iterable[AttackPick], locate: Callable[[str], Path]) -> tuple[Attack, ...]:
    """Every variant once, in the study's order."""
    found = {}
    for pick in picks:
        for label, plugin, options in pick.variants():
            files = {k: str(locate(options[k])) for k in _FILES if isinstance(options.get(k), str)}
            found[label] = Attack(label, plugin, options | files)
    return tuple(found.values())


def _contents(attack: Attack) -> list[str]:
    """Digests of the files that its options name: when they change, so do its attempts."""
    paths = [Path(attack.options[name]) for name in _FILES if attack.options.get(name)]
    return [blake2b(path.read_bytes()).hexdigest() for path in paths if path.is_file()]


def trials(plan: Plan, target: Target) -> Iterator[Trial]:
    """Every trial of one target, in a fixed order.

    A trial of a model-assisted attack has no request yet; its key is that of its recipe: of all
    that decides what the attack will make.
    """
    study, spec = plan.study, target.spec
    sampling, samples = study.sampling.record(study.seed), study.sampling.samples
    head = _canonical({"model": target.identity})
    attacker = study.attacker.model_dump(exclude={"card"}) if study.attacker else None
    crashed: set[str] = set()
    for thinking, (dataset, attack, prompts) in itertools.product(spec.thinking, _abreast(plan)):
        made_from = [attack.label, dict(attack.options), attacker, study.seed, _contents(attack)]
        aside = _canonical(made_from)
        for prompt in prompts:
            cell = (spec.label, thinking, prompt, attack.label)
            attempts, outcome, reason = [Attempt(())], "", ""
            try:
                _check_needs(attack, study)
                if attack.assisted:
                    recipe = _canonical([dataset, prompt, thinking, sampling])
                    for sample in range(samples):
                        mixed = head + aside + recipe + sample.to_bytes(8)
                        key = blake2b(mixed, digest_size=16).digest()
                        yield Trial(*cell, sample, Attempt(()), None, key)
                    continue
                attempts = attack.attempts(prompt, study.seed)
            except NotApplicable as why:
                outcome, reason = "not_applicable", str(why)
            except Exception as error:  # a plug-in's own fault: its trials fail, no others
                outcome = "failed"
                reason = f"the attack {attack.label} raised {type(error).__name__}: {error}"
                if attack.label not in crashed:
                    crashed.add(attack.label)
                    log.warning("%s", reason)
            numbered = itertools.product(attempts, range(samples))
            for index, (attempt, sample) in enumerate(numbered):
                if attempt.prefix and target.no_prefix:
                    yield Trial(
                        *cell, index, attempt, None, b"", "not_applicable", target.no_prefix
                    )
                elif outcome:
                    yield Trial(*cell, index, attempt, None, b"", outcome, reason)
                else:
                    request = request_of(attempt, sampling, thinking, sample)
                    yield Trial(*cell, index, attempt, request, _key(head, request))


def _blocks(plan: Plan) -> Iterator[tuple[str, Attack, list[Prompt]]]:
    """Prompts by dataset and the attack that applies to them, in the study's order."""
    for dataset, prompts in plan.prompts.items():
        blocks: dict[str, tuple[Attack, list[Prompt]]] = {
            attack.label: (attack, []) for attack in plan.attacks[dataset]
        }
        for prompt in prompts:
            for attack in plan.applying(dataset, prompt):
                blocks.setdefault(attack.label, (attack, []))[1].append(prompt)
        for attack, chosen in blocks.values():
            if chosen:
                yield dataset, attack, chosen


def _abreast(plan: Plan) -> Iterator[tuple[str, Attack, list[Prompt]]]:
    """The blocks, with the variants of one attack (a sweep of its options) side by side, a few
    prompts at a time: what a model reads of a prompt is then read once for all of them."""
    for (dataset, _), variants in itertools.groupby(
        _blocks(plan), key=lambda block: (block[0], block[1].plugin.name)
    ):
        sweep = list(variants)
        size = -(-_SIDE_BY_SIDE // len(sweep)) if len(sweep) > 1 else len(sweep[0][2])
        for start in range(0, max(len(prompts) for _, _, prompts in sweep), size):
            for _, attack, prompts in sweep:
                if some := prompts[start : start + size]:
                    yield dataset, attack, some


def request_of(attempt: Attempt, sampling: Sampling, thinking: str, sample: int) -> Request:
    """What a model is told of an attempt."""
    own = _override(sampling, attempt)
    return Request(attempt.messages, attempt.prefix, own, thinking, sample)


def _override(sampling: Sampling, attempt: Attempt) -> Sampling:
    """The study's settings with the attempt's own. Settings that are compared must not all draw
    from one random stream, so their seeds differ; greedy answers depend on no seed."""
    if attempt.sampling:
        changes: dict[str, Any] = dict(attempt.sampling)
        if sampling.seed is not None:
            own = crc32(_canonical(changes)) & 0xFFFFFF
            changes = {"seed": sampling.seed + own, **changes}
        sampling = replace(sampling, **changes)
    return sampling if sampling.temperature else replace(sampling, seed=None)


def _check_needs(attack: Attack, study: Study) -> None:
    if "attacker" in attack.plugin.needs and study.attacker is None:
        if attack.options.get("table"):
            return  # what an attacker would write is there
        raise NotApplicable(f"{attack.label}: {NO_ATTACKER}")


def _key(identity: bytes, request: Request) -> bytes:
    """The trial's key: BLAKE2b-128 over canonical JSON of model identity and request."""
    return blake2b(identity + _canonical(request), digest_size=16).digest()


def model_key(identity: Mapping[str, Any], request: Request) -> bytes:
    """The key of a request outside the plan (a judge's, an attacker's)."""
    return _key(_canonical({"model": identity}), request)


def _canonical(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)


@dataclass(frozen=True)
class Estimate:
    """What a run of one target would ask, before asking. Tokens by four characters each, answers
    at their longest."""

    model: str
    trials: int
    requests: int
    prompt_tokens: int
    answer_tokens: int


def estimate(plan: Plan) -> list[Estimate]:
    """Count the trials of each target and project their tokens from some of each attack."""
    rows = []
    for spec in plan.study.targets:
        counts = dict.fromkeys(("trials", "requests", "prompt", "answer"), 0)
        for _, attack, prompts in _blocks(plan):
            each = _each(plan, spec, attack, prompts)
            counts["trials"] += len(prompts) * each
            some = prompts[:: max(1, len(prompts) // 20)]
            sizes = [size for p in some if (size := _size(attack, p, plan.study, spec))]
            if not sizes:
                continue
            requests = round(len(prompts) * each * len(sizes) / len(some))  # the rest: n/a
            counts["requests"] += requests
            counts["prompt"] += round(requests * sum(s for s, _ in sizes) / len(sizes) / 4)
            counts["answer"] += round(requests * sum(m for _, m in sizes) / len(sizes))
        rows.append(Estimate(spec.label, *counts.values()))
    return rows


def count(plan: Plan) -> dict[str, int]:
    """Trials by target."""
    return {
        spec.label: sum(len(ps) * _each(plan, spec, a, ps) for _, a, ps in _blocks(plan))
        for spec in plan.study.targets
    }


def _each(plan: Plan, spec: ModelSpec, attack: Attack, prompts: list[Prompt]) -> int:
    """Trials of one prompt."""
    attempts = 1
    if attack.pool == "any" and not attack.assisted:
        with contextlib.suppress(Exception):
            attempts = len(attack.attempts(prompts[0], plan.study.seed))
    return attempts * plan.study.sampling.samples * len(spec.thinking)


def _size(attack: Attack, prompt: Prompt, study: Study, spec: ModelSpec) -> tuple[int, int] | None:
    """(characters sent, most tokens answered) of one request; None if it would not be sent."""
    try:
        _check_needs(attack, study)
        if attack.assisted:  # what an attacker will write is not known: some paragraphs
            return 1000, study.sampling.max_tokens
        attempt = attack.attempts(prompt, study.seed)[0]
    except Exception:
        return None
    if attempt.prefix and spec.prefix == "none":
        return None
    most = int(attempt.sampling.get("max_tokens", study.sampling.max_tokens))
    characters = sum(len(m.content) for m in attempt.messages)
    if attempt.prefix:
        characters += len(attempt.prefix.answer) + len(attempt.prefix.thought or "")
    return characters, most
