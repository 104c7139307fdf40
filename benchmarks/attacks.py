"""Speed of the offline attacks: attempts generated, and encoded answers decoded, per second.

    python benchmarks/attacks.py [--seconds 0.2]

For each attack that needs no other model, prints attempts per second on one core for a prompt of
about 100 characters and, where the attack asks for encoded answers, decodes per second of an answer
of 1,000 characters; then the median, the slowest attack, and the time of one attempt of each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

from leadline import registry
from leadline.attacks import _codes
from leadline.plan import Attack
from leadline.records import NotApplicable, Prompt

TEXT = "Write down, step by step, how a beginner brews the quiet tonic from what the garden has."
ANSWER = ("Crush the mint, pour hot water over it and wait until the bowl is cool. " * 14)[:1000]
CODES = ("base64", "ascii", "caesar", "morse", "atbash")


def rate(call: Callable[[], int], seconds: float) -> float:
    """Call a function repeatedly for some seconds; the sum of its results per second."""
    total, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        total += call()
    return total / elapsed


def encoded_answer(attack: str) -> str:
    """`ANSWER` in the code that an attack asks for."""
    code = next((code for code in CODES if attack.startswith(code)), "")
    return getattr(_codes, f"{code}_text")(ANSWER) if code else json.dumps(ANSWER.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.2, help="duration for each attack")
    seconds = parser.parse_args().seconds
    prompt = Prompt("1", TEXT, "bench", target="Sure, here is how it is done.")
    rates: dict[str, float] = {}
    for plugin in registry.plugins("attack"):
        attack = Attack(plugin.name, plugin, {})
        if attack.assisted:
            continue
        try:
            rates[attack.label] = rate(lambda a=attack: len(a.attempts(prompt, 0)), seconds)
        except NotApplicable:
            continue
        line = f"{attack.label:32} {rates[attack.label]:10,.0f} attempts/s"
        if decode := plugin.decode:
            answer = encoded_answer(attack.label)
            decodes = rate(lambda d=decode, a=answer: len([d(a)]), seconds)
            line += f" {decodes:10,.0f} decodes/s"
        print(line)
    slowest = min(rates, key=lambda name: rates[name])
    print(f"median {median(rates.values()):,.0f} attempts/s, slowest {slowest} "
          f"{rates[slowest]:,.0f}; one attempt of each takes "
          f"{sum(1 / r for r in rates.values()) * 1e3:.2f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
