"""Rendering of messages and a response prefix with a model's chat template, and parsing of the
completion.

Used wherever a prompt is sent instead of chat messages: local weights and `/v1/completions`.
Requires transformers for the tokenizer, but not torch.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..records import LeadlineError, NotApplicable, Request, ResponsePrefix
from ..text import one_line
from . import reasoning as formats
from .checkpoint import adapter_base, check_local, commit, is_gguf, local_path

LOADING = threading.RLock()
"""Held while transformers is imported or loads something. It puts another module in its place while
it is imported, so a second thread that imports it gets a module without its classes."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered prompt: its token ids, the same as text, what the template adds after the last
    message (`header_tail`), and the response prefix as the model receives it.

    The ids are what to send: tokenizing the text again can give others.
    """

    ids: list[int]
    text: str
    header_tail: str
    prefix: str


@dataclass(frozen=True)
class Template:
    """A tokenizer with its chat template and reasoning format. `arguments` are extra keyword
    arguments of the chat template."""

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
        """Load the tokenizer of a folder, GGUF file or hub id.

        `chat_template` is a jinja file that replaces the tokenizer's own. `reasoning` names the
        reasoning format; without it, the format is detected from the template. Raises LeadlineError
        if there is no tokenizer or no chat template.
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
        """Wrap a tokenizer that is already loaded; `name` is the model's name in error messages.

        Raises LeadlineError for a tokenizer without a usable chat template.
        """
        if not tokenizer.chat_template:
            raise LeadlineError(
                f"model {name}: its tokenizer has no chat template: add a chat_template.jinja file "
                "to the model's folder (in a study, set the target's `chat_template:` to the "
                "file), or use an instruct model"
            )
        extra = dict(arguments or {})
        template = Template(tokenizer, formats.get(reasoning or "none"), name, extra)
        try:
            _, tail = template._apply([{"role": "user", "content": "?"}], extra)
        except NotApplicable as error:
            raise LeadlineError(f"{error}: fix the template, or use another one") from error
        detected = formats.detect(tokenizer.get_chat_template(), tail)
        return replace(template, format=formats.get(reasoning or detected))

    def render(self, request: Request) -> Rendered:
        """Render the prompt of a request, including its response prefix.

        The prefix's answer is tokenized on its own and truncated to its `tokens`; the text before
        it is tokenized as a whole, as in training. With thinking "off", an empty thought is added
        where the template adds none. Raises NotApplicable for messages that the template rejects,
        and for thinking "on" where the model has no thinking.
        """
        prefix = request.prefix or ResponsePrefix()
        has_thought = bool(prefix.thought) or prefix.thought_open
        if request.thinking == "off" and not has_thought:
            prefix = replace(prefix, thought="")
        text, tail = self._prompt(request)
        if has_thought:
            open_tail = formats.reopened(self.format, tail)
            text, tail = text[: len(text) - len(tail)] + open_tail, open_tail
        lead = formats.render(self.format, prefix, tail).removesuffix(prefix.answer)
        answer = self.encode(prefix.answer)[: prefix.tokens]
        return Rendered(
            ids=self.encode(text + lead) + answer,
            text=text + lead + self.cut(prefix.answer, prefix.tokens),
            header_tail=tail,
            prefix=self._text(self.encode(lead) + answer),
        )

    def split(self, rendered: Rendered, completion: str) -> tuple[str, str]:
        """(thought, answer) of a completion, without the prefix."""
        return formats.split(self.format, rendered.header_tail, rendered.prefix, completion)

    def cut(self, answer: str, tokens: int | None) -> str:
        """The text of the first `tokens` tokens of an answer; the whole answer for None."""
        ids = self.encode(answer)
        return answer if tokens is None or tokens >= len(ids) else self._text(ids[:tokens])

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without special tokens: the template adds BOS itself."""
        if not text:
            return []
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids. Special tokens are removed, except the delimiters of a thought."""
        return self._text([i for i in ids if i not in self._removed_ids])

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    @cached_property
    def _removed_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        special = set(self.tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
        marks = self.format.marks
        return frozenset(i for i in special if self.tokenizer.convert_ids_to_tokens(i) not in marks)

    def _prompt(self, request: Request) -> tuple[str, str]:
        """Prompt and header tail. A system message that the template rejects or drops is put before
        the text of the first user message."""
        arguments = self._arguments(request.thinking)
        messages = [{"role": m.role, "content": m.content} for m in request.messages]
        if messages and messages[0]["role"] == "system":
            system = messages[0]["content"]
            try:
                text, tail = self._apply(messages, arguments)
            except NotApplicable:
                text, tail = "", ""
            if text and system.strip() in text:
                return text, tail
            messages = messages[1:]
            if not messages or messages[0]["role"] != "user":
                messages.insert(0, {"role": "user", "content": ""})
            content = f"{system}\n\n{messages[0]['content']}".strip()
            messages[0] = {"role": "user", "content": content}
        return self._apply(messages, arguments)

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
                "is not supported"
            )
        return {**known, **self.arguments}

    def _apply(
        self, messages: list[dict[str, str]], arguments: Mapping[str, Any]
    ) -> tuple[str, str]:
        """The text of the messages, and the part of it that is the generation prompt."""

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
                f"the chat template of {self.name} rejects these messages: {one_line(error)}"
            ) from error
        if any(m["role"] == "user" and m["content"].strip() not in text for m in messages):
            raise NotApplicable(
                f"the chat template of {self.name} drops the text of a user message"
            )
        return text, text[len(shared) :]


def read_template(file: str | Path) -> str:
    """The text of a chat template file. Raises LeadlineError if it cannot be read."""
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LeadlineError(
            f"chat_template {file}: {one_line(error)}: use a jinja text file"
        ) from error


def load_tokenizer(path: str | Path, revision: str | None) -> Any:
    """The tokenizer of a folder, GGUF file or hub id. An adapter without one uses its base model's.

    Raises LeadlineError if there is no tokenizer.
    """
    # Without torch, transformers warns that models are unavailable.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    local = local_path(path)
    if local and is_gguf(local):
        check_local(local)
    elif local and not any(local.glob("*token*")) and (base := adapter_base(local)):
        return load_tokenizer(base, None)
    revision = None if local else commit(str(path), revision)
    with LOADING:
        from transformers import AutoTokenizer
    try:
        with LOADING, quiet():
            return AutoTokenizer.from_pretrained(
                **source(local or path), revision=revision, trust_remote_code=False
            )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        fix = "use a folder that has one" if local else "set HF_TOKEN if the model is gated"
        raise LeadlineError(f"model {path}: no tokenizer ({one_line(error)}): {fix}") from error


def source(path: str | Path) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a folder, hub id or GGUF file."""
    if not is_gguf(path):
        return {"pretrained_model_name_or_path": path}
    file = Path(path)
    return {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off the progress bars and warnings of transformers inside the block."""
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
