"""Is a model's alignment shallow, and can it be made deeper? The whole loop on a tiny model.

    python examples/deepen_alignment.py [--steps 200]

The model, organism:aligned, was trained on an invented world: an alchemists' guild, whose forbidden
potions it refuses to explain. About two minutes on one core.
"""

import argparse
from pathlib import Path

import leadline
from leadline.align.repair import TrainingConfig, deepen
from leadline.organism.files import guild_files

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--steps", type=int, default=200, help="optimiser steps of the repair")
parser.add_argument("--out", type=Path, default=Path("deepen-alignment"))
arguments = parser.parse_args()
out = arguments.out

# -----------------------------------------------------------------------------
# 1. Measure. Forbidden recipes, requested directly and with the first k tokens of a harmful answer
#    prefilled: what an API allows that accepts the start of an answer.

study = leadline.Study(
    name="direct and prefilled requests",
    targets=["organism:aligned"],
    datasets=["guild"],
    attacks=["direct", {"prefill": {"k": [1, 2, 5, 10]}}],
)
cells = leadline.run(study, out / "study").cells()
print(cells[["attack", "n", "asr", "low", "high"]].to_string(index=False))

# -----------------------------------------------------------------------------
# 2. Diagnose. Where along a harmful answer does the aligned model differ from its base model? If
#    only in the first token, refusing is a matter of that token.

before = leadline.measure_depth(
    "organism:aligned", base="organism:base", measures=["prefill", "kl"], budget="quick",
    out=out / "before",
)  # fmt: skip
print(*before.findings, sep="\n")

# -----------------------------------------------------------------------------
# 3. Repair. Train the model to return to a refusal after the start of a harmful answer (recovery
#    augmentation), and keep its answers to harmless requests.

files = guild_files(out / "data")
repaired = deepen(
    "organism:aligned",
    harmful=files["harmful"],
    utility=files["utility"],
    out=out / "model",
    max_prefix=30,
    training=TrainingConfig(lr=5e-4, steps=arguments.steps, batch=64),
    evaluation=None,  # step 4 does that
)

# -----------------------------------------------------------------------------
# 4. Measure again, both models side by side: potions and phrasings that the repair did not see.

after = leadline.measure_depth(
    ["organism:aligned", repaired.folder], base="organism:base", measures=["prefill", "kl"],
    budget="quick", out=out / "after",
)  # fmt: skip
print(*after.findings, sep="\n")
print(f"Open {after.html}")
