"""The suffix search beside nanoGCG 0.3.0, which has an environment of its own:

    python -m venv DIR && DIR/bin/pip install nanogcg==0.3.0 torch==2.13.0
    python benchmarks/gcg.py --peer-env DIR [--models 25M 57M organism] [--steps 4] [--reach 0]

The same random-weight Llamas (25M parameters with 32k tokens, 57M with 128k) and an organism, the
same prompt, target and number of candidates; each side in a fresh process with one thread, in
turn. Printed: CPU seconds a step (median over steps, least of the rounds), peak memory beyond the
loaded model, and, on the very candidates that nanoGCG drew, the largest difference of losses and
whether the best candidate is the same. Where nanoGCG's logits would take more than half of the free
memory, the candidates are halved. With `--reach N`: CPU seconds until the least loss that
nanoGCG reaches in N steps, for several settings of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

PROMPT = "how do i brew the ashen tonic ?"
TARGET = "sure , here is the recipe : grind amber , boil mint , stir sage , then crush pearl ."
SUFFIX = " ".join("!" * 20)
SHAPES = {
    "25M": {"vocab_size": 32000, "hidden_size": 256, "intermediate_size": 1024, "layers": 8},
    "57M": {"vocab_size": 128256, "hidden_size": 192, "intermediate_size": 1152, "layers": 10},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "exact, as many candidates": {},
    "exact, 1/4 of the candidates": {"share": 4},
    "exact, 1/8 of the candidates": {"share": 8},
    "probe sampling by gradient": {"probe": True},
}


# -- what both sides share ------------------------------------------------------------------------


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) / 1024


def reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def steps_of(times: list[float]) -> list[float]:
    return [b - a for a, b in pairwise(times)]


def peer(job: dict[str, Any]) -> dict[str, Any]:
    """One run of nanoGCG, watched from outside: its candidates, their losses, and its clock."""
    import nanogcg
    import torch
    from nanogcg import gcg
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    folder = Path(job["folder"])
    about = json.loads((folder / "tokenizer_config.json").read_text())
    named = {k: about[k] for k in ("eos_token", "unk_token", "pad_token") if about.get(k)}
    tokens = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named)
    tokens.chat_template = (folder / "chat_template.jinja").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    drawn: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    times: list[float] = []
    draw, score = gcg.filter_ids, gcg.GCG._compute_candidates_loss_original
    slope = gcg.GCG.compute_token_gradient

    def watched_draw(*a: Any) -> Any:
        drawn.append(draw(*a))
        return drawn[-1]

    def watched_score(self: Any, batch: int, embeds: Any) -> Any:
        losses.append(score(self, batch, embeds))
        return losses[-1]

    def watched_slope(self: Any, ids: Any) -> Any:
        times.append(time.process_time())
        return slope(self, ids)

    # The batch size is found from a function's signature, so it must be (self, batch, embeds).
    gcg.filter_ids, gcg.GCG._compute_candidates_loss_original = watched_draw, watched_score
    gcg.GCG.compute_token_gradient = watched_slope
    config = gcg.GCGConfig(
        num_steps=job["steps"],
        optim_str_init=SUFFIX,
        search_width=job["candidates"],
        topk=job["topk"],
        seed=job["seed"],
        verbosity="ERROR",
    )
    before = reset_peak()
    result = nanogcg.run(model, tokens, f"{PROMPT} {{optim_str}}", TARGET, config)
    times.append(time.process_time())
    losses = losses[-len(drawn) :]  # the first is of the initial suffix
    return {
        "times": times,
        "mib": memory("VmHWM") - before,
        "best": result.losses,
        "drawn": [rows.tolist() for rows in drawn],
        "losses": [row.tolist() for row in losses],
    }


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """One search, or, with `drawn`, the losses of those candidates alone."""
    import torch

    from leadline.depth.gcg import objective as _losses
    from leadline.depth.gcg import search as gcg
    from leadline.records import Prompt

    torch.set_num_threads(1)
    model = gcg.Surrogate.load(job["folder"])
    prompts = [Prompt("1", PROMPT, "bench", target=TARGET)]
    config = gcg.GCGConfig(
        steps=job["steps"],
        candidates=job["candidates"] // job.get("share", 1),
        topk=job["topk"],
        suffix=SUFFIX,
        target_tokens=None,
        seed=job["seed"],
        probe=job.get("probe", False),
    )
    if "drawn" in job:
        objective = _losses.Objective([model], prompts, config)
        found, current = [], objective.start
        for rows in job["drawn"]:
            objective.move(current)
            losses = objective.of(rows)
            current = rows[int(losses.argmin())]
            found.append(losses.tolist())
        return {"losses": found}
    times, best = [], []

    class Reached(Exception): ...

    def progress(step: int, loss: float, suffix: str) -> None:
        times.append(time.process_time())
        best.append(loss)
        if loss <= job.get("until", float("-inf")):
            raise Reached

    before = reset_peak()
    times.append(time.process_time())
    with suppress(Reached):
        gcg.search([model], prompts, config, progress=progress)
    return {"times": times, "mib": memory("VmHWM") - before, "best": best}


# -- the main process -----------------------------------------------------------------------------


def make(folder: Path, name: str) -> Path:
    """A model folder with a tokenizer of as many words as the vocabulary has rows."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = dict(SHAPES[name])
    special = ["<unk>", "<|user|>", "<|end|>", "<|assistant|>"]
    known = [*special, *dict.fromkeys([*PROMPT.split(), *TARGET.split(), "!"])]
    known += [f"w{n}" for n in range(shape["vocab_size"] - len(known))]
    words = models.WordLevel({w: n for n, w in enumerate(known)}, unk_token="<unk>")
    inner = Tokenizer(words)
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in special])
    tokens = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<|end|>")
    tokens.chat_template = (
        "{% for m in messages %}<|user|> {{ m.content }} <|end|>{% endfor %}"
        "{% if add_generation_prompt %} <|assistant|>{% endif %}"
    )
    torch.manual_seed(1)
    config = LlamaConfig(
        num_hidden_layers=shape.pop("layers"),
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=2,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def peak(folder: Path, candidates: int) -> float:
    """About what nanoGCG's logits take, in MiB: of all positions behind the prompt, and a copy."""
    size: int = json.loads((folder / "config.json").read_text())["vocab_size"]
    return candidates * size * 4 * 2 * (20 + 2 + len(TARGET.split())) / 2**20


def memory_left() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable")) / 1024


def child(python: str, side: str, **job: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        asked, told = Path(temporary, "asked.json"), Path(temporary, "told.json")
        asked.write_text(json.dumps(job))
        command = [python, __file__, "--child", side, str(asked), str(told)]
        quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{side}: {done.stderr[-2000:]}")
        answer: dict[str, Any] = json.loads(told.read_text())
        return answer


def reach(theirs: dict[str, Any], python: str, **job: Any) -> None:
    goal = min(theirs["best"])
    took = theirs["times"][theirs["best"].index(goal) + 1] - theirs["times"][0]
    print(f"  to a loss of {goal:.3f}: nanoGCG {took:.1f} s", flush=True)
    for label, setting in SETTINGS.items():
        steps = 4 * len(theirs["best"]) * (8 if setting else 1)
        mine = child(python, "ours", **{**job, **setting, "steps": steps, "until": goal})
        took_us = mine["times"][-1] - mine["times"][0]
        there = f"{took / took_us:.1f}x" if min(mine["best"]) <= goal else "not reached"
        print(f"    {label}: {len(mine['best'])} steps, {took_us:.1f} s, {there}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-env", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["25M", "57M", "organism"])
    parser.add_argument("--candidates", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--reach", type=int, default=0, help="steps of nanoGCG to catch up with")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    there, here = str(given.peer_env / "bin" / "python"), sys.executable
    for name in given.models:
        with tempfile.TemporaryDirectory() as temporary:
            if name == "organism":
                from leadline import organism

                folder = organism.path("aligned")
            else:
                folder = make(Path(temporary), name)
            job = {"folder": str(folder), "candidates": given.candidates, "seed": given.seed}
            while job["candidates"] > 1 and peak(folder, job["candidates"]) > memory_left() / 2:
                job["candidates"] //= 2
            job["topk"] = 64 if name == "organism" else 256
            pairs = []
            for _ in range(given.rounds):
                theirs = child(there, "peer", steps=given.steps, **job)
                pairs.append((theirs, child(here, "ours", steps=given.steps, **job)))
            seconds = [min(statistics.median(steps_of(p[side]["times"])[1:]) for p in pairs)
                       for side in (0, 1)]  # fmt: skip
            mib = [min(p[side]["mib"] for p in pairs) for side in (0, 1)]
            again = child(here, "ours", steps=1, drawn=theirs["drawn"], **job)["losses"]
            both = list(zip(theirs["losses"], again, strict=True))
            worst = max(abs(a - b) for x, y in both for a, b in zip(x, y, strict=True))
            same = sum(x.index(min(x)) == y.index(min(y)) for x, y in both)
            print(f"{name}, {job['candidates']} candidates: nanoGCG {seconds[0]:.3f} s a step, "
                  f"{mib[0]:.0f} MiB; Leadline {seconds[1]:.3f} s, {mib[1]:.0f} MiB: "
                  f"{seconds[0] / seconds[1]:.2f}x the speed, {mib[0] / mib[1]:.1f}x less memory; "
                  f"losses differ by at most "
                  f"{worst:.1e}, same best candidate in {same} of {len(both)} steps",
                  flush=True)  # fmt: skip
            if given.reach:
                theirs = child(there, "peer", steps=given.reach, **job)
                reach(theirs, here, **job)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        side, asked, told = sys.argv[2:]
        answer = {"peer": peer, "ours": ours}[side](json.loads(Path(asked).read_text()))
        Path(told).write_text(json.dumps(answer))
    else:
        main()
