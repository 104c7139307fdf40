"""Messages and a response prefix, rendered with a model's own chat template, and read back.

For every interface that sends a prompt instead of a chat: local weights and `/v1/completions`.
Needs transformers for the tokenizer, but not torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..records import LeadlineError, NotApplicable, Request, ResponsePrefix
from ..text import one_line
from . import reasoning as formats
from .checkpoint import adapter_base, commit, folder


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt: its token ids, which are what to send, and the same as text; what the template
    adds after the last message; and the response prefix as the model receives it."""

    ids: list[int]
    text: str
    header_tail: str
    prefix: str


@dataclass(frozen=True)
class Template:
    """A tokenizer with its chat template and reasoning format. `arguments` go to the template."""

    tokenizer: Any
    format: formats.Format
    name: str = "the model"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def load(
        path: str | Path,
        *,
        reasoning: str | None = None,
        chat_template: str | Path | None = None,
        revision: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Template:
        """From a folder or hub id. `chat_template` is a jinja file that replaces the tokenizer's;
        `reasoning` names the format, which is else guessed from the template.

        Raises LeadlineError where there is no tokenizer, or one without a chat template.
        """
        tokenizer = load_tokenizer(path, revision)
        if chat_template is not None:
            tokenizer.chat_template = read_template(chat_template)
        return Template.of(tokenizer, str(path), reasoning=reasoning, arguments=arguments)

    @staticmethod
    def of(
        tokenizer: Any,
        name: str,
        *,
        reasoning: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Template:
        """From a tokenizer at hand. Raises LeadlineError for one without a chat template."""
        if not tokenizer.chat_template:
            raise LeadlineError(
                f"model {name}: its tokenizer has no chat template, so it cannot be asked in a "
                "chat: put chat_template.jinja into its folder (in a study, name the file as "
                "`chat_template:` of the target), or give an instruct model"
            )
        given = dict(arguments or {})
        plain = Template(tokenizer, formats.get(reasoning or "none"), name, given)
        try:
            _, tail = plain._written([{"role": "user", "content": "?"}], given)
        except NotApplicable as error:
            raise LeadlineError(f"{error}: mend the template, or give another") from error
        guess = formats.detect(tokenizer.get_chat_template(), tail)
        return replace(plain, format=formats.get(reasoning or guess))

    def render(self, request: Request) -> Rendered:
        """The prompt of a request, up to where the model goes on.

        The prefix's answer is tokenized alone and cut to its `tokens`; what stands before it is
        one text to the tokenizer, as in training. Thinking "off" writes the format's empty
        thought where the template does not. Raises NotApplicable for messages that the template
        refuses, and for thinking "on" where there is none.
        """
        prefix = request.prefix or ResponsePrefix()
        forged = bool(prefix.thought) or prefix.thought_open
        if request.thinking == "off" and not forged:
            prefix = replace(prefix, thought="")
        text, tail = self._prompt(request)
        if forged:
            bare = formats.reopened(self.format, tail)
            text, tail = text[: len(text) - len(tail)] + bare, bare
        lead = formats.render(self.format, prefix, tail).removesuffix(prefix.answer)
        answer = self.encode(prefix.answer)[: prefix.tokens]
        return Rendered(
            ids=self.encode(text + lead) + answer,
            text=text + lead + self.cut(prefix.answer, prefix.tokens),
            header_tail=tail,
            prefix=self._text(self.encode(lead) + answer),
        )

    def split(self, rendered: Rendered, completion: str) -> tuple[str, str]:
        """(thought, answer) as the model wrote them after the prefix."""
        return formats.split(self.format, rendered.header_tail, rendered.prefix, completion)

    def cut(self, answer: str, tokens: int | None) -> str:
        """The text of an answer's first tokens."""
        ids = self.encode(answer)
        return answer if tokens is None or tokens >= len(ids) else self._text(ids[:tokens])

    def encode(self, text: str) -> list[int]:
        """Token ids of exactly this text: the template has written BOS already."""
        if not text:
            return []
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens but for those that delimit a thought."""
        return self._text([i for i in ids if i not in self._dropped])

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    @cached_property
    def _dropped(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        special = set(self.tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
        marks = self.format.marks
        return frozenset(i for i in special if self.tokenizer.convert_ids_to_tokens(i) not in marks)

    def _prompt(self, request: Request) -> tuple[str, str]:
        """Prompt and header tail; a system turn that the template refuses or drops goes before
        the first user turn's text."""
        arguments = self._arguments(request.thinking)
        messages = [{"role": m.role, "content": m.content} for m in request.messages]
        if messages and messages[0]["role"] == "system":
            system = messages[0]["content"]
            try:
                text, tail = self._written(messages, arguments)
            except NotApplicable:
                text, tail = "", ""
            if text and system.strip() in text:
                return text, tail
            messages = messages[1:]
            if not messages or messages[0]["role"] != "user":
                messages.insert(0, {"role": "user", "content": ""})
            content = f"{system}\n\n{messages[0]['content']}".strip()
            messages[0] = {"role": "user", "content": content}
        return self._written(messages, arguments)

    def _arguments(self, thinking: str) -> dict[str, Any]:
        switch = self.format.switch(thinking)
        template = self.tokenizer.get_chat_template()
        known = {k: v for k, v in switch.items() if re.search(rf"\b{k}\b", template)}
        if thinking == "on" and self.format.name == "none" and not known:
            raise NotApplicable(f"{self.name} has no thinking to turn on")
        wanted = {"reasoning_effort", "thinking_budget"} & switch.keys()
        if wanted - known.keys():
            raise NotApplicable(
                f"the chat template of {self.name} has no {wanted.pop()}: thinking {thinking!r} "
                "cannot be asked for"
            )
        return {**known, **self.arguments}

    def _written(
        self, messages: list[dict[str, str]], arguments: Mapping[str, Any]
    ) -> tuple[str, str]:
        def write(header: bool) -> str:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=header, **arguments
            )
            return text

        import jinja2

        try:
            text = write(True)
            shared = os.path.commonprefix([text, write(False)])  # noqa: RUF071 (of text, not paths)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise NotApplicable(
                f"the chat template of {self.name} does not take these messages: {one_line(error)}"
            ) from error
        if any(m["role"] == "user" and m["content"].strip() not in text for m in messages):
            raise NotApplicable(f"the chat template of {self.name} drops the text of a user turn")
        return text, text[len(shared) :]


def read_template(file: str | Path) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LeadlineError(
            f"chat_template {file}: {one_line(error)}: give a jinja text file"
        ) from error


def load_tokenizer(path: str | Path, revision: str | None) -> Any:
    """The tokenizer of a folder or hub id; an adapter's is its base model's where it has none."""
    # Without torch, transformers would otherwise tell the user that models are unavailable.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    home = folder(path)
    if home and not any(home.glob("*token*")) and (base := adapter_base(home)):
        return load_tokenizer(base, None)
    revision = None if home else commit(str(path), revision)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                home or path, revision=revision, trust_remote_code=False
            )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        mend = "give a folder that has one" if home else "set HF_TOKEN if the model is gated"
        raise LeadlineError(f"model {path}: no tokenizer ({one_line(error)}): {mend}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and its remarks on generation settings."""
    from transformers import utils

    logging: Any = utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
