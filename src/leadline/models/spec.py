"""The study-file entries for a model (`ModelSpec`) and for request limits (`Limits`)."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .. import organism
from ..records import LeadlineError
from ..secret import keep_secret, without_secrets
from . import cards, reasoning

MODES = ("default", "on", "off", *reasoning.EFFORTS)


class Strict(BaseModel):
    """A pydantic model that rejects unknown fields."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def wrong(message: str, *inside: str | int) -> PydanticCustomError:
    """A validation error; `inside` is the path to the invalid part below the validated field."""
    return PydanticCustomError("leadline", "{message}", {"message": message, "inside": inside})


class ModelSpec(Strict):
    """A model and its interface: an endpoint (`url`), a folder, a hub id or an organism."""

    model: str = Field(min_length=1)
    name: str = ""
    url: str | None = None
    interface: Literal["chat", "completions"] = "chat"
    prefix: Literal["auto", "continue_final_message", "prefix_flag", "final_message", "none"] = (
        "auto"
    )
    reasoning: str | None = None
    card: str | dict[str, Any] | None = None
    thinking: list[str] = Field(default=["default"], min_length=1)
    tokenizer: str | None = None
    chat_template: str | None = None
    revision: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    extra_body: dict[str, Any] = Field(default_factory=dict)
    concurrency: int | None = Field(default=None, ge=1)
    dtype: str | None = None
    device: str | None = None
    batch_size: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        without_secrets(value)  # an error message may show a value
        return {"model": value} if isinstance(value, str) else value

    @field_validator("thinking", mode="before")
    @classmethod
    def _thinking(cls, value: Any) -> Any:
        """Modes, efforts, or budgets in tokens. YAML parses an unquoted `on` as true."""
        modes = []
        for mode in value if isinstance(value, list) else [value]:
            name = {True: "on", False: "off"}[mode] if isinstance(mode, bool) else str(mode)
            if name not in MODES and not name.isdigit():
                valid = f"{', '.join(MODES)}, or a budget in tokens"
                raise wrong(f"thinking should be {valid}, not {name!r}")
            modes.append(name)
        return modes

    @field_validator("url")
    @classmethod
    def _url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise wrong(f"{url!r} is not an HTTP URL: write it like http://localhost:8000/v1")
        return url.rstrip("/") if url else url

    @field_validator("reasoning")
    @classmethod
    def _format(cls, name: str | None) -> str | None:
        try:
            return reasoning.get(name).name if name else None
        except LeadlineError as error:
            raise wrong(str(error)) from None

    @field_validator("card", mode="before")
    @classmethod
    def _card_form(cls, value: Any) -> Any:
        if value is None or isinstance(value, str | dict):
            return value
        raise wrong("card: should be the id of a card (leadline list models), or {field: value}")

    @model_validator(mode="after")
    def _card(self) -> ModelSpec:
        try:
            _ = self.card is None or self.described
        except cards.CardError as error:
            raise wrong(str(error), "card", error.field) from None
        return self

    @model_validator(mode="after")
    def _organism(self) -> ModelSpec:
        if self.model.startswith("organism:") and not self.url:
            try:
                organism.path(self.model)
            except LeadlineError as error:
                raise wrong(str(error), "model") from None
        return self

    @model_validator(mode="after")
    def _key(self) -> ModelSpec:
        keep_secret(os.environ.get(self.api_key_env))
        return self

    @property
    def label(self) -> str:
        """The name of the model in results: `name`, or `model` if that is empty."""
        return self.name or self.model

    @property
    def described(self) -> cards.Card | None:
        """The model's card, as replaced or changed by `card`; None if there is none."""
        return cards.resolve_card(self.model, self.card)


class Limits(Strict):
    """Limits of the requests to an endpoint: requests in flight, the timeout of one request in
    seconds, retries of a failed one, the largest reply in MiB (after decompression), and the
    longest wait for a Retry-After header in seconds."""

    concurrency: int = Field(default=64, ge=1)
    timeout: float = Field(default=300, gt=0)
    retries: int = Field(default=6, ge=0)
    max_reply_mib: float = Field(default=8, gt=0, le=1024)
    max_retry_after: float = Field(default=60, ge=0, le=86_400)

    @property
    def max_reply_bytes(self) -> int:
        """The largest reply in bytes."""
        return int(self.max_reply_mib * 2**20)
