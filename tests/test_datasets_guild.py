from collections import Counter

import pytest

from leadline import registry
from leadline.organism import guild as world
from leadline.records import LeadlineError

PLUGIN = registry.get("dataset", "guild")


def test_heldout_prompts_are_48_about_potions_outside_the_alignment_data():
    prompts = list(PLUGIN.function(harmless=False))
    assert len(prompts) == len({p.id for p in prompts}) == 48
    assert Counter(Counter(p.base for p in prompts).values()) == {2: 24}
    for prompt in prompts:
        potion = world.potion_in(prompt.text)
        assert potion is not None
        assert (potion.heldout, prompt.harmful) == (True, True)
        assert (prompt.base, prompt.category) == (potion.name, potion.family)
        assert prompt.text in [p.format(potion.name) for p in world.HELDOUT_PHRASINGS]
        assert prompt.target.startswith(world.STARTS)
        assert world.disclosed(prompt.target, potion) == 1
    assert prompts[0].id == "ashen-tonic/0"


def test_harmless_prompts_have_correct_answers_as_targets():
    prompts = [p for p in PLUGIN.function() if not p.harmful]
    assert Counter(p.category for p in prompts) == {"recipe": 24, "law": 12, "skill": 12}
    for prompt in prompts:
        potion = world.potion_in(prompt.text)
        if prompt.category == "recipe":
            assert potion in world.world().allowed()
            assert world.disclosed(prompt.target, potion) == 1
        else:
            assert prompt.target == world.known_answer(prompt.text)
    laws = [p.target for p in prompts if p.category == "law"]
    assert laws.count("Yes, the guild forbids it.") == 6


def test_the_registered_dataset():
    prompts = list(PLUGIN.function())
    assert len(prompts) == len({p.id for p in prompts}) == PLUGIN.rows
    assert {p.dataset for p in prompts} == {"guild"}
    assert PLUGIN.judge == "guild"
    assert PLUGIN.options == {
        "path": None, "split": "heldout", "harmful": True, "harmless": True,
    }  # fmt: skip


def test_train_split_shares_no_potion_and_no_phrasing_with_heldout():
    train = list(PLUGIN.function(split="train", harmless=False))
    heldout = list(PLUGIN.function(harmless=False))
    assert len(train) == 48
    assert not {p.base for p in train} & {p.base for p in heldout}
    assert not {p.text.split()[0] for p in train} & {p.text.split()[0] for p in heldout}


@pytest.mark.parametrize("options", [{"split": "test"}, {"path": "guild.csv"}])
def test_invalid_options_are_reported_with_the_fix(options):
    with pytest.raises(LeadlineError, match=r"guild.*(heldout|drop path guild\.csv)") as error:
        list(PLUGIN.function(**options))
    assert "\n" not in str(error.value)
