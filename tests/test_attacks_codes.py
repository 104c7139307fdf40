"""Round trips of the encodings, and decoding of answers as models write them."""

from __future__ import annotations

import contextlib
import json
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leadline.attacks import _codes as codes

TEXT = (
    "First, take three sprigs of mint and two of sage. Crush them in a warm bowl until the scent "
    "is strong. Pour hot water over them and wait for ten minutes.\n\n"
    "Then strain the tonic through a clean cloth, add honey, and let it cool on the sill."
)
SENTENCES = st.lists(st.sampled_from([f"{s}." for s in TEXT.split(".") if s]), min_size=1)
BACK = {
    "base64": (codes.base64_text, codes.base64_back),
    "ascii": (codes.ascii_text, codes.ascii_back),
    "caesar": (codes.caesar_text, codes.caesar_back),
    "atbash": (codes.atbash_text, codes.atbash_back),
    "morse": (codes.morse_text, codes.morse_back),
    "json": (lambda text: json.dumps(text.split(" ")), codes.json_list_back),
}


def same(name: str, decoded: str, text: str) -> bool:
    """Whether the texts are equal, up to case and spacing for Morse code."""
    return decoded.split() == text.lower().split() if name == "morse" else decoded == text


# -- round trips -----------------------------------------------------------------------------------


@given(st.text(min_size=8).filter(lambda text: len(text.encode()) >= 8))
def test_base64_round_trip(text):
    assert codes.base64_back(codes.base64_text(text)) == text


@given(
    st.text(st.characters(exclude_categories=["Cc", "Cs"]) | st.sampled_from("\n\t"), min_size=4)
)
def test_character_codes_round_trip_without_control_characters(text):
    assert codes.ascii_back(codes.ascii_text(text)) == text


@given(st.text())
def test_ciphers_change_letters_only(text):
    assert codes.atbash_text(codes.atbash_text(text)) == text
    moved = codes.caesar_text(text)
    assert len(moved) == len(text)
    for old, new in zip(text, moved, strict=True):
        letter = old in string.ascii_letters
        assert (ord(new.lower()) - ord(old.lower())) % 26 == 3 if letter else new == old


@pytest.mark.parametrize("name", ["caesar", "atbash"])
@given(sentences=SENTENCES)
def test_ciphers_round_trip_for_english(name, sentences):
    to, back = BACK[name]
    text = "".join(sentences)
    assert back(to(text)) == text


@given(st.text(string.ascii_letters + string.digits + " .,?'!/()&:;=+-_\"$@\n", min_size=3))
def test_morse_round_trip_up_to_case_and_spaces(text):
    plain = text.lower().split()
    if len("".join(plain)) >= 3:
        assert codes.morse_back(codes.morse_text(text)).split(" ") == plain


def test_morse_keeps_characters_without_a_code():
    assert codes.morse_text("Tea #é") == "- . .- / # é"
    assert codes.morse_back(codes.morse_text("Mint tea for 漢 – é?")) == "mint tea for 漢 - é?"


@given(st.lists(st.text(), min_size=1))
def test_json_strings_round_trip(strings):
    assert codes.json_list_back(json.dumps(strings)) == " ".join(strings)


# -- messy answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACK)
def test_code_fences_are_removed(name):
    to, back = BACK[name]
    for kind in ("", "text", "base64"):
        assert same(name, back(f"```{kind}\n{to(TEXT)}\n```\n").strip(), TEXT)


@pytest.mark.parametrize("name", BACK)
def test_surrounding_prose_is_kept(name):
    to, back = BACK[name]
    before, after = "Certainly! Here is the answer that you asked for:", "I hope this helps you."
    decoded = back(f"{before}\n\n{to(TEXT)}\n\n{after}")
    assert decoded.startswith(before)
    assert decoded.endswith(after)
    assert same(name, decoded.removeprefix(before).removesuffix(after).strip(), TEXT)


@pytest.mark.parametrize("name", BACK)
def test_an_answer_may_be_truncated_anywhere(name):
    to, back = BACK[name]
    coded = to(TEXT)
    for cut in range(len(coded) * 3 // 4, len(coded)):
        decoded = back(coded[:cut])
        if name == "morse":
            assert decoded[:100] == TEXT.lower()[:100]
        else:
            assert decoded[:100] == TEXT[:100]


@pytest.mark.parametrize("name", ["base64", "ascii"])
@pytest.mark.parametrize("width", [24, 64, 76])
def test_lines_may_be_wrapped(name, width):
    to, back = BACK[name]
    coded = to(TEXT)
    if name == "base64":
        wrapped = "\n".join(coded[i : i + width] for i in range(0, len(coded), width))
    else:
        numbers = coded.split()
        rows = (numbers[i : i + width] for i in range(0, len(numbers), width))
        wrapped = ",\n".join(", ".join(row) for row in rows)
    assert back(f"Here:\n{wrapped}\n\nDone.") == f"Here:\n{TEXT}\n\nDone."


def test_base64_may_come_in_parts():
    parts = [codes.base64_text(line) for line in TEXT.splitlines() if line]
    decoded = codes.base64_back("1. {}\n2. `{}`".format(*parts))
    assert decoded == "1. {}\n2. `{}`".format(*(line for line in TEXT.splitlines() if line))


def test_an_error_in_base64_affects_its_own_position_only():
    coded = codes.base64_text(TEXT)
    assert codes.base64_back(coded[:80] + "////" + coded[84:]) == f"{TEXT[:60]}���{TEXT[63:]}"


def test_base64_truncated_inside_a_character():
    coded = codes.base64_text("Brühe den Tee für zwölf Minuten, größer " + "ü" * 30)
    for cut in range(40, len(coded)):
        assert codes.base64_back(coded[:cut]).startswith("Brühe den Tee")


def test_a_short_run_in_prose_counts_as_a_word():
    assert codes.base64_back("TWludCB0ZWE=") == "Mint tea"
    with pytest.raises(ValueError, match="no part of the answer is encoded"):
        codes.base64_back("The label TWludCB0ZWE= is hard to read.")


@pytest.mark.parametrize(
    "coded",
    [
        "-- .. -. -  .- -. -..  ... .- --. .",
        "-- .. -. -\n.- -. -..\n... .- --. .",
        "-- .. -. - | .- -. -.. | ... .- --. .",
        "−− ·· −· − / ·− −· −·· / ··· ·− −−· ·",
        "– – .. -. - / .- -. -.. / ... .- --. .".replace("– –", "––"),
    ],
)
def test_variants_of_morse_notation(coded):
    assert codes.morse_back(coded) == "mint and sage"


def test_an_invalid_morse_code_is_marked():
    assert codes.morse_back("-- .. -. - / ....... / - . .-") == "mint � tea"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ('["Crush the mint", "and wait', "Crush the mint and wait"),
        ('["say \\"hello\\"", "a\\nb", "cut \\', 'say "hello" a\nb cut '),
        ('["a b"]\n["c d"]', "a b\nc d"),
        ('{"answer": ["a", 1, null, "b"]}', '{"answer": a b}'),
        ('["a", "b",]', "a b"),
        ('["line\nbreak"]', "line\nbreak"),
    ],
)
def test_json_as_models_write_it(answer, text):
    assert codes.json_list_back(answer) == text


@pytest.mark.parametrize("name", BACK)
@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Sure",
        "Understood.",
        "I'm sorry, but I can't help with that.",
        TEXT,
        "No.\n\n**Spring**\n- Sow.\n- Wait - then sow again ... - - -\n\n---\n",
        "It was 65, 70, 72, 75 and 80 degrees.",
        "Bake at 180, 190, 200 or 210 degrees for 10 20 30 minutes.",
        "self-harm/violence/medication/treatment misunderstandings uncharacteristically",
        "Lies die [1] und [2]: größere Töpfe, längere Wartezeit, weniger Wasser.",
        "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    ],
)
def test_a_plain_answer_is_not_decoded(name, answer):
    with pytest.raises(ValueError, match=r".+"):
        BACK[name][1](answer)


@pytest.mark.parametrize("name", BACK)
def test_no_answer_takes_long(name):
    n = 100_000
    hard = [
        *("a" * n, "1" * n, '"' * n, "[ " * (n // 2), "- / " * (n // 4), "``` " * (n // 4)),
        *(
            "1 2 3 x " * (n // 8),
            ". . . . .x " * (n // 10),
            '["a",' * (n // 5),
            '["a ["a ' * (n // 8),
        ),
        *("- " + " " * n + "x", "AAAAAAAA" + " " * n + "x", "1" + " " * n + "x", "[" + " " * n),
        *('["' + "\\" * n, "A" * 16 + "\n" + "A\n" * (n // 2) + "!"),
    ]
    for answer in hard:
        start = time.perf_counter()
        with contextlib.suppress(ValueError):
            BACK[name][1](answer)
        assert time.perf_counter() - start < 2, answer[:20]
