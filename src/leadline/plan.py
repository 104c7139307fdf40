"""Turn a study into trials, lazily: a generator, since a study can have millions of them."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zlib import crc32

import orjson

from . import registry
from .judge_choice import resolve
from .models.spec import ModelSpec
from .records import (
    Assist,
    Attempt,
    AttemptFailed,
    LeadlineError,
    Message,
    NotApplicable,
    Prompt,
    Request,
    ResponsePrefix,
    Sampling,
    Trial,
)
from .secret import hide, scrub, trace, where_raised, without_secrets
from .study import AttackPick, JudgePick, Study
from .text import one_line

log = logging.getLogger("leadline")
_SWEEP_BATCH = 64  # trials of a sweep that share prompts: a local model's default batch
NO_ATTACKER = "no attacker model: name one under attacker: in the study file"


@dataclass(frozen=True)
class Attack:
    """One attack of the study with its options. `label` is its name in results, e.g.
    "prefill(k=5)"."""

    label: str
    plugin: registry.AttackPlugin
    options: Mapping[str, Any]

    @cached_property
    def assisted(self) -> bool:
        """Whether the attack calls other models, so that its attempts are made during the run."""
        return inspect.iscoroutinefunction(self.plugin.function)

    @property
    def pool(self) -> str:
        """ "any": a prompt counts as unsafe if any attempt got an unsafe answer; "one": each
        attempt counts."""
        return self.plugin.pool

    def attempts(self, prompt: Prompt, seed: int) -> list[Attempt]:
        """The attempts on a prompt; deterministic in the seed, the prompt and the attack. Raises
        NotApplicable, and whatever the plug-in raises; TypeError or ValueError if it returns
        anything but attempts."""
        try:
            result = self.plugin.function(_with_context(prompt), **self._arguments(prompt, seed))
        except SystemExit as error:  # it would end the run of all other attacks
            raise RuntimeError(f"it called sys.exit({error.code!r})") from None
        attempts = result if isinstance(result, list) else [result]
        if not attempts:
            raise ValueError("it returned no attempt")
        return [_checked(attempt) for attempt in attempts]

    async def assisted_attempt(self, prompt: Prompt, seed: int, assist: Assist) -> Attempt:
        """The attempt of a model-assisted attack. Raises NotApplicable or AttemptFailed, and
        whatever the plug-in raises."""
        arguments = self._arguments(prompt, seed)
        try:
            result = await self.plugin.function(_with_context(prompt), assist=assist, **arguments)
        except SystemExit as error:
            raise RuntimeError(f"it called sys.exit({error.code!r})") from None
        return _checked(result)

    @cached_property
    def asks_attacker(self) -> bool:
        """Whether the attack needs an attacker model, for its attempts or to decode answers."""
        needs = "attacker" in self.plugin.needs
        return needs or inspect.iscoroutinefunction(self.plugin.decode)

    def _arguments(self, prompt: Prompt, seed: int) -> dict[str, Any]:
        arguments = dict(self.options)
        if "rng" in self.plugin.options:
            arguments["rng"] = random.Random(f"{seed}|{self.label}|{prompt.dataset}|{prompt.id}")
        return arguments

    async def decode(self, answer: str, assist: Assist) -> str:
        """The text to judge: the decoded answer, or the answer itself if the attack has no decoder
        or the answer is not encoded. Raises AttemptFailed if a model decodes and fails."""
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


_SETTINGS = {field.name for field in fields(Sampling)}


def _checked(attempt: Any) -> Attempt:
    """The attempt that an attack returned, a string as one user message. Raises TypeError or
    ValueError for a value that cannot be sent."""
    if isinstance(attempt, str):
        attempt = Attempt.ask(attempt)
    if not isinstance(attempt, Attempt):
        raise TypeError(f"it returned a {type(attempt).__name__}, not a string or an Attempt")
    prefix = attempt.prefix
    if not (prefix is None or isinstance(prefix, ResponsePrefix)):
        raise TypeError(f"its prefix is a {type(prefix).__name__}, not a ResponsePrefix")
    if not attempt.messages or not all(isinstance(m, Message) for m in attempt.messages):
        raise TypeError("its messages are not Message objects, at least one")
    texts = [text for m in attempt.messages for text in (m.role, m.content)]
    if prefix:
        texts += [prefix.answer, prefix.thought or ""]
        if prefix.tokens is not None and not (type(prefix.tokens) is int and prefix.tokens >= 0):
            raise ValueError(f"its prefix is truncated to {prefix.tokens!r} tokens")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"it sends a {type(text).__name__} as text")
        text.encode()  # raises for half of a surrogate pair
    if unknown := set(attempt.sampling) - _SETTINGS:
        raise ValueError(f"unknown sampling settings: {', '.join(map(repr, sorted(unknown)))}")
    for name, value in attempt.sampling.items():
        if not (isinstance(value, int | float) and abs(value) < 2**63):  # False for NaN
            raise ValueError(f"its sampling setting {name} is {value!r}")
    return attempt


def _with_context(prompt: Prompt) -> Prompt:
    """The prompt with its context, if any, prepended to the text."""
    if not prompt.context:
        return prompt
    return replace(prompt, text=f"{prompt.context}\n\n---\n\n{prompt.text}")


@dataclass(frozen=True)
class Plan:
    """A study with its prompts loaded and its plug-ins resolved. The mappings are by dataset; the
    first judge of a dataset is its primary one, whose verdicts the report shows."""

    study: Study
    prompts: Mapping[str, tuple[Prompt, ...]]
    attacks: Mapping[str, tuple[Attack, ...]]
    judges: Mapping[str, tuple[JudgePick, ...]]

    def attacks_on(self, dataset: str, prompt: Prompt) -> Iterator[Attack]:
        """The attacks that apply to a prompt. Harmless prompts get only `direct`. A prompt to which
        an attack is already applied (SORRY-Bench's mutations) is sent unchanged, in place of
        `direct`, and counts as that attack."""
        for attack in self.attacks[dataset]:
            if attack.label == "direct" and prompt.mutation:
                yield _already_applied(prompt.mutation)
            elif attack.label == "direct" or (prompt.harmful and not prompt.mutation):
                yield attack

    @property
    def every_attack(self) -> dict[str, Attack]:
        """All attacks by label, including those that prompts already carry."""
        listed = {a.label: a for attacks in self.attacks.values() for a in attacks}
        mutations = {p.mutation for ps in self.prompts.values() for p in ps if p.mutation}
        return {label: _already_applied(label) for label in mutations} | listed


@cache
def _already_applied(mutation: str) -> Attack:
    """An attack that sends the prompt unchanged, with the name and the decoder of the attack that
    is already applied to its text."""
    direct = registry.get("attack", "direct")
    original = {p.name: p for p in registry.plugins("attack")}.get(mutation, direct)
    plugin = replace(original, function=direct.function, needs=(), pool="one")
    return Attack(mutation, plugin, {})


@dataclass(frozen=True)
class Target:
    """A target as planning needs it. `identity` is `Model.identity`; `no_prefix` is why the target
    does not continue response prefixes ("": it does)."""

    spec: ModelSpec
    identity: Mapping[str, Any]
    no_prefix: str = ""


def load(study: Study, limit: int | None = None, *, counting: bool = False) -> Plan:
    """Load a study's datasets and resolve its attacks and judges.

    `limit` is the maximum number of prompts per dataset, spread evenly over it. With `counting`
    (for a dry run), a public dataset that is not on this machine is replaced by placeholders, as
    many as its published number of prompts. Raises LeadlineError if a dataset cannot be read or an
    attack's options are invalid.
    """
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
        except LeadlineError:
            rows = published_counts(plugin, options) if counting else []
            if not rows:
                raise
            log.warning(
                "dataset %s was not found: counting its %d published prompts", pick.name, len(rows)
            )
        except (Exception, SystemExit) as error:
            log.debug("dataset %s raised:\n%s", pick.name, trace(error))
            raise LeadlineError(
                f"dataset {pick.name}: {where_raised(error)}: check its path and options, or the "
                "package that it comes from"
            ) from error
        _check_prompts(pick.name, rows)
        label = str(pick.options.get("name") or (rows[0].dataset if rows else pick.name))
        if not rows:
            raise LeadlineError(f"dataset {label} has no prompts: check its path and options")
        if label in prompts:
            raise LeadlineError(f"two datasets are called {label!r}: set name: for one of them")
        most = min(x for x in (limit, pick.options.get("limit"), len(rows)) if x)
        spread = (rows[i * len(rows) // most] for i in range(most))
        prompts[label] = tuple(replace(p, dataset=label) for p in spread)
        picks = study.judges if pick.judges is None else pick.judges
        judges[label] = tuple(resolve(picks, pick.judge, study.attacker))
        attacks[label] = _attacks(pick.attacks or study.attacks, study.locate)
        _check_options(attacks[label], prompts[label], study.seed)
    return Plan(study, prompts, attacks, judges)


def _check_prompts(dataset: str, rows: Sequence[Any]) -> None:
    """Raise LeadlineError if a dataset yields anything but prompts whose fields are text."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Prompt):
            raise LeadlineError(
                f"dataset {dataset}: its row {number} is a {type(row).__name__}, not a Prompt"
            )
        texts = (row.id, row.text, row.category, row.context, row.target, row.base, row.mutation)
        turns = (text for message in row.history for text in (message.role, message.content))
        if not all(isinstance(text, str) for text in (*texts, *row.answers, *turns)):
            raise LeadlineError(f"dataset {dataset}: a field of its row {number} is not text")


def _check_options(attacks: Iterable[Attack], prompts: Sequence[Prompt], seed: int) -> None:
    """Make one attempt of each attack, so that invalid options are reported before the run."""
    prompt = next((p for p in prompts if p.harmful), prompts[0])
    for attack in attacks:
        if not attack.assisted:
            try:
                attack.attempts(prompt, seed)
            except LeadlineError as error:
                raise LeadlineError(f"attack {attack.label}: {error}") from None
            except NotApplicable:
                pass
            except Exception as error:
                log.debug("attack %s raised:\n%s", attack.label, trace(error))
                if attack.options and registry.is_own(attack.plugin):
                    raise LeadlineError(
                        f"attack {attack.label}: {one_line(error)}: check its options"
                    ) from error


def published_counts(plugin: registry.DatasetPlugin, options: Mapping[str, Any]) -> list[Prompt]:
    """Placeholder prompts of 100 characters for a public dataset that is not on this machine, as
    many as its published number of prompts.

    Returns [] if the number is unknown, if the dataset is not a public one, or if `path` exists:
    then the file itself is at fault and the error must be reported."""
    path, rows = options.get("path"), plugin.rows or 0
    try:
        exists = bool(path) and Path(str(path)).expanduser().exists()
    except (OSError, TypeError, RuntimeError):  # not a path at all
        exists = True
    if "hub" not in plugin.options or exists:
        return []
    if plugin.outline:
        prompts = plugin.outline(**options)
    else:
        prompts = (Prompt(str(n), "", plugin.name) for n in range(rows))
    return [replace(prompt, text="?" * 100) for prompt in prompts]


_FILE_OPTIONS = ("table", "suffixes")  # options of attacks that are paths


def _attacks(picks: Iterable[AttackPick], locate: Callable[[str], Path]) -> tuple[Attack, ...]:
    """All variants of the listed attacks, without duplicates, in the study's order."""
    attacks = {}
    for pick in picks:
        for label, plugin, options in pick.variants():
            paths = {
                name: str(locate(options[name]))
                for name in _FILE_OPTIONS
                if isinstance(options.get(name), str)
            }
            attacks[label] = Attack(label, plugin, options | paths)
    return tuple(attacks.values())


def _file_digests(attack: Attack) -> list[str]:
    """Digests of the files that the attack's options name: its attempts depend on them."""
    paths = [Path(attack.options[name]) for name in _FILE_OPTIONS if attack.options.get(name)]
    return [blake2b(path.read_bytes()).hexdigest() for path in paths if path.is_file()]


def trials(plan: Plan, target: Target) -> Iterator[Trial]:
    """Yield every trial of one target, in a fixed order.

    A trial of a model-assisted attack has no request yet; its key is a hash of everything that
    decides what the attack will send (its "recipe").
    """
    study, spec = plan.study, target.spec
    sampling, samples = study.sampling.record(study.seed), study.sampling.samples
    model_bytes = _canonical({"model": target.identity})
    attacker = study.attacker and without_secrets(study.attacker.model_dump(exclude={"card"}))
    crashed: set[str] = set()
    ordered = itertools.product(spec.thinking, _interleaved_blocks(plan))
    for thinking, (dataset, attack, prompts) in ordered:
        digests = _file_digests(attack)
        attack_bytes = _canonical(
            [attack.label, dict(attack.options), attacker, study.seed, digests]
        )
        for prompt in prompts:
            cell = (spec.label, thinking, prompt, attack.label)
            attempts, outcome, reason = [Attempt(())], "", ""
            try:
                _check_needs(attack, study)
                if attack.assisted:
                    prompt_bytes = _canonical([dataset, _sent(prompt), thinking, sampling])
                    for sample in range(samples):
                        recipe = model_bytes + attack_bytes + prompt_bytes + sample.to_bytes(8)
                        key = blake2b(recipe, digest_size=16).digest()
                        yield Trial(*cell, sample, Attempt(()), None, key)
                    continue
                attempts = attack.attempts(prompt, study.seed)
            except NotApplicable as why:
                outcome, reason = "not_applicable", str(why)
            except Exception as error:  # a bug in the plug-in: only its own trials fail
                outcome = "failed"
                message = hide(scrub(str(error)), prompt.text, prompt.context, prompt.target)
                reason = f"the attack {attack.label} raised {type(error).__name__}: {message}"
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
                    request = request_of(prompt, attempt, sampling, thinking, sample)
                    yield Trial(*cell, index, attempt, request, _key(model_bytes, request))


def cells(plan: Plan) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield (model, thinking, dataset, attack, pool) of every cell, in the study's order."""
    for spec in plan.study.targets:
        for thinking, (dataset, attack, _) in itertools.product(spec.thinking, _blocks(plan)):
            yield spec.label, thinking, dataset, attack.label, attack.pool


def _blocks(plan: Plan) -> Iterator[tuple[str, Attack, list[Prompt]]]:
    """Yield (dataset, attack, the prompts that it applies to) in the study's order."""
    for dataset, prompts in plan.prompts.items():
        blocks: dict[str, tuple[Attack, list[Prompt]]] = {
            attack.label: (attack, []) for attack in plan.attacks[dataset]
        }
        for prompt in prompts:
            for attack in plan.attacks_on(dataset, prompt):
                blocks.setdefault(attack.label, (attack, []))[1].append(prompt)
        for attack, attacked in blocks.values():
            if attacked:
                yield dataset, attack, attacked


def _interleaved_blocks(plan: Plan) -> Iterator[tuple[str, Attack, list[Prompt]]]:
    """The blocks, with the variants of one attack (a sweep of its options) interleaved, a few
    prompts at a time: a local model then computes the prefix that they share once per batch."""
    for (dataset, _), variants in itertools.groupby(
        _blocks(plan), key=lambda block: (block[0], block[1].plugin.name)
    ):
        sweep = list(variants)
        size = -(-_SWEEP_BATCH // len(sweep)) if len(sweep) > 1 else len(sweep[0][2])
        for start in range(0, max(len(prompts) for _, _, prompts in sweep), size):
            for _, attack, prompts in sweep:
                if part := prompts[start : start + size]:
                    yield dataset, attack, part


def request_of(
    prompt: Prompt, attempt: Attempt, sampling: Sampling, thinking: str, sample: int
) -> Request:
    """The request that sends an attempt on a prompt. `sampling` are the study's settings."""
    merged = _override(sampling, attempt)
    messages = with_history(prompt, attempt.messages)
    return Request(messages, attempt.prefix, merged, thinking, sample)


def with_history(prompt: Prompt, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages after the earlier turns of the prompt's conversation, but a system message at
    their start stays first."""
    first = 1 if messages and messages[0].role == "system" else 0
    return (*messages[:first], *prompt.history, *messages[first:])


def _sent(prompt: Prompt) -> dict[str, Any]:
    """What decides the requests that an attack makes of a prompt, by field."""
    names = [field.name for field in fields(prompt) if field.name not in ("history", "answers")]
    history = {"history": prompt.history} if prompt.history else {}
    return {name: getattr(prompt, name) for name in names} | history


def _override(sampling: Sampling, attempt: Attempt) -> Sampling:
    """The study's settings, overridden by the attempt's. Each set of overrides gets a different
    seed, so that compared settings do not share one random stream. Greedy decoding has no seed."""
    if attempt.sampling:
        changes: dict[str, Any] = dict(attempt.sampling)
        if sampling.seed is not None:
            offset = crc32(_canonical(changes)) & 0xFFFFFF
            changes = {"seed": sampling.seed + offset, **changes}
        sampling = replace(sampling, **changes)
    return sampling if sampling.temperature else replace(sampling, seed=None)


def _check_needs(attack: Attack, study: Study) -> None:
    if "attacker" in attack.plugin.needs and study.attacker is None:
        if attack.options.get("table"):
            return  # the table has the texts that an attacker would write
        raise NotApplicable(f"{attack.label}: {NO_ATTACKER}")


def _key(identity: bytes, request: Request) -> bytes:
    """The key of a request: BLAKE2b-128 over the canonical JSON of model identity and request."""
    return blake2b(identity + _canonical(request), digest_size=16).digest()


def model_key(identity: Mapping[str, Any], request: Request) -> bytes:
    """The key of a request to any model (a target, a judge's model, an attacker)."""
    return _key(_canonical({"model": identity}), request)


def _canonical(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)


@dataclass(frozen=True)
class Estimate:
    """The size of a run for one target, estimated without sending anything. `prompt_tokens`
    assumes four characters per token; `answer_tokens` assumes that each answer reaches its
    maximum."""

    model: str
    trials: int
    requests: int
    prompt_tokens: int
    answer_tokens: int


def estimate(plan: Plan) -> list[Estimate]:
    """Estimate the trials, requests and tokens of each target. The number of trials is exact;
    requests and tokens are extrapolated from about 20 prompts per attack."""
    rows = []
    for spec in plan.study.targets:
        counts = dict.fromkeys(("trials", "requests", "prompt", "answer"), 0)
        for _, attack, prompts in _blocks(plan):
            each = _trials_per_prompt(plan, attack, prompts) * len(spec.thinking)
            counts["trials"] += len(prompts) * each
            sampled = prompts[:: max(1, len(prompts) // 20)]
            sizes = [size for p in sampled if (size := _size(attack, p, plan.study, spec))]
            if not sizes:
                continue
            # A prompt without a size is not applicable: nothing is sent for it.
            requests = round(len(prompts) * each * len(sizes) / len(sampled))
            counts["requests"] += requests
            counts["prompt"] += round(requests * sum(s for s, _ in sizes) / len(sizes) / 4)
            counts["answer"] += round(requests * sum(m for _, m in sizes) / len(sizes))
        rows.append(Estimate(spec.label, *counts.values()))
    return rows


def count(plan: Plan) -> dict[str, int]:
    """The number of trials by target, see `count_cells`."""
    totals: dict[str, int] = {}
    for (model, *_), trials in count_cells(plan).items():
        totals[model] = totals.get(model, 0) + trials
    return totals


def count_cells(plan: Plan) -> dict[tuple[str, str, str, str], int]:
    """The number of trials of each cell: by model, thinking mode, dataset and attack. It is too
    large where an attack of several attempts is not applicable to some prompts."""
    return {
        (spec.label, thinking, dataset, attack.label): len(prompts)
        * _trials_per_prompt(plan, attack, prompts)
        for spec in plan.study.targets
        for thinking, (dataset, attack, prompts) in itertools.product(spec.thinking, _blocks(plan))
    }


def _trials_per_prompt(plan: Plan, attack: Attack, prompts: list[Prompt]) -> int:
    """Attempts (1 unless the attack's pool is "any") x samples."""
    attempts = 1
    if attack.pool == "any" and not attack.assisted:
        with contextlib.suppress(Exception):
            attempts = len(attack.attempts(prompts[0], plan.study.seed))
    return attempts * plan.study.sampling.samples


def _size(attack: Attack, prompt: Prompt, study: Study, spec: ModelSpec) -> tuple[int, int] | None:
    """(characters sent, maximum tokens generated) of one request; None if none would be sent."""
    try:
        _check_needs(attack, study)
        if attack.assisted:  # the attacker's text is unknown: assume some paragraphs
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
