"""Leadline's GCG suffix search, against nanoGCG 0.3.0 in a separate environment.

    python -m venv DIR && DIR/bin/pip install nanogcg==0.3.0 torch==2.13.0
    python benchmarks/gcg.py --peer-env DIR [--models 25M 57M organism] [--steps 4] [--reach 0]

Both search with the same model (random-weight Llamas with 25M parameters and a vocabulary of 32k
tokens, or 57M and 128k, or an organism), prompt, target and number of candidates, each in a fresh
process with one thread, in turn. Prints CPU seconds per step (median over steps, lowest of the
rounds), peak memory beyond the loaded model, and, for the candidates that nanoGCG drew, the largest
difference between the losses and whether the best candidate is the same. The number of candidates
is halved until nanoGCG's logits take at most half of the free memory. With `--reach N`, also prints
the CPU seconds that several settings of Leadline take to reach the lowest loss of N nanoGCG steps.
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
SETTINGS: dict[str, dict[str, Any]] = {  # "share" divides the number of candidates
    "exact, as many candidates": {},
    "exact, 1/4 of the candidates": {"share": 4},
    "exact, 1/8 of the candidates": {"share": 8},
    "probe sampling by gradient": {"probe": True},
}


# -- the searches, each in a fresh process --------------------------------------------------------


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) / 1024


def reset_peak() -> float:
    """Reset the peak of this process's memory; returns its memory now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def differences(times: list[float]) -> list[float]:
    """Durations between consecutive times."""
    return [b - a for a, b in pairwise(times)]


def peer(job: dict[str, Any]) -> dict[str, Any]:
    """One nanoGCG search, whose functions are wrapped to record candidates, losses and times."""
    import nanogcg
    import torch
    from nanogcg import gcg
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    folder = Path(job["folder"])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    special = {k: config[k] for k in ("eos_token", "unk_token", "pad_token") if config.get(k)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    tokenizer.chat_template = (folder / "chat_template.jinja").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    drawn: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    times: list[float] = []
    filter_ids, compute_loss = gcg.filter_ids, gcg.GCG._compute_candidates_loss_original
    compute_gradient = gcg.GCG.compute_token_gradient

    def recorded_filter(*arguments: Any) -> Any:
        drawn.append(filter_ids(*arguments))
        return drawn[-1]

    def recorded_loss(self: Any, batch: int, embeds: Any) -> Any:
        losses.append(compute_loss(self, batch, embeds))
        return losses[-1]

    def recorded_gradient(self: Any, ids: Any) -> Any:
        times.append(time.process_time())
        return compute_gradient(self, ids)

    # nanoGCG inspects the signature to set the batch size, so it must be (self, batch, embeds).
    gcg.filter_ids, gcg.GCG._compute_candidates_loss_original = recorded_filter, recorded_loss
    gcg.GCG.compute_token_gradient = recorded_gradient
    settings = gcg.GCGConfig(
        num_steps=job["steps"],
        optim_str_init=SUFFIX,
        search_width=job["candidates"],
        topk=job["topk"],
        seed=job["seed"],
        verbosity="ERROR",
    )
    before = reset_peak()
    result = nanogcg.run(model, tokenizer, f"{PROMPT} {{optim_str}}", TARGET, settings)
    times.append(time.process_time())
    losses = losses[-len(drawn) :]  # without the loss of the initial suffix
    return {
        "times": times,
        "mib": memory("VmHWM") - before,
        "best": result.losses,
        "drawn": [rows.tolist() for rows in drawn],
        "losses": [row.tolist() for row in losses],
    }


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """One Leadline search or, if the job has `drawn` candidates, only their losses."""
    import torch

    from leadline.depth.gcg.objective import Objective
    from leadline.depth.gcg.search import GCGConfig, Surrogate, search
    from leadline.records import Prompt

    torch.set_num_threads(1)
    model = Surrogate.load(job["folder"])
    prompts = [Prompt("1", PROMPT, "bench", target=TARGET)]
    config = GCGConfig(
        steps=job["steps"],
        candidates=job["candidates"] // job.get("share", 1),
        topk=job["topk"],
        suffix=SUFFIX,
        target_tokens=None,
        seed=job["seed"],
        probe=job.get("probe", False),
    )
    if "drawn" in job:
        objective = Objective([model], prompts, config)
        by_step, current = [], objective.start
        for rows in job["drawn"]:
            objective.move(current)
            losses = objective.of(rows)
            current = rows[int(losses.argmin())]
            by_step.append(losses.tolist())
        return {"losses": by_step}
    times, best = [], []

    class Reached(Exception):
        """Ends a search at the loss `until`."""

    def progress(step: int, loss: float, suffix: str) -> None:
        times.append(time.process_time())
        best.append(loss)
        if loss <= job.get("until", float("-inf")):
            raise Reached

    before = reset_peak()
    times.append(time.process_time())
    with suppress(Reached):
        search([model], prompts, config, progress=progress)
    return {"times": times, "mib": memory("VmHWM") - before, "best": best}


# -- the main process -----------------------------------------------------------------------------


def make(folder: Path, name: str) -> Path:
    """Save a model with random weights and a tokenizer with as many words as its vocabulary has
    rows; returns `folder`."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = dict(SHAPES[name])
    special = ["<unk>", "<|user|>", "<|end|>", "<|assistant|>"]
    words = [*special, *dict.fromkeys([*PROMPT.split(), *TARGET.split(), "!"])]
    words += [f"w{n}" for n in range(shape["vocab_size"] - len(words))]
    vocabulary = {word: n for n, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
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


def logits_mib(folder: Path, candidates: int) -> float:
    """Approximate size of nanoGCG's logits in MiB: all positions after the prompt, and a copy."""
    size: int = json.loads((folder / "config.json").read_text())["vocab_size"]
    return candidates * size * 4 * 2 * (20 + 2 + len(TARGET.split())) / 2**20


def available_mib() -> float:
    """Memory that the system can give to a new process, in MiB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable")) / 1024


def run_in_subprocess(python: str, side: str, **job: Any) -> dict[str, Any]:
    """The result of `peer` or `ours` in a fresh process; exits with its error output if it
    fails."""
    with tempfile.TemporaryDirectory() as temporary:
        job_file, result_file = Path(temporary, "job.json"), Path(temporary, "result.json")
        job_file.write_text(json.dumps(job))
        command = [python, __file__, "--child", side, str(job_file), str(result_file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        child = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        if child.returncode:
            sys.exit(f"{side}: {child.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(result_file.read_text())
        return result


def reach(theirs: dict[str, Any], python: str, **job: Any) -> None:
    """Print how long each of `SETTINGS` takes to reach the lowest loss of a nanoGCG search."""
    goal = min(theirs["best"])
    peer_seconds = theirs["times"][theirs["best"].index(goal) + 1] - theirs["times"][0]
    print(f"  to a loss of {goal:.3f}: nanoGCG {peer_seconds:.1f} s", flush=True)
    for label, setting in SETTINGS.items():
        steps = 4 * len(theirs["best"]) * (8 if setting else 1)
        run = run_in_subprocess(python, "ours", **{**job, **setting, "steps": steps, "until": goal})
        seconds = run["times"][-1] - run["times"][0]
        ratio = f"{peer_seconds / seconds:.1f}x" if min(run["best"]) <= goal else "not reached"
        print(f"    {label}: {len(run['best'])} steps, {seconds:.1f} s, {ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*SHAPES, "organism"]
    parser.add_argument("--peer-env", type=Path, required=True, help="environment with nanoGCG")
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--candidates", type=int, default=512, help="candidates per step")
    parser.add_argument("--steps", type=int, default=4, help="steps of a search")
    parser.add_argument("--rounds", type=int, default=2, help="searches of each side")
    parser.add_argument("--reach", type=int, default=0, help="nanoGCG steps for time to equal loss")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    peer_python, python = str(options.peer_env / "bin" / "python"), sys.executable
    for name in options.models:
        with tempfile.TemporaryDirectory() as temporary:
            if name == "organism":
                from leadline import organism

                folder = organism.path("aligned")
            else:
                folder = make(Path(temporary), name)
            job = {"folder": str(folder), "candidates": options.candidates, "seed": options.seed}
            limit = available_mib() / 2
            while job["candidates"] > 1 and logits_mib(folder, job["candidates"]) > limit:
                job["candidates"] //= 2
            job["topk"] = 64 if name == "organism" else 256
            pairs = []
            for _ in range(options.rounds):
                theirs = run_in_subprocess(peer_python, "peer", steps=options.steps, **job)
                mine = run_in_subprocess(python, "ours", steps=options.steps, **job)
                pairs.append((theirs, mine))
            seconds = [min(statistics.median(differences(p[side]["times"])[1:]) for p in pairs)
                       for side in (0, 1)]  # fmt: skip
            mib = [min(p[side]["mib"] for p in pairs) for side in (0, 1)]
            again = run_in_subprocess(python, "ours", steps=1, drawn=theirs["drawn"], **job)
            both = list(zip(theirs["losses"], again["losses"], strict=True))
            largest = max(abs(a - b) for x, y in both for a, b in zip(x, y, strict=True))
            same = sum(x.index(min(x)) == y.index(min(y)) for x, y in both)
            print(f"{name}, {job['candidates']} candidates: nanoGCG {seconds[0]:.3f} s per step, "
                  f"{mib[0]:.0f} MiB; Leadline {seconds[1]:.3f} s, {mib[1]:.0f} MiB: "
                  f"{seconds[0] / seconds[1]:.2f}x the speed, {mib[0] / mib[1]:.1f}x less memory; "
                  f"losses differ by at most "
                  f"{largest:.1e}, same best candidate in {same} of {len(both)} steps",
                  flush=True)  # fmt: skip
            if options.reach:
                theirs = run_in_subprocess(peer_python, "peer", steps=options.reach, **job)
                reach(theirs, python, **job)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        side, job_file, result_file = sys.argv[2:]
        result = {"peer": peer, "ours": ours}[side](json.loads(Path(job_file).read_text()))
        Path(result_file).write_text(json.dumps(result))
    else:
        main()
