"""Measure how deep a model's safety alignment goes, make it deeper, and measure again.

    python examples/deepen_alignment.py [--steps 200]

The model, organism:aligned, is a tiny model trained on an invented world: an alchemists' guild
whose forbidden potions it refuses to explain. Runs about two minutes on one core.
"""

import argparse
from pathlib import Path

import leadline
from leadline.align.repair import TrainingConfig, deepen
from leadline.organism.files import guild_files

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--steps", type=int, default=200, help="optimizer steps of the repair")
parser.add_argument("--out", type=Path, default=Path("deepen-alignment"), help="output folder")
arguments = parser.parse_args()
out = arguments.out

# -----------------------------------------------------------------------------
# 1. Measure. Request forbidden recipes directly, and with the first k tokens of a harmful answer
#    prefilled (possible with any API that accepts the start of the answer).

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
#    only at the first token, refusal depends on that token alone.

before = leadline.measure_depth(
    "organism:aligned", base="organism:base", measures=["prefill", "kl"], budget="quick",
    out=out / "before",
)  # fmt: skip
print(*before.findings, sep="\n")

# -----------------------------------------------------------------------------
# 3. Repair. Train the model to return to a refusal after the start of a harmful answer (recovery
#    augmentation), and to keep its answers to harmless requests.

files = guild_files(out / "data")
repaired = deepen(
    "organism:aligned",
    harmful=files["harmful"],
    utility=files["utility"],
    out=out / "model",
    max_prefix=30,
    training=TrainingConfig(lr=5e-4, steps=arguments.steps, batch=64),
    evaluation=None,  # step 4 evaluates
)

# -----------------------------------------------------------------------------
# 4. Measure again, both models side by side, on potions and phrasings held out from the repair.


after = leadline.measure_depth(
    ["organism:aligned", repaired.folder], base="organism:base", measures=["prefill", "kl"],
    budget="quick", out=out / "after",
)  # fmt: skip
print(*after.findings, sep="\n")
print(f"Open {after.html}")
