"""KL at a 128k vocabulary: streamed from hidden states, against two full log-softmaxes.

    python benchmarks/kl.py [--positions 1024] [--width 192] [--vocabulary 131072] [--rounds 5]

Random weights, float32, one thread. Every measurement is a fresh process, the two ways in turn,
so that peak memory is one way's own: the process's peak resident size above what it held when the
weights and hidden states were there. Prints medians with their range, their ratios, and how far
either result lies from float64. The matrix products are the same for both: the wider the hidden
states, the more of the time is theirs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

WAYS = ("full", "streamed")
MIB = 2**20


def states(positions: int, width: int, vocabulary: int) -> list[Any]:
    """Hidden states and weights of p, then of q, whose weights are near to p's."""
    import torch

    torch.manual_seed(0)
    hidden = [torch.empty(positions, width).normal_() for _ in range(2)]
    p = torch.empty(vocabulary, width).normal_(std=0.1)
    q = torch.empty(vocabulary, width).normal_(std=0.02).add_(p)
    return [hidden[0], p, hidden[1], q]


def full(hidden_p: Any, p: Any, hidden_q: Any, q: Any) -> Any:
    log_p = (hidden_p @ p.T).log_softmax(-1)
    log_q = (hidden_q @ q.T).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def streamed(hidden_p: Any, p: Any, hidden_q: Any, q: Any) -> Any:
    from leadline.depth.kl.divergence import Head, streamed_kl

    return streamed_kl(hidden_p, Head(len(p), p), hidden_q, Head(len(q), q))


def exact(hidden_p: Any, p: Any, hidden_q: Any, q: Any) -> Any:
    """float64, a few rows at a time"""
    import torch

    rows = zip(hidden_p.double().split(32), hidden_q.double().split(32), strict=True)
    p, q = p.double(), q.double()
    return torch.cat([full(one, p, other, q) for one, other in rows])


def measure(way: str, sizes: list[int], out: Path) -> None:
    """Run one way once, after a small warm-up; print seconds and peak memory as JSON."""
    import torch

    torch.set_num_threads(1)
    run = {"full": full, "streamed": streamed, "exact": exact}[way]
    with torch.inference_mode():
        run(*states(8, 8, 64))
        given = states(*sizes)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held = pages * resource.getpagesize()
        cpu, wall = time.process_time(), time.perf_counter()
        kl = run(*given)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held
    torch.save(kl.double(), out)
    print(json.dumps({"cpu s": cpu, "wall s": wall, "peak MiB": peak / MIB}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=1024, help="rows of hidden states")
    parser.add_argument("--width", type=int, default=192, help="of the hidden states")
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = [options.positions, options.width, options.vocabulary]
    if options.measure:
        return measure(options.measure[0], sizes, Path(options.measure[1]))
    names = ("--positions", "--width", "--vocabulary")
    flags = [part for pair in zip(names, map(str, sizes), strict=True) for part in pair]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for way in [*WAYS * options.rounds, "exact"]:
            command = [sys.executable, __file__, *flags, "--measure", way, f"{folder}/{way}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.setdefault(way, []).append(json.loads(done.stdout))
        import torch

        kl = {way: torch.load(f"{folder}/{way}") for way in found}
    print("{} positions, width {}, vocabulary {}, {} rounds".format(*sizes, options.rounds))
    for key in ("cpu s", "wall s", "peak MiB"):
        runs = {way: [run[key] for run in found[way]] for way in WAYS}
        shown = (f"{w} {median(r):.2f} [{min(r):.2f}, {max(r):.2f}]" for w, r in runs.items())
        ratio = median(runs["full"]) / median(runs["streamed"])
        print(f"{key:8}  {'  '.join(shown)}  ratio {ratio:.2f}")
    for way in WAYS:
        apart = float((kl[way] - kl["exact"]).abs().max())
        print(f"{way} is at most {apart:.1e} nats from float64, of {float(kl['exact'].mean()):.3f}")
        if apart > 1e-3:
            sys.exit("which is too far")
    return None


if __name__ == "__main__":
    main()
