"""Prompts are rendered with real chat templates, and completions are parsed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leadline.models import reasoning
from leadline.models.template import Template
from leadline.records import (
    LeadlineError,
    Message,
    NotApplicable,
    Request,
    ResponsePrefix,
    Sampling,
)

from .tiny_models import CHATML, tokenizer

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
DISTILLED = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")


def real(file: str) -> str:
    trl = find_spec("trl")
    if trl is None or not trl.submodule_search_locations:
        pytest.skip("requires the chat templates of trl")
    folder = Path(trl.submodule_search_locations[0], "chat_templates")
    return (folder / f"{file}.jinja").read_text(encoding="utf-8")


def saved(folder: Path, template: str | None, special: tuple[str, ...] = ()) -> Path:
    tokenizer(template, special).save_pretrained(folder)
    return folder


def ask(
    text: str = "How is it brewed?",
    prefix: ResponsePrefix | None = None,
    *,
    thinking: str = "default",
    system: str = "",
) -> Request:
    turns = (Message("user", text),)
    if system:
        turns = (Message("system", system), *turns)
    return Request(turns, prefix, Sampling(), thinking)


@pytest.mark.parametrize(
    ("file", "name", "thinking", "prefix", "end"),
    [
        ("qwen3", "think", "default", None, "<|im_start|>assistant\n"),
        ("qwen3", "think", "on", None, "<|im_start|>assistant\n"),
        ("qwen3", "think", "off", None, "assistant\n<think>\n\n</think>\n\n"),
        ("qwen3", "think", "off", ("A",), "assistant\n<think>\n\n</think>\n\nA"),
        ("qwen3", "think", "on", ("A",), "assistant\n<think>\n\n</think>\n\nA"),
        ("qwen3", "think", "on", ("A", "T"), "assistant\n<think>\nT\n</think>\n\nA"),
        ("qwen3", "think", "off", ("A", "T"), "assistant\n<think>\nT\n</think>\n\nA"),
        ("qwen3", "think", "off", ("", "T", True), "assistant\n<think>\nT"),
        ("qwen3_5_think", "think_open", "default", None, "assistant\n<think>\n"),
        ("qwen3_5_think", "think_open", "default", ("A",), "<think>\n\n</think>\n\nA"),
        ("qwen3_5_think", "think_open", "off", ("A",), "<think>\n\n</think>\n\nA"),
        ("deepseek_r1_distill", "think_open", "on", None, "<｜Assistant｜><think>\n"),
        ("deepseek_r1_distill", "think_open", "off", None, "<think>\n\n</think>\n\n"),
        ("deepseek_r1_distill", "think_open", "on", ("A", "T"), "<think>\nT\n</think>\n\nA"),
        ("gptoss", "harmony", "on", None, "<|start|>assistant"),
        ("gptoss", "harmony", "off", None, "<|start|>assistant<|channel|>final<|message|>"),
        ("gptoss", "harmony", "on", ("A",), "<|start|>assistant<|channel|>final<|message|>A"),
        ("nemotron_3_nano", "think_open", "off", ("A",), "assistant\n<think></think>A"),
        ("llama3_1", "none", "default", ("A",), "assistant<|end_header_id|>\n\nA"),
        ("llama3_1", "none", "off", ("A",), "assistant<|end_header_id|>\n\nA"),
    ],
)
def test_prompts_end_as_the_model_expects(
    tmp_path: Path, file: str, name: str, thinking: str, prefix: tuple[str, ...], end: str
) -> None:
    template = Template.load(saved(tmp_path, real(file), HARMONY))
    given = ResponsePrefix(prefix[0], *prefix[1:]) if prefix else None
    rendered = template.render(ask(prefix=given, thinking=thinking))
    assert template.format.name == name
    assert rendered.text.endswith(end)
    assert rendered.text.count("<think>") <= 1
    assert template.tokenizer.decode(rendered.ids) == rendered.text
    assert rendered.text.endswith(rendered.header_tail + rendered.prefix)


def test_a_system_message_is_moved_if_the_template_rejects_it(tmp_path: Path) -> None:
    request = ask("Hello", system="Speak in rhyme.")
    accepts = Template.load(saved(tmp_path / "accepts", real("llama3"))).render(request)
    assert "<|start_header_id|>system<|end_header_id|>\n\nSpeak in rhyme.<|eot_id|>" in accepts.text
    rejects = Template.load(saved(tmp_path / "rejects", real("gemma"))).render(request)
    assert "<start_of_turn>user\nSpeak in rhyme.\n\nHello<end_of_turn>" in rejects.text
    silent = CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}")
    drops = Template.load(saved(tmp_path / "drops", silent)).render(request)
    assert "<|im_start|>user\nSpeak in rhyme.\n\nHello<|im_end|>" in drops.text


def test_messages_that_a_template_rejects_are_not_applicable(tmp_path: Path) -> None:
    gemma = Template.load(saved(tmp_path / "gemma", real("gemma")))
    twice = Request((Message("user", "a"), Message("user", "b")), None, Sampling())
    with pytest.raises(NotApplicable, match="roles must alternate"):
        gemma.render(twice)
    with pytest.raises(NotApplicable, match="no thinking to turn on"):
        gemma.render(ask(thinking="on"))


def test_a_template_that_drops_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LeadlineError, match="drops the text of a user message"):
        Template.load(saved(tmp_path, real("smolvlm")))


@given(answer=st.text(st.characters(exclude_categories=["Cs"])), tokens=st.integers(0, 40))
def test_a_prefix_is_truncated_by_its_own_tokens(answer: str, tokens: int) -> None:
    template = Template(tokenizer(), reasoning.get("think"))
    empty = template.render(ask(prefix=ResponsePrefix("", "")))
    whole = template.render(ask(prefix=ResponsePrefix(answer, "")))
    truncated = template.render(ask(prefix=ResponsePrefix(answer, "", tokens=tokens)))
    own = template.encode(answer)
    assert whole.ids == empty.ids + own
    assert truncated.ids == empty.ids + own[:tokens]
    assert truncated.prefix.startswith(empty.prefix)
    if tokens >= len(own):
        assert truncated == whole
        assert truncated.prefix == empty.prefix + answer


def test_a_truncated_prefix_is_text_too() -> None:
    template = Template(tokenizer(), reasoning.get("none"))
    rendered = template.render(ask(prefix=ResponsePrefix("Surely", tokens=4)))
    assert rendered.prefix == template.cut("Surely", 4) == "Sure"
    assert rendered.text.endswith("assistant\nSure")
    assert template.cut("Surely", None) == template.cut("Surely", 99) == "Surely"


def test_delimiters_that_are_special_tokens_are_parsed(tmp_path: Path) -> None:
    distilled = Template.load(saved(tmp_path / "r1", real("deepseek_r1_distill"), DISTILLED))
    rendered = distilled.render(ask())
    ids = distilled.encode("First the water.\n</think>\n\nIt is<|im_start|> simple.<|im_end|>")
    assert distilled.tokenizer.convert_tokens_to_ids("</think>") in ids
    parts = distilled.split(rendered, distilled.decode(ids))
    assert parts == ("First the water.", "It is simple.")
    harmony = Template.load(saved(tmp_path / "oss", real("gptoss"), HARMONY))
    written = (
        "<|channel|>analysis<|message|>First the water.<|end|><|start|>assistant"
        "<|channel|>final<|message|>It is simple.<|return|>"
    )
    completion = harmony.decode(harmony.encode(written))
    parts = harmony.split(harmony.render(ask()), completion)
    assert parts == ("First the water.", "It is simple.")


def test_the_format_and_the_template_can_be_set(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(real("qwen3"), encoding="utf-8")
    folder = saved(tmp_path / "model", None)
    with pytest.raises(LeadlineError, match="chat_template:"):
        Template.load(folder)
    assert Template.load(folder, chat_template=file).format.name == "think"
    given = Template.load(folder, chat_template=file, reasoning="none")
    assert given.render(ask(prefix=ResponsePrefix("Sure"))).text.endswith("assistant\nSure")
    arguments = {"enable_thinking": False}
    quiet = Template.load(folder, chat_template=file, arguments=arguments)
    assert quiet.render(ask()).text.endswith("</think>\n\n")


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file"), ("{% if %}", "rejects these messages")],
)
def test_a_bad_template_file_is_one_line(tmp_path: Path, content: str | None, why: str) -> None:
    file = tmp_path / "chat.jinja"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(LeadlineError, match=why) as caught:
        Template.load(saved(tmp_path / "model", CHATML), chat_template=file)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(LeadlineError) as caught:
            Template.load(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_prompts_are_rendered_without_torch(tmp_path: Path) -> None:
    folder = saved(tmp_path, CHATML)
    script = f"""
import sys
from importlib.machinery import PathFinder

class NoTorch(PathFinder):  # hides torch, as if it were not installed
    @classmethod
    def find_spec(cls, name, *where):
        return None if name.split(".")[0] == "torch" else super().find_spec(name, *where)

sys.meta_path = [NoTorch if finder is PathFinder else finder for finder in sys.meta_path]
from leadline.models.template import Template
from leadline.records import Message, Request, Sampling
assert "transformers" not in sys.modules
request = Request((Message("user", "hello"),), None, Sampling())
print(repr(Template.load({str(folder)!r}).render(request).text))
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert (done.stdout, done.stderr) == (f"{expected!r}\n", "")


def test_two_threads_load_tokenizers_at_once(tmp_path: Path) -> None:
    """transformers puts another module in its own place while it is imported, so a second thread
    that imports it meanwhile gets one without its classes."""
    folder = saved(tmp_path, CHATML)
    script = f"""
import sys, threading
from leadline.models.template import Template
sys.setswitchinterval(1e-5)
problems = []
def load():
    try:
        Template.load({str(folder)!r})
    except BaseException as error:
        problems.append(repr(error))
threads = [threading.Thread(target=load) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(problems)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_an_endpoint_keeps_the_error_of_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the reason, and the original error is the cause."""
    import asyncio

    from leadline.models.openai import Endpoint
    from leadline.models.spec import Limits, ModelSpec

    def broken(*arguments: object, **options: object) -> None:
        raise ImportError("cannot import name 'AutoTokenizer' from 'transformers'")

    monkeypatch.setattr(Template, "load", broken)
    spec = ModelSpec(model="m", url="http://127.0.0.1:9/v1", interface="completions")
    with pytest.raises(LeadlineError, match="cannot import name 'AutoTokenizer'") as caught:
        asyncio.run(Endpoint(spec, Limits())._load_template())
    assert isinstance(caught.value.__cause__, ImportError)
    assert "pip install 'leadline[local]'" in str(caught.value)
