"""Local weights: models of a few thousand random parameters, queried one by one and in batches."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from leadline.models.huggingface import HuggingFaceModel
from leadline.records import LeadlineError, Message, Request, Response, ResponsePrefix, Sampling

from . import tiny_models

T = TypeVar("T")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("wordy"), tokens=tiny_models.words())


def ask(text: str, *, prefix: ResponsePrefix | None = None, **sampling: Any) -> Request:
    return Request((Message("user", text),), prefix, Sampling(**{"max_tokens": 12, **sampling}))


def many(count: int, **sampling: Any) -> list[Request]:
    return [ask(f"w{n} " * (1 + 7 * n % 19), **sampling) for n in range(count)]


def use(folder: Path | str, work: Callable[[HuggingFaceModel], Awaitable[T]], **options: Any) -> T:
    async def main() -> T:
        model = HuggingFaceModel(folder, name="tiny", **options)
        await model.prepare(prefix=True)
        try:
            return await work(model)
        finally:
            await model.close()

    return asyncio.run(asyncio.wait_for(main(), 60))


async def together(model: HuggingFaceModel, requests: list[Request]) -> list[Response]:
    return await asyncio.gather(*map(model.respond, requests))


def without_time(response: Response) -> Response:
    return replace(response, seconds=0.0)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_its_batch(
    tmp_path: Path, kind: str, temperature: float
) -> None:
    requests = many(20, temperature=temperature, max_tokens=40)
    rows: list[int] = []

    async def work(model: HuggingFaceModel) -> tuple[list[Response], list[Response]]:
        watch(model, lambda ids: rows.append(len(ids)))
        return await together(model, requests), [await model.respond(r) for r in requests]

    batched, alone = use(tiny_models.save(tmp_path, kind), work, batch_size=8)
    assert list(map(without_time, batched)) == list(map(without_time, alone))
    assert len({r.answer for r in alone}) >= 4
    assert all(r.finish in ("stop", "length") and r.completion_tokens for r in alone)
    assert max(rows) == 8


def watch(model: HuggingFaceModel, see: Callable[[torch.Tensor], object]) -> None:
    """Call `see` with the token ids of each forward pass."""
    assert model._loaded is not None
    module = model._loaded[1].model

    def hook(module: Any, given: Any, named: Any) -> None:
        see(named["input_ids"])

    module.register_forward_pre_hook(hook, with_kwargs=True)


def test_a_prefix_is_continued(wordy: Path) -> None:
    """A model prefilled with the start of its own greedy answer generates the rest of it."""

    async def work(model: HuggingFaceModel) -> None:
        free = await model.respond(ask("w1 w2 w3"))
        words = free.answer.split()
        assert len(words) == free.completion_tokens == 12
        for k in (0, 1, 5, 11):
            start = ResponsePrefix(free.answer, tokens=k)
            rest = await model.respond(ask("w1 w2 w3", prefix=start, max_tokens=12 - k))
            assert rest.prefix.split() == words[:k]
            assert rest.answer.split() == words[k:]
            assert rest.prompt_tokens == free.prompt_tokens + k
            assert rest.completion_tokens == 12 - k

    use(wordy, work)


def test_the_model_stops_at_any_of_its_end_tokens(wordy: Path, tmp_path: Path) -> None:
    async def ask_one(model: HuggingFaceModel) -> Response:
        return await model.respond(ask("w1 w2 w3"))

    free = use(wordy, ask_one)
    fourth = free.answer.split()[3]
    first = free.answer.split().index(fourth)
    folder = shutil.copytree(wordy, tmp_path / "stops")
    tokens = tiny_models.words()
    ends = [tokens.convert_tokens_to_ids(fourth), tokens.eos_token_id]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    stopped = use(folder, ask_one)
    assert (free.finish, stopped.finish) == ("length", "stop")
    assert stopped.answer.split() == free.answer.split()[:first]
    assert stopped.completion_tokens == first + 1


def test_thoughts_are_split_from_answers(wordy: Path) -> None:
    async def work(model: HuggingFaceModel) -> list[Response]:
        prefixes = [
            ResponsePrefix("w7", "w4 w5"),
            ResponsePrefix("w7"),
            ResponsePrefix("", "w4", thought_open=True),
        ]
        return await together(model, [ask("w1", prefix=prefix) for prefix in prefixes])

    closed, plain, open_ = use(wordy, work, reasoning="think")
    assert closed.prefix.split() == ["<think>", "w4", "w5", "</think>", "w7"]
    assert plain.prefix.split() == ["<think>", "</think>", "w7"]
    assert open_.prefix.split() == ["<think>", "w4"]
    assert closed.thought == plain.thought == ""
    assert closed.answer
    assert open_.thought


def test_prompt_and_answer_must_fit_the_context(tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path, "gpt2", tiny_models.words(), n_positions=32)

    async def work(model: HuggingFaceModel) -> list[Response]:
        return await together(model, [ask("w1 " * n, max_tokens=100) for n in (20, 26, 27, 500)])

    room, last, full, far = use(folder, work)
    assert room.completion_tokens == 32 - room.prompt_tokens
    assert last.completion_tokens == 1
    assert room.finish == last.finish == "length"
    for response, size in ((full, 32), (far, 505)):
        assert response.failed
        assert response.error == f"prompt of {size} tokens does not fit the model's context of 32"


def test_a_batch_that_runs_out_of_memory_is_halved(wordy: Path) -> None:
    requests = many(16)
    rows: list[int] = []

    def full(ids: torch.Tensor) -> None:
        rows.append(len(ids))
        if len(ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    async def work(model: HuggingFaceModel) -> tuple[list[Response], list[Response]]:
        free = await together(model, requests)
        watch(model, full)
        return free, await together(model, requests + requests)

    free, tight = use(wordy, work)
    assert list(map(without_time, tight)) == list(map(without_time, free + free))
    assert sum(n > 3 for n in rows) < 8  # the limit is kept for later batches


def test_a_failing_request_does_not_fail_its_batch(wordy: Path) -> None:
    bad = tiny_models.words().convert_tokens_to_ids("w66")

    def fail(ids: torch.Tensor) -> None:
        if ids.shape[1] > 1 and (ids == bad).any():
            raise RuntimeError("no kernel\nfor this token")

    async def work(model: HuggingFaceModel) -> list[Response]:
        watch(model, fail)
        return await together(model, [*many(9), ask("w66"), ask("\ud800")])

    *fine, failed, surrogate = use(wordy, work)
    assert not any(r.failed for r in fine)
    assert failed.error == "RuntimeError: no kernel for this token"
    assert surrogate.failed
    assert "\n" not in surrogate.error


def test_closing_answers_queued_requests_with_an_error(wordy: Path) -> None:
    async def main() -> list[Response]:
        model = HuggingFaceModel(wordy, name="tiny", batch_size=2)
        await model.prepare(prefix=False)
        tasks = [asyncio.create_task(model.respond(r)) for r in many(40, max_tokens=400)]
        await asyncio.sleep(0.1)
        await model.close()
        await model.close()
        return [*await asyncio.gather(*tasks), await model.respond(ask("w1"))]

    began = time.perf_counter()
    responses = asyncio.run(asyncio.wait_for(main(), 20))
    assert Counter(r.finish for r in responses)["error"] >= 35
    assert time.perf_counter() - began < 10


def test_a_cancelled_request_does_not_affect_the_others(wordy: Path) -> None:
    rows: list[int] = []

    async def work(model: HuggingFaceModel) -> list[Response]:
        watch(model, lambda ids: rows.append(len(ids) if ids.shape[1] > 1 else 0))
        tasks = [asyncio.create_task(model.respond(r)) for r in many(6)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[3].cancel()
        return await asyncio.gather(*(task for task in tasks if task not in (tasks[0], tasks[3])))

    assert [r.finish for r in use(wordy, work, batch_size=2)] == ["length"] * 4
    assert sum(rows) == 4  # nothing is generated for the cancelled ones


def test_a_model_can_be_used_in_several_event_loops(wordy: Path) -> None:
    model = HuggingFaceModel(wordy, name="tiny")
    asyncio.run(model.prepare(prefix=False))
    first, again = (asyncio.run(model.respond(ask("w1 w2"))) for _ in range(2))
    assert without_time(first) == without_time(again)
    asyncio.run(model.close())


def test_the_event_loop_is_not_blocked(wordy: Path) -> None:
    async def work(model: HuggingFaceModel) -> int:
        task = asyncio.create_task(model.respond(ask("w1", max_tokens=400)))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert use(wordy, work) >= 5


def test_sampling_follows_the_distribution(wordy: Path) -> None:
    """2,000 first words against the model's own probabilities at temperature 1.5."""

    async def work(model: HuggingFaceModel) -> tuple[list[Response], Any]:
        request = ask("w1 w2", temperature=1.5, max_tokens=1)
        drawn = await together(model, [replace(request, sample=n) for n in range(2000)])
        assert model._loaded is not None
        template, weights = model._loaded
        with torch.inference_mode():
            logits = weights.model(torch.tensor([template.render(request).ids])).logits
        return drawn, (logits[0, -1] / 1.5).softmax(-1)

    drawn, chances = use(wordy, work, batch_size=500)
    tokens = tiny_models.words()
    counts = Counter(r.answer for r in drawn)
    distance = sum(
        abs(counts[tokens.decode([n])] / 2000 - float(chance))
        for n, chance in enumerate(chances)
        if tokens.decode([n]).startswith("w")
    )
    assert len(counts) > 20
    assert distance / 2 < 0.1  # 100 words, 2,000 draws: about 0.07 is expected


def test_samples_are_reproducible_and_differ(wordy: Path) -> None:
    hot = ask("w1 w2", temperature=2.0)

    async def work(model: HuggingFaceModel) -> list[Response]:
        variants = [
            hot,
            hot,
            replace(hot, sample=1),
            replace(hot, sampling=replace(hot.sampling, seed=5)),
            replace(hot, sampling=replace(hot.sampling, top_k=1)),
            replace(hot, sampling=replace(hot.sampling, top_p=1e-6)),
            ask("w1 w2"),
        ]
        return await together(model, variants)

    first, again, other_sample, other_seed, top_k, top_p, greedy = (
        r.answer for r in use(wordy, work)
    )
    assert first == again
    assert len({first, other_sample, other_seed, greedy}) == 4
    assert top_k == top_p == greedy


def test_the_generation_config_gives_the_default_settings(wordy: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(wordy, tmp_path / "own")
    own = {"do_sample": True, "temperature": 0.6, "top_k": 1, "num_beams": 3, "max_length": 20}
    (folder / "generation_config.json").write_text(json.dumps(own))

    async def work(model: HuggingFaceModel) -> list[Response]:
        return await together(model, [ask("w1 w2"), ask("w1 w2", temperature=2.0)])

    greedy, narrow = use(folder, work)
    assert greedy.answer == narrow.answer == use(wordy, work)[0].answer
    assert use(wordy, work)[1].answer != greedy.answer


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_models.save(tmp_path, tokens=tiny_models.words())
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 20}
    (folder / "generation_config.json").write_text(json.dumps(own))
    capfd.readouterr()
    use(folder, lambda model: together(model, [*many(3), *many(3, temperature=1.0)]))
    assert capfd.readouterr() == ("", "")


def test_identity_changes_with_the_content(wordy: Path, tmp_path: Path) -> None:
    def identity(folder: Path, **options: Any) -> dict[str, Any]:
        return dict(HuggingFaceModel(folder, name="tiny", **options).identity)

    own = identity(wordy)
    assert own["interface"] == "local"
    moved = shutil.copytree(wordy, tmp_path / "elsewhere" / wordy.name)
    (moved / "README.md").write_text("about it")
    assert identity(moved) == own
    assert identity(wordy, reasoning="think") != own
    assert identity(wordy, chat_template_kwargs={"enable_thinking": False}) != own
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = identity(moved)["revision"]
    assert changed != own["revision"]
    (moved / "chat_template.jinja").write_text("another")
    assert identity(moved)["revision"] not in (changed, own["revision"])


def test_a_large_file_is_hashed_in_blocks(wordy: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(wordy, tmp_path / "large")
    weights = folder / "model.safetensors"

    def revision(size: int, *at: int) -> Any:
        with weights.open("wb") as stream:
            stream.truncate(size)  # sparse: takes no disk
            for place in at:
                stream.seek(place)
                stream.write(b"x")
        return HuggingFaceModel(folder, name="tiny").identity["revision"]

    size = 2**31
    revisions = [revision(size), revision(size, 0), revision(size, size - 1), revision(size + 1)]
    assert len(set(revisions)) == 4


def test_identity_needs_no_torch(wordy: Path) -> None:
    script = f"""
import sys
from leadline.models.huggingface import HuggingFaceModel
print(HuggingFaceModel({str(wordy)!r}, name="tiny").identity["revision"])
assert not {{"torch", "transformers", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    own = HuggingFaceModel(wordy, name="tiny").identity["revision"]
    assert (done.stdout, done.stderr) == (f"{own}\n", "")


def spoil(folder: Path, how: str) -> None:
    if how == "no folder":
        shutil.rmtree(folder)
    elif how == "a file":
        shutil.rmtree(folder)
        folder.write_text("{}")
    elif how == "no model":
        (folder / "config.json").unlink()
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "pickled":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif how == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:2000])
    elif how == "other":
        config = json.loads((folder / "config.json").read_text())
        config["num_hidden_layers"] = 3
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "unknown":
        (folder / "config.json").write_text('{"model_type": "crystal-ball"}')
    elif how == "no template":
        (folder / "chat_template.jinja").unlink()
    elif how == "no tokenizer":
        for file in folder.glob("*token*"):
            file.unlink()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("no folder", "there is no such folder"),
        ("a file", "it is a file"),
        ("no model", "no config.json"),
        ("no weights", "it has no weights"),
        ("pickled", "its weights are pickled"),
        ("truncated", "does not load"),
        ("other", "its weights lack 9 tensors"),
        ("unknown", "crystal-ball"),
        ("no template", "chat_template:"),
        ("no tokenizer", "no tokenizer"),
    ],
)
def test_an_invalid_model_folder_is_a_one_line_error(
    wordy: Path, tmp_path: Path, how: str, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(wordy, tmp_path / "spoiled")
    spoil(folder, how)
    with pytest.raises(LeadlineError) as caught:
        use(folder, lambda model: model.respond(ask("w1")))
    message = str(caught.value)
    assert why in message
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) - len(str(folder)) < 350
    assert capfd.readouterr() == ("", "")


def test_an_unknown_device_or_dtype_is_a_one_line_error(wordy: Path) -> None:
    for options in ({"device": "abacus"}, {"dtype": "float7"}):
        with pytest.raises(LeadlineError, match="does not load") as caught:
            use(wordy, lambda model: model.respond(ask("w1")), **options)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, when it wraps a model
def test_an_adapter_loads_onto_its_base(wordy: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = shutil.copytree(wordy, tmp_path / "base")
    module = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(module, peft.LoraConfig(r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    request = ask("w1 w2")
    answers = [
        use(folder, lambda model: model.respond(request)).answer
        for folder in (base, tmp_path / "adapter")
    ]
    ids = tiny_models.words()(HEADER.format("w1 w2"), add_special_tokens=False)["input_ids"]
    out = adapted.eval().generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert answers[1] == tiny_models.words().decode(out[0, len(ids) :], skip_special_tokens=True)
    assert answers[0] != answers[1]
    before = HuggingFaceModel(tmp_path / "adapter", name="tiny").identity["revision"]
    (base / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert HuggingFaceModel(tmp_path / "adapter", name="tiny").identity["revision"] != before


HEADER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_a_hub_id_is_pinned_to_the_commit_in_the_cache(
    wordy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--guild--apprentice"
    shutil.copytree(wordy, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)

    async def work(model: HuggingFaceModel) -> tuple[dict[str, Any], Response]:
        return dict(model.identity), await model.respond(ask("w1 w2"))

    identity, response = use("guild/apprentice", work)
    assert (identity["model"], identity["revision"]) == ("guild/apprentice", commit)
    assert without_time(response) == without_time(use(wordy, work)[1])
    for unknown in ({"path": "guild/nobody"}, {"path": "guild/apprentice", "revision": "v2"}):
        with pytest.raises(LeadlineError, match="neither in the cache nor at the hub") as caught:
            _ = HuggingFaceModel(**unknown, name="hub").identity
        assert "\n" not in str(caught.value)
