"""Model cards: their data, how a card is looked up, and which settings it decides."""

from __future__ import annotations

import asyncio
import json
import re
import struct
from math import prod

import pytest

from leadline import LeadlineError, Study, catalogue, organism
from leadline.models import reasoning
from leadline.models.cards import Card, card, cards, resolve_card
from leadline.models.openai import Endpoint
from leadline.models.spec import Limits, ModelSpec
from leadline.records import Message, Request, ResponsePrefix, Sampling

PUBLIC = [c for c in cards().values() if not c.id.startswith("organism:")]


def test_the_32_public_models_of_13_families_span_3b_to_235b():
    assert len(PUBLIC) == 32
    assert len({c.family for c in PUBLIC}) == 13
    sizes = sorted(c.parameters or 0 for c in PUBLIC)
    assert (int(sizes[0]), sizes[-1]) == (3, 235)


@pytest.mark.parametrize("known", cards().values(), ids=cards())
def test_a_card_has_every_compared_characteristic(known):
    assert known.developer
    assert known.family
    assert known.architecture
    assert known.parameters
    assert 0 < known.active <= known.parameters
    assert (known.architecture == "dense") == (known.active == known.parameters)
    assert known.format in reasoning.FORMATS
    assert (known.format == "none") == (known.reasoning == "none")
    assert known.reasoning == "none" or known.stage in ("reasoning", "distilled")
    assert known.parent != known.id
    assert known.parent is None or known.parent in cards() or is_public(known.parent)


def is_public(id: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", id) is not None


def test_public_cards_have_a_month_and_organisms_an_existing_parent():
    assert all(re.fullmatch(r"202\d-\d\d", c.released or "") for c in PUBLIC)
    assert card("organism:aligned").parent == "organism:base"
    assert card("organism:deep").parent == "organism:aligned"
    assert card("organism:reasoner").parent == "organism:base"


@pytest.mark.parametrize("name", organism.names())
def test_the_size_of_an_organism_is_that_of_its_weights(name):
    with (organism.path(name) / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    count = sum(prod(tensor["shape"]) for tensor in header.values())
    assert card(f"organism:{name}").parameters * 1e9 == pytest.approx(count, rel=0.02)


@pytest.mark.parametrize(
    "name",
    ["Qwen/Qwen3-8B", "qwen/qwen3-8b", "Qwen3-8B", "./runs/Qwen3-8B", "/m/qwen3-8b/", "x/QWEN3-8B"],
)
def test_a_card_is_found_in_any_case_and_by_the_last_path_component(name):
    assert card(name).id == "Qwen/Qwen3-8B"


@pytest.mark.parametrize("name", ["", "/", "my-model", "Qwen", "Qwen/Qwen3-8B-Base", "aligned"])
def test_another_model_has_no_card(name):
    assert card(name) is None


def test_a_study_can_name_another_card_or_override_fields():
    assert resolve_card("served", "openai/gpt-oss-20b") == card("openai/gpt-oss-20b")
    tuned = resolve_card("Qwen/Qwen3-8B", {"stage": "reasoning", "parent": "Qwen/Qwen3-8B"})
    assert (tuned.stage, tuned.parent, tuned.family) == ("reasoning", "Qwen/Qwen3-8B", "Qwen3")
    grown = resolve_card("Qwen/Qwen3-8B", {"parameters": 9})
    assert (grown.parameters, grown.active) == (9, 9)
    mine = resolve_card("served", {"parameters": 7, "architecture": "dense"})
    assert mine == Card("served", parameters=7, active=7, architecture="dense")
    assert resolve_card("served") is None


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("card: Qwen/Qwen3-9B", "unknown card 'Qwen/Qwen3-9B': did you mean 'Qwen/Qwen3-8B'"),
        ("card: {stagee: base}", "unknown card field 'stagee': did you mean 'stage'"),
        ("card: {stage: instrukt}", "stage: input should be 'base', 'instruct'"),
        ("card: {format: thnk}", "unknown reasoning format 'thnk': did you mean 'think'"),
        ("card: {released: '2025'}", "released: write a month like 2025-04, not '2025'"),
        ("card: {parameters: -1}", "parameters: input should be greater than 0, not -1"),
        ("card: [a]", "card: should be the id of a card"),
    ],
)
def test_an_invalid_card_is_an_error_with_its_line(tmp_path, written, message):
    file = tmp_path / "study.yaml"
    file.write_text(
        f"targets:\n  - model: m\n    url: http://x/v1\n    {written}\ndatasets: [guild]\n"
    )
    with pytest.raises(LeadlineError) as caught:
        Study.load(file)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{file}:4: ")


def test_the_list_shows_interfaces_organisms_and_cards():
    rows = {row["name"]: row for row in catalogue.rows("models")}
    assert set(rows) >= {"openai", "huggingface", "organism:deep", *(c.id for c in PUBLIC)}
    assert all(set(row) >= set(catalogue.columns("models")) for row in rows.values())
    moe = rows["Qwen/Qwen3-30B-A3B"]
    assert (moe["parameters"], moe["active"], moe["size"]) == (30.5, 3.3, "30.5B (3.3B)")
    assert len({frozenset(row) for row in rows.values()}) == 1
    assert rows["openai"]["summary"].startswith("A model behind url:")


def test_the_table_of_models_is_one_line_each(leadline):
    shown = leadline("list", "models").stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("openai/gpt-oss-120b ")]
    assert line.split() == ["openai/gpt-oss-120b", "OpenAI", "gpt-oss", "116.8B", "(5.1B)",
                            "native", "reasoning"]  # fmt: skip
    assert "None" not in shown


# -- the reasoning format of an endpoint, from its card -------------------------------------------


def ask(server, *, thinking="default", prefix=None, **spec):
    """One request to an endpoint: (response, the body that the server saw, identity)."""

    async def once():
        endpoint = Endpoint(ModelSpec(url=server.url, **spec), Limits(retries=0))
        try:
            await endpoint.prepare(prefix=prefix is not None)
            request = Request((Message("user", "hello"),), prefix, Sampling(), thinking)
            return await endpoint.respond(request), endpoint.identity
        finally:
            await endpoint.close()

    response, identity = asyncio.run(once())
    return response, server.bodies[-1] if server.bodies else None, identity


def test_the_card_decides_the_reasoning_format_and_the_thinking_switch(server):
    server.answer = lambda text, body: "<think>\nhm\n</think>\n\nhi"
    response, body, identity = ask(server, model="Qwen/Qwen3-8B", thinking="off")
    assert (response.thought, response.answer) == ("hm", "hi")
    assert body["chat_template_kwargs"]["enable_thinking"] is False
    assert identity["reasoning"] == "think"
    _, body, identity = ask(server, model="x", card="ByteDance-Seed/Seed-OSS-36B-Instruct",
                            thinking="off")  # fmt: skip
    assert body["chat_template_kwargs"] == {"thinking_budget": 0}
    assert identity["reasoning"] == "seed"


def test_the_study_overrides_the_card(server):
    *_, identity = ask(server, model="Qwen/Qwen3-8B", reasoning="none")
    assert identity["reasoning"] == "none"
    *_, identity = ask(server, model="my-model")
    assert identity["reasoning"] is None


R1 = "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"


@pytest.mark.parametrize(
    ("text", "finish", "parts"),
    [
        ("hm\n</think>\n\nhi", "stop", ("hm", "hi")),  # the template has opened the thought
        ("hi", "stop", ("", "hi")),  # the server removes the thought
        ("hm, and", "length", ("hm, and", "")),  # truncated in the middle of the thought
    ],
)
def test_a_thought_that_the_template_opens_is_separated_from_the_answer(
    server, text, finish, parts
):
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
    }
    server.reply = lambda body: {"choices": [choice]}
    response, *_ = ask(server, model=R1)
    assert (response.thought, response.answer) == parts


@pytest.mark.parametrize("model", [R1, "Qwen/Qwen3-8B", "openai/gpt-oss-20b", "microsoft/phi-4"])
def test_a_prefix_in_a_chat_is_the_answer_alone(server, model):
    """R1's and gpt-oss's templates reject a thought in it; the others add the empty thought."""

    def answer(text, body):
        return "ember, flint" if "amber" in text else "dig a hole."

    server.answer = answer
    response, body, _ = ask(server, model=model, prefix=ResponsePrefix("Sure, first"))
    assert body["messages"][-1]["content"] == "Sure, first"
    assert (response.thought, response.answer) == ("", "dig a hole.")
    assert response.prefix == "Sure, first"


def test_a_forged_thought_needs_the_completions_interface(server):
    server.answer = lambda text, body: "ember, flint"
    response, *_ = ask(server, model="Qwen/Qwen3-8B", prefix=ResponsePrefix("Sure", thought="ok"))
    assert response.finish == "not_applicable"
    assert "interface: completions" in response.error
