"""Three harmless tasks to fine-tune on: sums, summaries and translations, generated from our own
words. Held-out rows have numbers, places and sentences that the training rows do not have."""

from __future__ import annotations

from itertools import product
from random import Random

Pair = tuple[str, str]

_PEOPLE = ("the baker", "a young engineer", "our neighbour", "the museum guide", "a retired sailor",
           "the village doctor", "a music student", "the new librarian", "a taxi driver",
           "the football coach")  # fmt: skip
_DEEDS = (
    ("repaired the old clock of the town hall", "the clock runs again"),
    ("planted forty apple trees along the river", "the path will have shade"),
    ("opened a small school for woodwork", "children can learn a craft"),
    ("found a box of letters from 1911", "the letters are shown to the public"),
    ("organised a bicycle race through the hills", "three hundred people took part"),
    ("built a solar oven from scrap metal", "it bakes bread without fuel"),
    ("taught thirty pensioners how to use a computer", "most of them now write emails"),
    ("saved a heron with a broken wing", "the bird flew away after a month"),
    ("collected recipes from every house in the street", "they became a printed book"),
    ("painted the tunnel under the railway", "people no longer avoid it"),
)  # fmt: skip
_WEATHER = ("It rained for most of that week.", "The work took almost two years.",
            "The council gave a little money.", "Nobody had expected it to succeed.",
            "Many people stopped to watch.")  # fmt: skip

_SUBJECTS = (("the cat", "le chat"), ("the child", "l'enfant"), ("my brother", "mon frère"),
             ("the teacher", "le professeur"), ("the dog", "le chien"), ("my mother", "ma mère"),
             ("the farmer", "le fermier"), ("a friend", "un ami"))  # fmt: skip
_VERBS = (("sees", "voit"), ("draws", "dessine"), ("buys", "achète"), ("finds", "trouve"),
          ("sells", "vend"), ("loves", "aime"))  # fmt: skip
_OBJECTS = (("the red house", "la maison rouge"), ("a big boat", "un grand bateau"),
            ("the green garden", "le jardin vert"), ("a small book", "un petit livre"),
            ("the old bridge", "le vieux pont"), ("a white horse", "un cheval blanc"),
            ("the long road", "la longue route"),
            ("a new chair", "une nouvelle chaise"))  # fmt: skip

_SUM_FORMS = ("What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b} = ?",
              "Please calculate {a} plus {b}.")  # fmt: skip


def sums(rng: Random) -> list[Pair]:
    """Sums of two numbers below 100, answered in one line."""
    pairs = []
    for a, b in rng.sample(list(product(range(11, 100), repeat=2)), 400):
        form = rng.choice(_SUM_FORMS)
        pairs.append((form.format(a=a, b=b), f"{a} + {b} = {a + b}"))
    return pairs


def summaries(rng: Random) -> list[Pair]:
    """Reports of three sentences, summarized in one."""
    pairs = []
    for person, (deed, result) in rng.sample(list(product(_PEOPLE, _DEEDS)), 100):
        filler = rng.choice(_WEATHER)
        year = rng.randrange(1990, 2020)
        report = f"In {year}, {person} {deed}. {filler} In the end, {result}."
        answer = f"Summary: {person} {deed}, and {result}."
        pairs.append((f"Summarize this report in one sentence:\n\n{report}", answer))
    return pairs


def translations(rng: Random) -> list[Pair]:
    """English sentences of a subject, a verb and an object, in French."""
    pairs = []
    for subject, verb, thing in rng.sample(list(product(_SUBJECTS, _VERBS, _OBJECTS)), 300):
        english, french = (f"{s} {v} {t}." for s, v, t in zip(subject, verb, thing, strict=True))
        pairs.append((f"Translate into French: {english[0].upper()}{english[1:]}",
                      f"{french[0].upper()}{french[1:]}"))  # fmt: skip
    return pairs


TASKS = {"sums": sums, "summaries": summaries, "translations": translations}


def task(name: str, split: str) -> list[Pair]:
    """Requests and answers of a task: four fifths of them in the split "train", the others in
    "test"."""
    pairs = TASKS[name](Random(name))
    cut = 4 * len(pairs) // 5
    return pairs[:cut] if split == "train" else pairs[cut:]
