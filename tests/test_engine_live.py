"""A model in memory as a target: a model can be attacked during its training."""

from __future__ import annotations

from pathlib import Path

import pytest

from leadline import LeadlineError, Study, engine, organism
from leadline.models.huggingface import HuggingFaceModel

STUDY = {
    "targets": ["now"],
    "datasets": [{"guild": {"limit": 16}}],
    "attacks": ["direct", {"prefill": {"k": 1}}],
    "sampling": {"max_tokens": 48},
}


@pytest.fixture(scope="module")
def aligned():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = organism.path("aligned")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_a_model_in_memory_answers_like_the_same_model_from_its_folder(aligned, tmp_path: Path):
    live = HuggingFaceModel.live(*aligned, name="now", revision="0")
    before = aligned[0].generation_config.to_dict()
    ours = engine.run(Study(**STUDY), tmp_path / "live", models={"now": live})
    folder = {**STUDY, "targets": [{"model": "organism:aligned", "name": "now"}]}
    theirs = engine.run(Study(**folder), tmp_path / "folder")
    answers = [
        r.query(
            "SELECT c.attack, p.name, r.answer FROM trials t JOIN cells c ON c.id = t.cell "
            "JOIN prompts p ON p.id = t.prompt JOIN responses r ON r.key = t.key ORDER BY 1, 2"
        )
        for r in (ours, theirs)
    ]
    assert answers[0] == answers[1] != []
    assert aligned[0].generation_config.to_dict() == before  # unchanged: it is saved with the model


def test_a_new_revision_of_a_model_in_memory_is_queried_again(aligned, tmp_path: Path):
    def asked(revision: str) -> int:
        live = HuggingFaceModel.live(*aligned, name="now", revision=revision)
        progress = engine.run(Study(**STUDY), tmp_path, models={"now": live}).progress
        assert progress
        return progress.asked

    first = asked("a")
    assert first > 0
    assert asked("a") == 0
    assert asked("b") == first


def test_a_tokenizer_without_chat_template_is_an_error(aligned):
    from copy import copy

    bare = copy(aligned[1])
    bare.chat_template = None
    with pytest.raises(LeadlineError, match="now: its tokenizer has no chat template"):
        HuggingFaceModel.live(aligned[0], bare, name="now", revision="0")
