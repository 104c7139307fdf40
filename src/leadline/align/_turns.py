"""An assistant's turn in token ids, with boundaries that come from the chat template alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..models.template import Template
from ..records import Message, Request, ResponsePrefix, Sampling

_PROBE = "Leadline"  # an answer to find again in what a template writes


@dataclass(frozen=True)
class Turns:
    """What a template writes around an answer: `lead` stands between the generation prompt and
    the answer (often nothing; an empty thought in some reasoning models), `space` begins the
    answer itself, and `end` closes its turn."""

    template: Template
    lead: str
    space: str
    end: str

    @staticmethod
    def of(template: Template) -> Turns:
        """Found by rendering one answer. Raises what `Template.render` raises."""
        asked = Request((Message("user", "?"),), None, Sampling())
        prompt = template.render(asked).text
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        whole: str = template.tokenizer.apply_chat_template(
            chat, tokenize=False, **template.arguments
        )
        before, _, end = whole.rpartition(_PROBE)
        if not end.strip():  # some templates end a turn only when the next begins
            end += template.tokenizer.eos_token or ""
        if not before.startswith(prompt):  # its prompt opens a thought, which must be closed first
            forged = Request(asked.messages, ResponsePrefix(_PROBE), Sampling())
            before = template.render(forged).text.removesuffix(_PROBE)
        lead = before.removeprefix(prompt)
        bare = lead.rstrip(" ")  # a space before a word belongs to the word's token
        return Turns(template, bare, lead.removeprefix(bare), end)

    def split(
        self, messages: Sequence[Message], start: str, answer: str
    ) -> tuple[list[int], list[int], list[int]]:
        """Ids of what stands before an answer, of the start of an answer there, and of a whole
        answer there with the end of its turn: to be joined as ids, so that k tokens of the start
        are k tokens whatever follows them."""
        encode = self.template.encode
        prompt = self.template.render(Request(tuple(messages), None, Sampling())).text + self.lead
        before = encode(prompt)

        def there(text: str) -> list[int]:
            """Tokens may differ from those of the text alone: some tokenizers begin with a mark.
            Where it would merge with what stands before, it is still tokenized alone."""
            ids = encode(prompt + text)
            return ids[len(before) :] if ids[: len(before)] == before else encode(text)

        begun = there(self.space + start) if start else []
        return before, begun, there(self.space + answer + self.end)
