"""KL by token at a 128k vocabulary: streamed from hidden states, or from two log-softmaxes over the
whole vocabulary, for all rows at once or for 32 rows at a time.

    python benchmarks/kl.py [--positions 1024] [--width 192] [--vocabulary 131072] [--rounds 5]

Random weights, float32, one thread. Each measurement runs in a fresh process, the methods in turn.
Peak memory is the process's peak resident size minus its size once the weights and hidden states
are allocated. Prints medians with their range, their ratios to the streamed method, and the largest
difference from a float64 result. All methods compute the same matrix products, whose share of the
time grows with the width of the hidden states. The peer to compare with is the chunked method: it
is what a careful user would write, while the memory of the full one grows with the rows.
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

METHODS = ("full", "chunked", "streamed")
ROWS = 32
"""Rows at a time in the chunked method."""
MIB = 2**20


def states(positions: int, width: int, vocabulary: int) -> list[Any]:
    """Hidden states and output weights of p, then of q, whose weights are close to those of p."""
    import torch

    torch.manual_seed(0)
    hidden = [torch.empty(positions, width).normal_() for _ in range(2)]
    p = torch.empty(vocabulary, width).normal_(std=0.1)
    q = torch.empty(vocabulary, width).normal_(std=0.02).add_(p)
    return [hidden[0], p, hidden[1], q]


def full(hidden_p: Any, p: Any, hidden_q: Any, q: Any) -> Any:
    """KL(p || q) by row from two log-softmaxes over the whole vocabulary."""
    log_p = (hidden_p @ p.T).log_softmax(-1)
    log_q = (hidden_q @ q.T).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def chunked(hidden_p: Any, p: Any, hidden_q: Any, q: Any) -> Any:
    """KL(p || q) by row from two log-softmaxes over the whole vocabulary, `ROWS` rows at a time."""
    import torch

    # Small results allocated between large blocks would keep the allocator from reusing these.
    kl = torch.empty(len(hidden_p), dtype=hidden_p.dtype)
    for at in range(0, len(kl), ROWS):
        rows = slice(at, at + ROWS)
        kl[rows] = full(hidden_p[rows], p, hidden_q[rows], q)
    return kl


def streamed(hidden_p: Any, p: Any, hidden_q: Any, q: Any) -> Any:
    """KL(p || q) by row as Leadline computes it."""
    from leadline.depth.kl.divergence import streamed_kl
    from leadline.depth.kl.head import Head

    return streamed_kl(hidden_p, Head(len(p), p), hidden_q, Head(len(q), q))


def exact(hidden_p: Any, p: Any, hidden_q: Any, q: Any) -> Any:
    """KL(p || q) by row in float64."""
    return chunked(hidden_p.double(), p.double(), hidden_q.double(), q.double())


def measure(method: str, sizes: list[int], out: Path) -> None:
    """Run one method once, after a small warm-up; print seconds and peak memory as JSON."""
    import torch

    torch.set_num_threads(1)
    run = {"full": full, "chunked": chunked, "streamed": streamed, "exact": exact}[method]
    with torch.inference_mode():
        run(*states(8, 8, 64))
        inputs = states(*sizes)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        before = pages * resource.getpagesize()
        cpu, wall = time.process_time(), time.perf_counter()
        kl = run(*inputs)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    torch.save(kl.double(), out)
    print(json.dumps({"cpu s": cpu, "wall s": wall, "peak MiB": peak / MIB}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--positions", type=int, default=1024, help="rows of hidden states")
    parser.add_argument("--width", type=int, default=192, help="size of a hidden state")
    parser.add_argument("--vocabulary", type=int, default=131072, help="number of tokens")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each method")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = [options.positions, options.width, options.vocabulary]
    if options.measure:
        return measure(options.measure[0], sizes, Path(options.measure[1]))
    names = ("--positions", "--width", "--vocabulary")
    flags = [part for pair in zip(names, map(str, sizes), strict=True) for part in pair]
    results: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        for method in [*METHODS * options.rounds, "exact"]:
            command = [sys.executable, __file__, *flags, "--measure", method, f"{folder}/{method}"]
            child = subprocess.run(command, check=True, capture_output=True, text=True)
            results.setdefault(method, []).append(json.loads(child.stdout))
        import torch

        kl = {method: torch.load(f"{folder}/{method}") for method in results}
    print("{} positions, width {}, vocabulary {}, {} rounds".format(*sizes, options.rounds))
    for key in ("cpu s", "wall s", "peak MiB"):
        runs = {method: [run[key] for run in results[method]] for method in METHODS}
        columns = (f"{m} {median(r):.2f} [{min(r):.2f}, {max(r):.2f}]" for m, r in runs.items())
        ratios = (
            f"{m}/streamed {median(r) / median(runs['streamed']):.2f}"
            for m, r in runs.items()
            if m != "streamed"
        )
        print(f"{key:8}  {'  '.join([*columns, *ratios])}")
    print(f"mean KL {float(kl['exact'].mean()):.3f} nats")
    for method in METHODS:
        error = float((kl[method] - kl["exact"]).abs().max())
        print(f"{method}: largest difference from float64 {error:.1e} nats")
        if error > 1e-3:
            sys.exit(f"error: {method} differs from float64 by more than 1e-3 nats")
    return None


if __name__ == "__main__":
    main()
