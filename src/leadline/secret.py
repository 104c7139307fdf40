"""Keep API keys, passwords, prompts and answers out of what is stored, logged and printed.

Secrets are found in the configuration of models (and in the environment variables that it names)
when it is read. `scrub` then removes them from any text, whatever wrote it: a server that echoes a
request header, an exception, a plug-in.
"""

from __future__ import annotations

import json
import re
import traceback
from base64 import b64encode
from typing import Any
from urllib.parse import quote, unquote

_SECRETS: list[str] = []  # of the process, longest first: any of them could reach any output
_SHORTEST = 8  # characters; a shorter one, such as "EMPTY", would be cut out of ordinary words
_HIDDEN = "***"

# Names of settings whose value is a secret, in snake case. Tokens of a vocabulary are none.
_SECRET_NAME = re.compile(
    r"(^|_)(api_?key|key|token|secret|password|passwd|pwd|authorization|auth|bearer|cookie|"
    r"credentials?)$"
)
_VOCABULARY = re.compile(r"(^|_)(bos|eos|pad|unk|sep|cls|mask|stop|start|end|special)_token$")
_USER = re.compile(r"(?<=://)[^/\s@?#]+(?=@)")  # user:password in a URL
_PARAMETER = re.compile(r"(?<=[?&])([\w.-]+)=([^&#\s]+)")  # a parameter in a URL's query


def keep_secret(secret: str | None, shortest: int = _SHORTEST) -> None:
    """Let `scrub` remove this text, and its forms in JSON, URLs, Python literals and HTTP's basic
    authentication. A text of less than `shortest` characters is ignored."""
    if not secret or len(secret := secret.strip()) < shortest:
        return
    forms = {
        secret, quote(secret, safe=""), unquote(secret), json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1],
        b64encode(secret.encode()).decode(),
    }  # fmt: skip
    _SECRETS[:] = sorted({*_SECRETS, *forms}, key=lambda form: (-len(form), form))


def scrub(text: str) -> str:
    """The text with every configured secret replaced by ***."""
    if text:
        for secret in _SECRETS:
            if secret in text:
                text = text.replace(secret, _HIDDEN)
    return text


def without_secrets(config: Any, name: str = "") -> Any:
    """A copy of a model's configuration (nested dicts and lists) with *** in place of its secrets,
    which `scrub` removes from then on: values with names such as `api_key` or `Authorization`, and
    user, password and keys in URLs. `name` is the name of the value itself."""
    if isinstance(config, dict):
        return {k: without_secrets(v, str(k)) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [without_secrets(v, name) for v in config]
    if isinstance(config, bool | None) or config == "":
        return config
    if _is_secret(name):
        keep_secret(str(config))
        keep_secret(str(config).removeprefix("Bearer "))
        return _HIDDEN
    return _clean_url(config) if isinstance(config, str) and "://" in config else config


def _is_secret(name: str) -> bool:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-. ]", "_", name).lower()
    return bool(_SECRET_NAME.search(snake)) and not _VOCABULARY.search(snake)


def _clean_url(url: str) -> str:
    def user(match: re.Match[str]) -> str:
        login = match[0]
        if login != _HIDDEN:
            keep_secret(f"://{login}@", shortest=5)
            for form in (login, unquote(login)):
                keep_secret(form)
                keep_secret(form.partition(":")[2])
                keep_secret(b64encode(form.encode()).decode())  # as the header has it
        return _HIDDEN

    def parameter(match: re.Match[str]) -> str:
        if not _is_secret(match[1]):
            return match[0]
        keep_secret(match[2])
        return f"{match[1]}={_HIDDEN}"

    return _PARAMETER.sub(parameter, _USER.sub(user, url))


_LONGEST = 2000  # characters of an error message
_RUN = 16  # characters of a prompt or an answer that are recognised in an error message


def hide(message: str, *texts: str) -> str:
    """An error message, of at most 2,000 characters, without what it repeats of prompts and answers
    (`texts`): runs of 16 and more characters that occur in one, and whole texts from 8."""
    message = message if len(message) <= _LONGEST else message[:_LONGEST] + "…"
    flat = [" ".join(text.split()) for text in texts if text]
    hidden = [False] * len(message)
    for size in {_RUN, *(len(text) for text in flat if _SHORTEST <= len(text) < _RUN)}:
        whole = [text for text in flat if len(text) >= _RUN or len(text) == size]
        for start in range(len(message) - size + 1):
            part = message[start : start + size]
            if any(part in text for text in whole if size == _RUN or part == text):
                hidden[start : start + size] = [True] * size
    shown, start = [], 0
    while start < len(message):
        end = start
        while end < len(message) and hidden[end] == hidden[start]:
            end += 1
        part = message[start:end]
        shown.append(f"[{len(part)} characters of prompt or answer]" if hidden[start] else part)
        start = end
    return "".join(shown)


def where_raised(error: BaseException) -> str:
    """An exception's type and the line that raised it, since its message may quote a prompt. The
    message of an error about a file, or of one in the calling line itself."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if isinstance(error, OSError) or len(frames) == 1:
        message = " ".join(scrub(str(error)).split())[:200]
        return f"{type(error).__name__}: {message}" if message else type(error).__name__
    frame, line = frames[-1]
    return f"{type(error).__name__} at {frame.f_code.co_filename.rpartition('/')[2]}:{line}"


def trace(error: BaseException) -> str:
    """An exception's type and the lines that raised it, without its message, which may repeat a
    prompt or an answer."""
    return "".join(traceback.format_tb(error.__traceback__)) + type(error).__name__
