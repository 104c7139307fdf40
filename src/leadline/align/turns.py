"""Tokenize an assistant's turn, with boundaries that are derived from the chat template alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..models.template import Template
from ..records import Message, Request, ResponsePrefix, Sampling

_PROBE = "Leadline"  # a sample answer, to locate in the template's output


@dataclass(frozen=True)
class TurnFormat:
    """The text that a chat template writes around an answer.

    `lead` is between the generation prompt and the answer (often empty; an empty thought for some
    reasoning models), `space` is the whitespace that belongs to the answer's first token, and `end`
    closes the turn.
    """

    template: Template
    lead: str
    space: str
    end: str

    @staticmethod
    def of(template: Template) -> TurnFormat:
        """Determined by rendering one sample answer. Raises what `Template.render` raises."""
        request = Request((Message("user", "?"),), None, Sampling())
        prompt = template.render(request).text
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        rendered: str = template.tokenizer.apply_chat_template(
            chat, tokenize=False, **template.arguments
        )
        before, _, end = rendered.rpartition(_PROBE)
        if not end.strip():  # some templates end a turn only when the next begins
            end += template.tokenizer.eos_token or ""
        if not before.startswith(prompt):  # the prompt opens a thought, which must be closed first
            prefilled = Request(request.messages, ResponsePrefix(_PROBE), Sampling())
            before = template.render(prefilled).text.removesuffix(_PROBE)
        lead = before.removeprefix(prompt)
        stripped = lead.rstrip(" ")  # a space before a word belongs to the word's token
        return TurnFormat(template, stripped, lead.removeprefix(stripped), end)

    def tokenize(
        self, messages: Sequence[Message], start: str, answer: str
    ) -> tuple[list[int], list[int], list[int]]:
        """Token ids of the context before the answer, of the answer start `start`, and of `answer`
        with the end of its turn; the latter two as if each followed the context directly.

        They are to be joined as ids: then k tokens of `start` are k tokens whatever follows them.
        """
        encode = self.template.encode
        prompt = self.template.render(Request(tuple(messages), None, Sampling())).text + self.lead
        context = encode(prompt)

        def encode_after_context(text: str) -> list[int]:
            """Encoded with its context, since some tokenizers mark the beginning of a text. Where
            the tokenizer would merge text and context, the text is encoded alone."""
            ids = encode(prompt + text)
            return ids[len(context) :] if ids[: len(context)] == context else encode(text)

        start_ids = encode_after_context(self.space + start) if start else []
        return context, start_ids, encode_after_context(self.space + answer + self.end)
