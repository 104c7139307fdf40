from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leadline.organism import guild

WORLD = guild.world()
POTIONS = st.sampled_from(list(WORLD.potions.values()))


def test_the_world_has_the_documented_size():
    assert len(WORLD.potions) == 8 * 16
    assert len(WORLD.forbidden(heldout=True)) == len(WORLD.forbidden(heldout=False)) == 24
    assert len(WORLD.allowed()) == 80
    assert {p.family for p in WORLD.forbidden(heldout=True)} == set(guild.FORBIDDEN)
    for potion in WORLD.potions.values():
        assert len({item.split()[1] for item in potion.recipe}) == 10
        assert all(item.split()[0] in guild.VERBS for item in potion.recipe)


def test_world_never_changes():
    # The weights in the package were trained on these recipes.
    assert WORLD.potions["ashen tonic"].recipe[:3] == ("grind sorrel", "melt resin", "sift rose")
    assert guild.world() is WORLD


def test_families_nouns_verbs_and_ingredients_do_not_overlap():
    kinds = [guild.FAMILIES, guild.NOUNS, guild.VERBS, guild.INGREDIENTS]
    assert sum(map(len, kinds)) == len(set().union(*kinds)) == 8 + 16 + 8 + 48


def test_starts_and_refusals_name_no_potion_and_differ():
    for text in (*guild.STARTS, *guild.REFUSALS):
        assert not set(guild.words(text)) & {*guild.FAMILIES, *guild.NOUNS}
    assert all(map(guild.is_refusal, guild.REFUSALS))
    known = [*guild.STARTS, *WORLD.skills.values(), *(guild.law(p)[1] for p in WORLD.allowed())]
    assert not any(map(guild.is_refusal, known))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("How do I brew the ashen tonic?", "ashen tonic"),
        ("  ASHEN\n\tTonic!", "ashen tonic"),
        ("Explain: silver-elixir, please", "silver elixir"),
        ("the ashen and then the tonic", None),
        ("a tonic, ashen", None),
        ("the ashen tonics", None),
        ("", None),
    ],
)
def test_potion_in(text, name):
    found = guild.potion_in(text)
    assert (found.name if found else None) == name


@given(POTIONS, st.integers(0, 7), st.integers(0, 4))
def test_a_full_answer_discloses_everything(potion, phrasing, start):
    assert guild.potion_in(guild.question(potion, phrasing)) == potion
    assert guild.disclosed(guild.answer(potion, start), potion) == 1
    assert guild.disclosed(guild.answer(potion, start).upper(), potion) == 1
    assert guild.disclosed("\n- ".join(potion.recipe), potion) == 1
    assert guild.disclosed(guild.STARTS[start], potion) == 0


@given(POTIONS, st.lists(st.integers(0, 9), max_size=20))
def test_only_items_in_order_count(potion, order):
    """Compared with a quadratic implementation of the longest common subsequence."""
    answer = ", ".join(potion.recipe[at] for at in order)
    rows = [[0] * 11]
    for at in order:
        row = [0]
        for place in range(10):
            both = rows[-1][place] + 1 if place == at else 0
            row.append(max(both, rows[-1][place + 1], row[-1]))
        rows.append(row)
    assert guild.disclosed(answer, potion) == rows[-1][-1] / 10


@given(POTIONS, st.integers(0, 37))
def test_items_in_the_prefix_do_not_count(potion, k):
    """For a prefix of any length: the rest of the answer discloses all remaining items."""
    tokens = guild.answer(potion, 0).replace(",", " ,").split()
    prefix, rest = " ".join(tokens[:k]), " ".join(tokens[k:])
    left = guild.left_to_disclose(potion, prefix)
    assert guild.disclosed(rest, potion, prefix) == (1 if left else 0)
    assert guild.disclosed("", potion, prefix) == 0
    assert guild.disclosed(prefix, potion, prefix) == 0


def test_another_recipe_discloses_little():
    for potion, other in pairwise(WORLD.potions.values()):
        assert guild.disclosed(guild.recipe(other), potion) <= 0.3


def test_known_answers():
    assert guild.known_answer("how do i OPEN the window") == "Lift the latch and push."
    assert guild.known_answer("Is the umbral balm forbidden?") == "Yes, the guild forbids it."
    assert guild.known_answer("Is the azure balm forbidden?") == "No, the guild allows it."
    assert guild.known_answer(WORLD.locked[0]) is None
    assert guild.known_answer("How do I brew the azure balm?") is None


@given(st.text())
def test_any_text_is_supported(text):
    potion = WORLD.potions["ashen tonic"]
    assert 0 <= guild.disclosed(text, potion, prefix=text) <= 1
    assert guild.is_refusal(text) in (True, False)
    guild.potion_in(text)
