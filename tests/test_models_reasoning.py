"""Reasoning formats: rendering response prefixes, and splitting completions."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leadline.models import reasoning
from leadline.records import LeadlineError, ResponsePrefix

FORMATS = sorted(reasoning.FORMATS)
THINKING = [name for name in FORMATS if name != "none"]
DELIMITERS = [
    *("<think>", "</think>", "[THINK]", "[/THINK]", "<seed:think>", "</seed:think>"),
    *("<|channel|>", "<|message|>", "<|start|>", "<|end|>"),
]
HARMONY_FINAL = "<|channel|>final<|message|>"
# Generation headers of real templates: without a thought, with an open one, with an empty one.
HEADERS = {
    "none": ["<|im_start|>assistant\n"],
    "think": ["<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"],
    "think_open": ["", "<｜Assistant｜><think>\n", "<｜Assistant｜><think>"],
    "seed": ["<seed:bos>assistant\n"],
    "harmony": ["<|start|>assistant"],
    "mistral": ["[/INST]"],
}
PLACES = [(name, header) for name in THINKING for header in HEADERS[name]]

# Text without delimiters, and without white space at either end.
words = st.text(st.characters(exclude_characters="<>[]|", exclude_categories=["C"])).map(str.strip)
nonempty_words = words.filter(bool)
# Delimiters of every format, whole and broken, mixed with words and white space.
scraps = st.text(" \na<").flatmap(
    lambda plain: st.lists(
        st.sampled_from([*DELIMITERS, "final", "analysis", plain]), max_size=8
    ).map("".join)
)


@pytest.mark.parametrize(
    ("name", "prefix", "header", "text"),
    [
        ("think", ResponsePrefix("A", "T"), "assistant\n", "<think>\nT\n</think>\n\nA"),
        ("think", ResponsePrefix("A"), "assistant\n", "<think>\n\n</think>\n\nA"),
        ("think", ResponsePrefix("", "T", thought_open=True), "assistant\n", "<think>\nT"),
        ("think", ResponsePrefix("", thought_open=True), "assistant\n", "<think>\n"),
        ("think", ResponsePrefix("", ""), "assistant\n", "<think>\n\n</think>\n\n"),
        ("think", ResponsePrefix("A"), "assistant\n<think>\n\n</think>\n\n", "A"),
        ("think", ResponsePrefix("A"), "<｜Assistant｜></think>", "A"),
        ("think_open", ResponsePrefix("A", "T"), "<think>\n", "T\n</think>\n\nA"),
        ("think_open", ResponsePrefix("A"), "<think>\n", "\n</think>\n\nA"),
        ("think_open", ResponsePrefix("A"), "", "\n</think>\n\nA"),
        ("think_open", ResponsePrefix("A"), "assistant\n", "<think>\n\n</think>\n\nA"),
        ("seed", ResponsePrefix("A", "T"), "", "<seed:think>T</seed:think>A"),
        ("mistral", ResponsePrefix("A", "T"), "", "[THINK]T[/THINK]A"),
        ("harmony", ResponsePrefix("A"), "<|start|>assistant", HARMONY_FINAL + "A"),
        (
            "harmony",
            ResponsePrefix("A", "T"),
            "<|start|>assistant",
            "<|channel|>analysis<|message|>T<|end|><|start|>assistant" + HARMONY_FINAL + "A",
        ),
        ("none", ResponsePrefix("A"), "", "A"),
        ("none", ResponsePrefix("A", "T"), "", "T\n\nA"),
        ("none", ResponsePrefix("A", ""), "", "A"),
        ("none", ResponsePrefix("", "T", thought_open=True), "", "T"),
    ],
)
def test_a_prefix_is_written_as_the_model_would_write_it(
    name: str, prefix: ResponsePrefix, header: str, text: str
) -> None:
    assert reasoning.render(reasoning.get(name), prefix, header) == text


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_prefix_writes_nothing(name: str) -> None:
    assert reasoning.render(reasoning.get(name), ResponsePrefix()) == ""


def test_an_open_thought_with_an_answer_is_an_error() -> None:
    with pytest.raises(LeadlineError, match="thought_open"):
        reasoning.render(reasoning.get("think"), ResponsePrefix("A", "T", thought_open=True))


@pytest.mark.parametrize(("name", "header"), PLACES)
@given(thought=nonempty_words, answer=words)
def test_a_completion_without_a_prefix_is_split(
    name: str, header: str, thought: str, answer: str
) -> None:
    format = reasoning.get(name)
    written = reasoning.render(format, ResponsePrefix(answer, thought), header)
    assert reasoning.split(format, header, "", written) == (thought, answer)


@pytest.mark.parametrize(("name", "header"), PLACES)
@given(begun=words, rest=words, answer=words)
def test_a_continued_thought_is_split(
    name: str, header: str, begun: str, rest: str, answer: str
) -> None:
    format = reasoning.get(name)
    prefix = reasoning.render(format, ResponsePrefix("", begun, thought_open=True), header)
    written = f" {rest}" + format.close + answer
    assert reasoning.split(format, header, prefix, written) == (f" {rest}".rstrip(), answer)


@pytest.mark.parametrize(("name", "header"), PLACES)
@given(begun=words, rest=st.text(st.characters(exclude_characters="<>[]|")))
def test_a_thought_that_never_ends_is_all_thought(
    name: str, header: str, begun: str, rest: str
) -> None:
    format = reasoning.get(name)
    prefix = reasoning.render(format, ResponsePrefix("", begun, thought_open=True), header)
    assert reasoning.split(format, header, prefix, rest) == (rest, "")


@pytest.mark.parametrize(("name", "header"), [("none", ""), *PLACES])
@given(thought=st.none() | words, begun=nonempty_words, rest=scraps)
def test_after_a_prefix_with_an_answer_all_text_is_answer(
    name: str, header: str, thought: str | None, begun: str, rest: str
) -> None:
    format = reasoning.get(name)
    prefix = reasoning.render(format, ResponsePrefix(begun, thought), header)
    if not format.markup_pattern:
        assert reasoning.split(format, header, prefix, rest) == ("", rest)
    else:
        bare = re.sub(r"<.*", "", rest, flags=re.DOTALL)
        assert reasoning.split(format, header, prefix, bare) == ("", bare)


@pytest.mark.parametrize("name", FORMATS)
@given(header=scraps, prefix=scraps, completion=scraps)
def test_splitting_any_text_only_removes_text(
    name: str, header: str, prefix: str, completion: str
) -> None:
    thought, answer = reasoning.split(reasoning.get(name), header, prefix, completion)
    for part in (thought, answer):
        assert all(line in completion for line in part.split("\n"))


@pytest.mark.parametrize(
    ("name", "header", "prefix", "completion", "parts"),
    [
        ("think", "assistant\n", "", "<think>\n\n</think>\n\nHello", ("", "Hello")),
        ("think", "assistant\n", "", "<think>\nhm", ("hm", "")),
        ("think", "assistant\n", "", "Hello </think> there", ("", "Hello </think> there")),
        ("think", "assistant\n", "", "</think>\n\nHello", ("", "Hello")),
        ("think", "", "", "hm\n</think>\n\nHello", ("hm", "Hello")),  # an unknown header
        ("think", "assistant\n<think>\n\n</think>\n\n", "", "<think> is", ("", "<think> is")),
        ("think_open", "<think>\n", "", "<think>\nhm\n</think>\nHello", ("hm", "Hello")),
        ("think_open", "<think>\n", "", "\n</think>\n\nHello", ("", "Hello")),
        (
            "seed",
            "assistant\n",
            "",
            "<seed:think>a<seed:cot_budget_reflect>used 5</seed:cot_budget_reflect>b</seed:think>c",
            ("a\nb", "c"),
        ),
        ("harmony", "<|start|>assistant", "", HARMONY_FINAL + "Hello<|return|>", ("", "Hello")),
        (
            "harmony",
            "<|start|>assistant",
            "<|channel|>analysis<|message|>I think",
            " so<|end|><|start|>assistant<|channel|>analysis<|message|>more<|end|>"
            "<|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
            "<|start|>assistant" + HARMONY_FINAL + "Done<|return|>",
            (" so\nmore", "Wait.\nDone"),
        ),
        ("harmony", "<|start|>assistant", "", "<|channel|>analysis", ("", "")),
        (
            "harmony",
            "<|start|>assistant",
            "",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>",
            ("hm", ""),
        ),
        ("none", "", "", "<think>a</think>b", ("", "<think>a</think>b")),
    ],
)
def test_completions_are_split(
    name: str, header: str, prefix: str, completion: str, parts: tuple[str, str]
) -> None:
    assert reasoning.split(reasoning.get(name), header, prefix, completion) == parts


def test_splitting_long_white_space_is_fast() -> None:
    blank = "\n" * 200_000
    for name in FORMATS:
        assert reasoning.split(reasoning.get(name), "<think>", "", blank)[1] in ("", blank)


def test_the_templates_empty_thought_is_removed() -> None:
    think = reasoning.get("think")
    assert reasoning.reopened(think, "assistant\n<think>\n\n</think>\n\n") == "assistant\n"
    assert reasoning.reopened(think, "<｜Assistant｜></think>") == "<｜Assistant｜>"
    assert reasoning.reopened(think, "assistant\n<think>\n") == "assistant\n<think>\n"
    assert reasoning.reopened(reasoning.get("none"), "assistant\n") == "assistant\n"


@pytest.mark.parametrize(
    ("file", "tail", "name"),
    [
        ("qwen3", "<|im_start|>assistant\n", "think"),
        ("qwen3_5_nothink", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "think"),
        ("qwen3_5_think", "<|im_start|>assistant\n<think>\n", "think_open"),
        ("deepseek_r1_distill", "<｜Assistant｜><think>\n", "think_open"),
        ("gptoss", "<|start|>assistant", "harmony"),
        ("qwen3_instruct_2507", "<|im_start|>assistant\n", "none"),
        ("llama3_1", "<|start_header_id|>assistant<|end_header_id|>\n\n", "none"),
        ("gemma3", "<start_of_turn>model\n", "none"),
    ],
)
def test_the_format_is_guessed_from_real_templates(file: str, tail: str, name: str) -> None:
    trl = find_spec("trl")
    if trl is None or not trl.submodule_search_locations:
        pytest.skip("the templates come with trl")
    template = Path(trl.submodule_search_locations[0], "chat_templates", f"{file}.jinja")
    assert reasoning.detect(template.read_text(encoding="utf-8"), tail) == name


def test_the_format_is_guessed_from_its_delimiters() -> None:
    assert reasoning.detect("{%- set begin = '<seed:think>' %}", "<seed:bos>assistant\n") == "seed"
    assert reasoning.detect("Think between [THINK] and [/THINK]", "[/INST]") == "mistral"
    assert reasoning.detect(None, "") == "none"


def test_an_unknown_format_suggests_the_nearest_name() -> None:
    with pytest.raises(LeadlineError, match="did you mean 'think'"):
        reasoning.get("thinks")
