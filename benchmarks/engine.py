"""Overhead of the engine: a study through `leadline.run`, against a bare aiohttp client.

    python benchmarks/engine.py [--trials 20000] [--rounds 3]

A bare httpx client is measured too, to compare the two HTTP libraries. All clients send the same
prompts to the same local server at the same concurrency, in turn, each in a fresh process. The bare
clients parse each reply and write it to a file; Leadline plans, hashes, sends, judges by pattern
and stores. Prints requests per second, CPU milliseconds per request (user + system, of the whole
process without start-up), and the median ratio. httpx sends a tenth of the requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ANSWER = (
    "I'm sorry, but I can't help with that request. I cannot say how this potion is brewed, since "
    "the guild keeps its recipe under lock. I can tell you about its history instead."
)


# -- a minimal server -----------------------------------------------------------------------------


class Mock(asyncio.Protocol):
    """A keep-alive HTTP/1.1 server that answers every request with the same prebuilt reply."""

    REPLY = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r\n")[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + size:
                return
            self.buffer = self.buffer[end + 4 + size :]
            self.transport.write(self.REPLY)  # type: ignore[attr-defined]


def serve(pipe: multiprocessing.connection.Connection) -> None:
    """Run the server and send its port through `pipe`."""
    message = {"role": "assistant", "content": ANSWER}
    body = json.dumps(
        {
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 40, "completion_tokens": 40},
        }
    ).encode()
    Mock.REPLY = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Mock, "127.0.0.1", 0, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    import uvloop

    uvloop.run(main())


# -- the clients, each in a fresh process ---------------------------------------------------------


def bare(url: str, data: Path, trials: int, concurrency: int) -> None:
    """Send `trials` prompts of the file `data` with aiohttp."""
    import aiohttp
    import orjson
    import uvloop

    rows = [orjson.loads(line) for line in data.read_bytes().splitlines()]
    bodies = [rows[i % len(rows)]["prompt"] for i in range(trials)]
    out = (data.parent / "bare.jsonl").open("wb")

    async def main() -> None:
        todo = iter(bodies)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def worker() -> None:
                for text in todo:
                    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
                    async with session.post(
                        f"{url}/chat/completions",
                        data=orjson.dumps(body),
                        headers={"Content-Type": "application/json"},
                    ) as reply:
                        result = orjson.loads(await reply.read())
                    answer = result["choices"][0]["message"]["content"]
                    out.write(orjson.dumps({"prompt": text, "answer": answer}) + b"\n")

            await asyncio.gather(*(worker() for _ in range(concurrency)))

    with _Clock(trials):
        uvloop.run(main())


def httpx(url: str, data: Path, trials: int, concurrency: int) -> None:
    """The same with httpx."""
    import httpx as client
    import orjson
    import uvloop

    rows = [orjson.loads(line) for line in data.read_bytes().splitlines()]
    out = (data.parent / "httpx.jsonl").open("wb")

    async def main() -> None:
        todo = iter(range(trials))
        limits = client.Limits(max_connections=None, max_keepalive_connections=None)
        async with client.AsyncClient(limits=limits, timeout=60, trust_env=False) as session:

            async def worker() -> None:
                for i in todo:
                    text = rows[i % len(rows)]["prompt"]
                    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
                    reply = await session.post(
                        f"{url}/chat/completions",
                        content=orjson.dumps(body),
                        headers={"Content-Type": "application/json"},
                    )
                    answer = orjson.loads(reply.content)["choices"][0]["message"]["content"]
                    out.write(orjson.dumps({"prompt": text, "answer": answer}) + b"\n")

            await asyncio.gather(*(worker() for _ in range(concurrency)))

    with _Clock(trials):
        uvloop.run(main())


def engine(url: str, data: Path, trials: int, concurrency: int) -> None:
    """The same as a study through `leadline.run`."""
    import aiohttp  # noqa: F401 (imported before the clock starts)

    import leadline
    import leadline.analysis.results
    import leadline.engine
    from leadline import registry

    registry.plugins("attack")
    samples = max(1, trials // sum(1 for _ in data.open()))
    study = leadline.Study.model_validate(
        {
            "targets": [{"model": "m", "url": url}],
            "datasets": [{"file": {"path": str(data)}}],
            "judges": ["refusal"],
            "sampling": {"samples": samples},
            "limits": {"concurrency": concurrency},
        }
    )
    with _Clock(trials):
        results = leadline.run(study, data.parent / f"out-{os.getpid()}")
    assert results.cells()["n"].sum() == trials


class _Clock:
    """Prints, as JSON, requests per second, CPU milliseconds per request and peak memory of its
    block."""

    def __init__(self, trials: int) -> None:
        self.trials = trials

    def __enter__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), _cpu()

    def __exit__(self, *_: object) -> None:
        wall, cpu = time.perf_counter() - self.wall, _cpu() - self.cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"rps": self.trials / wall, "ms": cpu / self.trials * 1e3, "mib": peak}))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


CLIENTS = {"bare": bare, "httpx": httpx, "engine": engine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20_000, help="requests of each client")
    parser.add_argument("--prompts", type=int, default=2_000, help="distinct prompts")
    parser.add_argument("--concurrency", type=int, default=64, help="concurrent requests")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each client")
    parser.add_argument("--client", choices=list(CLIENTS), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        CLIENTS[args.client](args.url, args.data, args.trials, args.concurrency)
        return
    args.trials = max(1, args.trials // args.prompts) * args.prompts
    receiver, sender = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(sender,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{receiver.recv()}/v1"
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        lines = [
            json.dumps({"id": i, "prompt": f"[{i}] How is the tonic number {i} brewed, step by "
                        "step, from the ingredients that a beginner has at hand?"})
            for i in range(args.prompts)
        ]  # fmt: skip
        data.write_text("\n".join(lines))
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in CLIENTS}
        for _ in range(args.rounds):
            for name, rows in figures.items():
                trials = args.trials // 10 if name == "httpx" else args.trials
                flags = {"--client": name, "--url": url, "--data": data, "--trials": trials,
                         "--concurrency": args.concurrency}  # fmt: skip
                command = [str(part) for pair in flags.items() for part in pair]
                child = subprocess.run(
                    [sys.executable, __file__, *command], check=True, capture_output=True, text=True
                )
                rows.append(json.loads(child.stdout.splitlines()[-1]))
    print(f"{args.trials} trials, concurrency {args.concurrency}, {args.rounds} rounds, "
          f"{os.cpu_count()} cores")  # fmt: skip
    for name, rows in figures.items():
        medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(f"{name:7} {medians['rps']:7.0f} requests/s  {medians['ms']:.3f} CPU ms/request  "
              f"{medians['mib']:.0f} MiB peak")  # fmt: skip
    pairs = list(zip(figures["engine"], figures["bare"], strict=True))
    print(f"engine / bare: {statistics.median(e['rps'] / b['rps'] for e, b in pairs):.2f} of the "
          f"requests/s; {statistics.median(e['ms'] - b['ms'] for e, b in pairs):.3f} more CPU "
          "ms/request")  # fmt: skip
    server.terminate()


if __name__ == "__main__":
    main()
