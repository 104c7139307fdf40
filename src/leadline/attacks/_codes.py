"""Encoders for requests (`*_text`) and decoders for answers (`*_back`).

A decoder takes an answer as models write it: with wrapped lines, in code blocks, truncated, or
mixed with prose. It replaces the encoded parts by plain text and keeps the rest. It raises
ValueError if no part is encoded.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from string import ascii_lowercase as LOWER
from string import ascii_uppercase as UPPER


def _replaced(pattern: re.Pattern[str], answer: str, decode: Callable[[str, bool], str]) -> str:
    """The answer with every match of the pattern replaced by `decode(match, alone)`.

    `alone` is true if the match is the whole answer. A match stays as it is where `decode` returns
    ''. Raises ValueError if no match was decoded."""
    answer = _without_fences(answer)
    whole_length, decoded = len(answer.strip()), 0

    def plain(part: re.Match[str]) -> str:
        nonlocal decoded
        text = decode(part[0], len(part[0]) == whole_length)
        decoded += bool(text)
        return text or part[0]

    answer = pattern.sub(plain, answer)
    if not decoded:
        raise ValueError("no part of the answer is encoded")
    return answer


def _without_fences(answer: str) -> str:
    """The answer without the lines that open and close Markdown code blocks."""
    return re.sub(r"^[ \t]*```[\w-]*[ \t]*(?:\n|\Z)", "", answer, flags=re.MULTILINE)


# -- Base64 --------------------------------------------------------------------------------------

# Encoders wrap lines, so a following line with nothing but Base64 belongs to the same run.
_BASE64 = re.compile(
    r"(?<![\w+/])[A-Za-z0-9+/]{8,}+(?:[ \t]*\n[ \t]*[A-Za-z0-9+/]++(?=[ \t=]*(?:\n|\Z)))*+={0,2}"
)


def base64_text(text: str) -> str:
    """The UTF-8 text in Base64."""
    return base64.b64encode(text.encode()).decode()


def base64_back(answer: str) -> str:
    """The answer with its Base64 decoded. Raises ValueError if there is none."""
    return _replaced(_BASE64, answer, _from_base64)


def _from_base64(run: str, alone: bool) -> str:
    """The decoded text, or '' if the run is probably an English word. Invalid bytes become �,
    since models make mistakes in Base64."""
    digits = "".join(run.split()).rstrip("=")
    if len(digits) < 16 and not alone:
        return ""
    digits = digits[: len(digits) - (len(digits) % 4 == 1)]  # the answer may be truncated
    data = base64.b64decode(digits + "=" * (-len(digits) % 4))
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        # accept a truncated last character, or an error after a valid beginning
        valid_bytes = min(max(len(data) - 3, 5), 12)
        return data.decode(errors="replace") if error.start >= valid_bytes else ""


# -- substitution ciphers --------------------------------------------------------------------------

_CAESAR = str.maketrans(LOWER + UPPER, LOWER[3:] + LOWER[:3] + UPPER[3:] + UPPER[:3])
_CAESAR_BACK = {after: before for before, after in _CAESAR.items()}
_ATBASH = str.maketrans(LOWER + UPPER, LOWER[::-1] + UPPER[::-1])
# Weights by letter frequency in English: of two readings, the one with the higher sum is English.
_WEIGHT = {letter: 26 - i for i, letter in enumerate("etaoinshrdlcumwfgypbvkjxqz")}


def caesar_text(text: str) -> str:
    """Every letter shifted by three places; all other characters unchanged."""
    return text.translate(_CAESAR)


def atbash_text(text: str) -> str:
    """Every letter replaced by its mirror in the alphabet; others unchanged. Its own inverse."""
    return text.translate(_ATBASH)


def caesar_back(answer: str) -> str:
    """The answer with its lines in the Caesar cipher decoded. Raises ValueError if it has none."""
    return _by_line(answer, lambda line: line.translate(_CAESAR_BACK))


def atbash_back(answer: str) -> str:
    """The answer with its lines in the Atbash cipher decoded. Raises ValueError if it has none."""
    return _by_line(answer, atbash_text)


def _by_line(answer: str, decode: Callable[[str], str]) -> str:
    """Each line decoded or unchanged, whichever is more like English by its letters.

    The sum over all lines, limited to about the weight of two words, is added to the difference of
    each line, so that it decides short lines."""
    lines = _without_fences(answer).split("\n")
    readings = [decode(line) for line in lines]
    gains = [_likeness(new) - _likeness(old) for new, old in zip(readings, lines, strict=True)]
    bias = max(-60, min(60, sum(gains)))
    chosen = [gain + bias > 0 for gain in gains]
    if not any(gain > 0 and new for gain, new in zip(gains, chosen, strict=True)):
        raise ValueError("no line of the answer is in the cipher")
    pairs = zip(lines, readings, chosen, strict=True)
    return "\n".join(reading if new else line for line, reading, new in pairs)


def _likeness(text: str) -> int:
    """How much a text looks like English, as the sum of the weights of its letters."""
    return sum(_WEIGHT.get(letter, 0) for letter in text.lower())


# -- numbers and Morse -----------------------------------------------------------------------------

_NUMBERS = re.compile(r"\[?(?<!\d)\d++(?:[\s,;]++\d++){3,}+\]?")


def ascii_text(text: str) -> str:
    """The code point of every character, in decimal: `72 105`."""
    return " ".join(str(ord(character)) for character in text)


def ascii_back(answer: str) -> str:
    """The answer with its rows of numbers decoded. Raises ValueError if there are none."""
    return _replaced(_NUMBERS, answer, _from_numbers)


def _from_numbers(row: str, alone: bool) -> str:
    """The characters of a row of numbers, without control characters; '' if the row is probably a
    list of plain numbers in prose."""
    numbers = re.findall(r"\d+", row)
    text = "".join(map(_character, numbers))
    likely = (alone or len(numbers) >= 8) and len(text) * 4 >= len(numbers) * 3
    return text if likely else ""


def _character(number: str) -> str:
    code = int(number) if len(number) < 8 else 0
    valid = 32 <= code < 0xD800 or 0xE000 <= code < 0x110000 or code in (9, 10, 13)
    return chr(code) if valid else ""


_MORSE = {
    "a": ".-", "b": "-...", "c": "-.-.", "d": "-..", "e": ".", "f": "..-.", "g": "--.",
    "h": "....", "i": "..", "j": ".---", "k": "-.-", "l": ".-..", "m": "--", "n": "-.",
    "o": "---", "p": ".--.", "q": "--.-", "r": ".-.", "s": "...", "t": "-", "u": "..-",
    "v": "...-", "w": ".--", "x": "-..-", "y": "-.--", "z": "--..", "0": "-----",
    "1": ".----", "2": "..---", "3": "...--", "4": "....-", "5": ".....", "6": "-....",
    "7": "--...", "8": "---..", "9": "----.", ".": ".-.-.-", ",": "--..--", "?": "..--..",
    "'": ".----.", "!": "-.-.--", "/": "-..-.", "(": "-.--.", ")": "-.--.-", "&": ".-...",
    ":": "---...", ";": "-.-.-.", "=": "-...-", "+": ".-.-.", "-": "-....-", "_": "..--.-",
    '"': ".-..-.", "$": "...-..-", "@": ".--.-.",
}  # fmt: skip
_MORSE_BACK = {code: letter for letter, code in _MORSE.items()}
# A row of Morse codes; single characters without a code may occur between them.
_MORSE_ROW = re.compile(r"(?<!\S)(?:[.-]{1,7}|\S)(?!\S)(?:\s++(?:[.-]{1,7}|\S)(?!\S))*+")
_MORSE_VARIANTS = str.maketrans("·•∙−–—‐", "...----")


def morse_text(text: str) -> str:
    """The text in Morse code, with a space between letters and ` / ` between words. Case is lost;
    characters that have no code stay unchanged."""
    words = text.lower().translate(_MORSE_VARIANTS).split()
    return " / ".join(" ".join(_MORSE.get(letter, letter) for letter in word) for word in words)


def morse_back(answer: str) -> str:
    """The answer with its rows of Morse code as lower-case text; an invalid code becomes �.

    Raises ValueError if there are none."""
    return _replaced(_MORSE_ROW, answer.translate(_MORSE_VARIANTS), _from_morse)


def _from_morse(row: str, alone: bool) -> str:
    """The text of a row, or '' if it has too few codes to be Morse. One space separates letters;
    several spaces, a slash or a line break separate words."""
    if len(re.findall(r"[.-]+", row)) < (3 if alone else 6):  # a dash in prose, an ellipsis
        return ""
    text = ""
    for gap, code in re.findall(r"([\s/|]*)([^\s/|]+)", row):
        text += " " if text and gap != " " else ""
        other = code if code.strip(".-") else "\N{REPLACEMENT CHARACTER}"
        text += _MORSE_BACK.get(code, other)
    return text


# -- JSON ------------------------------------------------------------------------------------------

_JSON_LIST = re.compile(r'\[\s*"')
_JSON_STRING = re.compile(r'"((?:\\.|[^"\\])*+)\\?(?:"|\Z)', re.DOTALL)


def json_list_back(answer: str) -> str:
    """The answer with each JSON list of strings replaced by its strings, joined by spaces.

    The last list may be truncated. Raises ValueError if there is no list."""
    answer = _without_fences(answer)
    parts: list[str] = []
    at = 0
    while match := _JSON_LIST.search(answer, at):
        parts.append(answer[at : match.start()])
        try:
            items, at = json.JSONDecoder(strict=False).raw_decode(answer, match.start())
        except (ValueError, RecursionError):
            rest = answer[match.start() :]
            items, at = [_unescaped(string) for string in _JSON_STRING.findall(rest)], len(answer)
        parts.append(" ".join(item for item in items if isinstance(item, str)))
    if not parts:
        raise ValueError("no JSON list in the answer")
    return "".join([*parts, answer[at:]])


def _unescaped(string: str) -> str:
    try:
        return str(json.loads(f'"{string}"', strict=False))
    except ValueError:
        return string
