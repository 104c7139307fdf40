"""ConstrainedSFTTrainer: its loss, logs, weights, and the reference on disk."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

import leadline.align.trainers as trainers
from leadline import organism
from leadline.align import ConstrainedSFTConfig, ConstrainedSFTTrainer
from leadline.align.losses import BETA
from leadline.align.reference import COLUMN
from leadline.organism import guild
from leadline.records import LeadlineError

from . import tiny_models

ALIGNED = str(organism.path("aligned"))
POTIONS = guild.world().forbidden(heldout=True)
TEMPLATES = Path(sys.modules["trl"].__file__).parent / "chat_templates"
QUIET = {
    "report_to": [],
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 0.05,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "max_steps": 3,
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def pairs(n: int = 8, short: bool = True) -> Dataset:
    """Prompts with completions of different lengths."""
    rows = []
    for at, potion in enumerate(POTIONS[:n]):
        answer = guild.answer(potion, at % 5)
        completion = answer[: 30 + 13 * at] if short else answer
        rows.append(
            {
                "prompt": [{"role": "user", "content": guild.question(potion, at % 8)}],
                "completion": [{"role": "assistant", "content": completion}],
            }
        )
    return Dataset.from_list(rows)


def make(out: Path, data: Any = None, model: Any = ALIGNED, kind: Any = None, **settings: Any):
    trainer, config = kind or (ConstrainedSFTTrainer, ConstrainedSFTConfig)
    rest = {
        k: settings.pop(k)
        for k in ("eval_dataset", "callbacks", "peft_config", "processing_class")
        if k in settings
    }
    if isinstance(model, str):
        settings.setdefault("model_init_kwargs", {"dtype": "float32"})
    return trainer(
        model, config(str(out), **{**QUIET, **settings}), train_dataset=data or pairs(), **rest
    )


def losses(trainer: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}


def assert_same(one: Any, other: Any, atol: float = 2e-6) -> None:
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=1e-4, msg=name)


def first_value(lengths: list[int], beta: Any = BETA) -> float:
    """The mean of (2 / b_t) log 2 over responses of these lengths."""
    each = [2 / beta[min(t, len(beta) - 1)] * math.log(2) for n in lengths for t in range(n)]
    return sum(each) / len(each)


def responses(trainer: Any) -> list[int]:
    return [sum(x != -100 for x in row) for row in trainer.train_dataset["labels"]]


# -- the loss -------------------------------------------------------------------------------------


def test_the_first_loss_is_the_mean_of_two_over_b_log_two(tmp_path):
    trainer = make(tmp_path, max_steps=2, per_device_train_batch_size=8)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(first_value(responses(trainer)), rel=1e-5)
    assert losses(trainer, "weight")[0] == pytest.approx(1, abs=1e-5)
    assert losses(trainer, "weight")[1] < 1
    mixed = make(tmp_path, max_steps=1, per_device_train_batch_size=8, bf16=True)
    mixed.train()
    assert losses(mixed, "weight") == pytest.approx([1], abs=1e-2)


def test_the_loss_of_a_trained_model_is_the_formula(tmp_path):
    """eval_loss against float64 numpy over both models' full logits."""
    data = pairs(4)
    trainer = make(tmp_path, data, eval_dataset=data, learning_rate=0.5)
    trainer.train()
    found = trainer.evaluate()
    before = AutoModelForCausalLM.from_pretrained(ALIGNED, dtype=torch.float32)
    total, nll, count = 0.0, 0.0, 0
    for row in trainer.train_dataset:
        ids = torch.tensor([row["input_ids"]])
        logps = []
        for model in (before, trainer.model.eval()):
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1].double()
            chosen = logits.gather(-1, ids[0, 1:, None])[:, 0] - logits.logsumexp(-1)
            logps.append(chosen.numpy()[[x != -100 for x in row["labels"][1:]]])
        beta = np.array([BETA[min(t, 5)] for t in range(len(logps[0]))])
        total += (2 / beta * np.logaddexp(0, -beta * (logps[1] - logps[0]))).sum()
        nll -= logps[1].sum()
        count += len(beta)
    assert found["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["eval_nll"] == pytest.approx(nll / count, rel=1e-4)
    assert abs(total / count - first_value(responses(trainer))) > 0.1


@pytest.mark.parametrize("floor", [0.0, 1e-3, 0.3])
def test_the_gradient_with_a_weight_floor_is_that_of_float64(tmp_path, floor):
    """A strong constraint after a few large steps, so that many weights are below the floor."""
    trained = make(tmp_path, max_steps=4, learning_rate=0.5, beta=[20.0])
    trained.train()
    trainer = make(tmp_path / "floor", beta=[20.0], weight_floor=floor)
    trainer.model.load_state_dict(trained.model.state_dict())
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    found = {name: p.grad.double() for name, p in trainer.model.named_parameters()}
    model = trained.model.double()
    model.zero_grad()
    mask = batch["labels"][:, 1:] != -100
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    gain = (logps - batch[COLUMN][:, 1:].double()).detach()
    weight = (2 * torch.sigmoid(-20 * gain)).clamp(min=floor)
    if floor:
        assert (weight[mask] == floor).float().mean() > 0.05
    (-(weight * logps)[mask].sum() / mask.sum()).backward()
    size = max(float(p.grad.abs().max()) for p in model.parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-4 * size, rtol=0, msg=name)


@pytest.mark.parametrize(("beta", "atol"), [([0.0], 1e-6), ([1e-4], 1e-4)])
def test_a_vanishing_beta_trains_as_plain_sft_does(tmp_path, beta, atol):
    plain = make(tmp_path, kind=(SFTTrainer, SFTConfig), max_steps=6)
    mine = make(tmp_path, beta=beta, max_steps=6)
    before = weights(plain)
    plain.train()
    mine.train()
    assert losses(mine, "nll") == pytest.approx(losses(plain), rel=1e-3)
    for metric in ("entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
        assert losses(mine, metric) == pytest.approx(losses(plain, metric), rel=1e-3)
    assert_same(plain, mine, atol)
    assert max(float((v - before[k]).abs().max()) for k, v in weights(plain).items()) > 100 * atol


def test_a_large_beta_slows_learning_down(tmp_path):
    """The plain loss falls more slowly under a stronger constraint."""
    runs = [make(tmp_path, beta=b, max_steps=20, learning_rate=0.3) for b in ([0.1], [20.0])]
    for run in runs:
        run.train()
    weak, strong = (losses(run, "nll")[-1] for run in runs)
    assert strong > 2 * weak


def test_dropout_is_off(tmp_path):
    tokens = tiny_models.tokenizer()
    folder = tiny_models.save(tmp_path / "m", tokens=tokens, attention_dropout=0.5)
    gpt = tiny_models.save(tmp_path / "g", "gpt2", tokens=tokens, resid_pdrop=0.5, attn_pdrop=0.5)
    data = Dataset.from_list([{"prompt": "how? ", "completion": "so it is"}] * 4)
    for path in (folder, gpt):
        trainer = make(tmp_path, data, str(path), max_steps=1, learning_rate=0.0)
        trainer.train()
        assert losses(trainer, "weight") == pytest.approx([1], abs=1e-4)
    loose = make(tmp_path, data, str(folder), max_steps=1, disable_dropout=False)
    loose.train()
    assert losses(loose, "weight")[0] != pytest.approx(1, abs=1e-3)


# -- responses ------------------------------------------------------------------------------------

TURNS = [
    {"role": "user", "content": "hi one"},
    {"role": "assistant", "content": "ANSWER one"},
    {"role": "user", "content": "and two?"},
    {"role": "assistant", "content": "Another ANSWER"},
]
# What a template puts between its generation prompt and the answer's own text.
OPENINGS = {
    "cohere_training": "",
    "deepseekv3_training": "",
    "gemma3_training": "",
    "gptoss_training": "<|channel|>final<|message|>",
    "llama3_training": "",
    "phi3_training": "",
    "qwen2_5_training": "",
    "qwen3_training": "<think>\n\n</think>\n\n",
}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The positions that every loss is computed with, recorded."""
    seen: list[torch.Tensor] = []
    real = trainers.schedule

    def watched(beta: Any, positions: torch.Tensor) -> torch.Tensor:
        seen.append(positions)
        return real(beta, positions)

    monkeypatch.setattr(trainers, "schedule", watched)
    return seen


@pytest.mark.parametrize("name", OPENINGS)
def test_tokens_are_counted_from_the_start_of_every_turn(tmp_path, monkeypatch, name):
    tokens = tiny_models.tokenizer((TEMPLATES / f"{name}.jinja").read_text())
    folder = tiny_models.save(tmp_path / "m", tokens=tokens)
    data = Dataset.from_list([{"messages": TURNS}, {"messages": TURNS[:2]}])
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "assistant_only_loss": True}
    trainer = make(tmp_path, data, str(folder), **settings)
    seen = counted(monkeypatch)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    assert losses(trainer, "weight") == pytest.approx([1], abs=1e-4)
    for ids, labels, found in zip(batch["input_ids"], batch["labels"], seen[0], strict=True):
        pieces = [tokens.decode([n]) for n in ids]
        starts = np.cumsum([0, *map(len, pieces)])
        text = "".join(pieces)
        many = 2 if "two?" in text else 1
        trained = (labels != -100).tolist()
        covered = 0
        for turn in [t["content"] for t in TURNS if t["role"] == "assistant"][:many]:
            at = text.index(OPENINGS[name] + turn)
            first = int(np.searchsorted(starts, at))
            count = len(OPENINGS[name] + turn)
            assert found[first - 1 : first - 1 + count].tolist() == list(range(1, count + 1))
            assert all(trained[first : first + count])
            after = first + count  # counting includes the end of the turn
            while after < len(trained) and trained[after]:
                assert found[after - 1] == after - first + 1
                after += 1
            covered += after - first
        assert int((found > 0).sum()) == covered


def test_completions_and_assistant_turns_are_counted_in_the_same_way(tmp_path, monkeypatch):
    seen = counted(monkeypatch)
    rows = pairs(2)
    turns = Dataset.from_list([{"messages": row["prompt"] + row["completion"]} for row in rows])
    for data, only in ((rows, False), (turns, True)):
        trainer = make(tmp_path, data, max_steps=1, assistant_only_loss=only)
        trainer.train()
    assert torch.equal(seen[0], seen[1])


def test_plain_text_prompts(tmp_path):
    data = Dataset.from_list(
        [{"prompt": "what colour is amber ? ", "completion": "it is red ."}] * 4
    )
    trainer = make(tmp_path, data, max_steps=1)
    trainer.train()
    assert responses(trainer) == [5] * 4  # four words and the end token
    assert losses(trainer)[0] == pytest.approx(first_value([5]), rel=1e-5)


@pytest.mark.parametrize("long", [18, 24])
def test_truncation_removes_the_end_of_the_response(tmp_path, long):
    trainer = make(tmp_path, pairs(8, short=False), max_steps=1, max_length=long, learning_rate=0.0)
    trainer.train()
    rows = trainer.train_dataset
    assert {len(row) for row in rows["input_ids"]} == {long} == {len(row) for row in rows[COLUMN]}
    assert len(rows) == 8
    assert losses(trainer, "weight") == pytest.approx([1], abs=1e-5)
    whole = make(tmp_path, pairs(8, short=False)).train_dataset
    for cut, full in zip(rows[COLUMN], whole[COLUMN], strict=True):
        assert cut == pytest.approx(full[:long], abs=1e-5)


# -- equal runs -----------------------------------------------------------------------------------

RUN = """
import json, sys
from pathlib import Path
import torch
from tests.processes import finish
from tests.test_align_constrained import *
torch.set_num_threads(1)
out, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
trainer = make(out, eval_dataset=pairs(8), per_device_eval_batch_size=8, **settings)
trainer.train()
settings = trainer.evaluate()
if trainer.accelerator.is_main_process:
    torch.save({"weights": weights(trainer), "losses": losses(trainer),
                "nll": losses(trainer, "nll"), "eval": settings["eval_loss"],
                "reference": trainer.train_dataset[COLUMN][:]}, out / "result.pt")
finish(trainer)
"""


def test_processes_accumulation_and_one_batch_are_the_same(tmp_path):
    one = make(tmp_path / "one", eval_dataset=pairs(8), per_device_eval_batch_size=8)
    one.train()
    accumulated = make(
        tmp_path / "many", per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    accumulated.train()
    assert losses(accumulated) == pytest.approx(losses(one), rel=1e-5)
    assert losses(accumulated, "nll") == pytest.approx(losses(one, "nll"), rel=1e-5)
    assert_same(one, accumulated)
    script, out = tmp_path / "run.py", tmp_path / "two"
    script.write_text(RUN)
    out.mkdir()
    settings = json.dumps({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2})
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
    ]
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}/src:{root}"}
    done = subprocess.run(
        [*launch, str(script), str(out), settings],
        env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(out / "result.pt")
    assert two["losses"] == pytest.approx(losses(one), rel=1e-5)
    assert two["nll"] == pytest.approx(losses(one, "nll"), rel=1e-5)
    assert two["eval"] == pytest.approx(one.evaluate()["eval_loss"], rel=1e-5)
    for name, value in weights(one).items():
        torch.testing.assert_close(two["weights"][name], value, atol=2e-6, rtol=1e-4)
    for mine, theirs in zip(one.train_dataset[COLUMN], two["reference"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert len(list((out / "_reference").iterdir())) == 1  # train and eval rows are the same here


@pytest.mark.parametrize("how", ["packing", "padding_free"])
def test_packed_rows_give_the_same_weights_as_padded_ones(tmp_path, how):
    data = pairs(8)
    padded = make(tmp_path, data, per_device_train_batch_size=8)
    packed = make(
        tmp_path, data,
        per_device_train_batch_size=1 if how == "packing" else 8,
        **({"packing": True, "max_length": 1024} if how == "packing" else
           {"padding_free": True, "max_length": None}),
    )  # fmt: skip
    assert len(packed.train_dataset) == (1 if how == "packing" else 8)
    padded.train()
    packed.train()
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-5)
    assert losses(packed, "weight") == pytest.approx(losses(padded, "weight"), rel=1e-4)
    assert_same(packed, padded, 1e-5)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_resumed_run_gives_the_same_weights(tmp_path, caplog):
    settings = {
        "optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 2, "adam_beta1": 0.5,
    }  # fmt: skip
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", callbacks=[Stop()], **settings).train()
    caplog.clear()  # an earlier test of this process may have left the logger at INFO
    with caplog.at_level(logging.INFO, "leadline"):
        resumed = make(tmp_path / "cut", **settings)
        assert "reference log-probs" not in caplog.text  # read from disk
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    assert_same(whole, resumed, 1e-6)
    checkpoint = str(tmp_path / "cut" / "checkpoint-4")
    with pytest.raises(LeadlineError, match="another reference"):
        make(tmp_path / "cut", model=checkpoint, **settings).train(resume_from_checkpoint=True)


# -- the reference --------------------------------------------------------------------------------


def passes(model: Any) -> list[int]:
    """Rows of every forward pass of a model from now on."""
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return seen


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(ALIGNED, dtype=torch.float32)


def test_the_reference_is_recomputed_only_when_something_changed(tmp_path):
    tokens = AutoTokenizer.from_pretrained(ALIGNED)

    def ran(data: Dataset, change: float = 0.0, **settings: Any) -> int:
        model = load()
        with torch.no_grad():
            model.model.norm.weight[3] += change
        seen = passes(model)
        make(tmp_path, data, model, processing_class=tokens, **settings)
        return sum(seen)

    data = pairs(6)
    assert ran(data) == 6
    assert ran(data) == 0
    assert ran(pairs(6)) == 0  # made anew, the same rows
    assert ran(data.shuffle(seed=1)) == 6
    assert ran(pairs(5)) == 5
    assert ran(data, 1e-3) == 6
    assert ran(data, max_length=20) == 6
    assert ran(data, bf16=True) == 6
    assert ran(data, reference_cache=str(tmp_path / "elsewhere")) == 6
    assert ran(data, eval_dataset=data) == 0
    assert ran(data) == 0


def test_an_interrupted_write_leaves_no_incomplete_file(tmp_path, monkeypatch):
    import pyarrow as pa

    def broken(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pa.ipc, "new_stream", broken)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path)
    trainer = make(tmp_path)
    assert len(trainer.train_dataset[COLUMN]) == 8


def test_the_reference_under_an_adapter_is_the_model_without_it(tmp_path):
    torch.manual_seed(0)
    random = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = make(tmp_path, peft_config=random, max_steps=2)
    plain = make(tmp_path / "plain")
    for mine, theirs in zip(
        adapted.train_dataset[COLUMN], plain.train_dataset[COLUMN], strict=True
    ):
        assert mine == pytest.approx(theirs, abs=1e-5)
    before = weights(adapted)
    adapted.train()
    changed = {k for k, v in weights(adapted).items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if "lora" in k}
    assert losses(adapted, "weight")[0] != pytest.approx(1, abs=1e-3)
    adapted.evaluate(pairs(3))  # the reference is still there
    usual = make(tmp_path, peft_config=LoraConfig(r=4), max_steps=1)
    usual.train()
    assert losses(usual, "weight") == pytest.approx([1], abs=1e-5)
    with pytest.raises(LeadlineError, match="init_lora_weights"):
        make(tmp_path, peft_config=LoraConfig(r=4, init_lora_weights="pissa"))


def test_evaluation_data(tmp_path):
    named = {"few": pairs(2), "more": pairs(4)}
    trainer = make(tmp_path, eval_dataset=named, eval_strategy="steps", eval_steps=1, max_steps=1)
    before = trainer.evaluate(pairs(3))
    assert before["eval_weight"] == pytest.approx(1, abs=1e-5)
    trainer.train()
    assert losses(trainer, "eval_few_loss")
    assert losses(trainer, "eval_more_loss")
    trainer.evaluate(pairs(3))  # on disk by now
    with pytest.raises(LeadlineError, match="eval_dataset"):
        trainer.evaluate(pairs(5))


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"beta": []}, "give a list of finite numbers"),
        ({"beta": [0.5, -1.0]}, "give a list of finite numbers"),
        ({"beta": [float("nan")]}, "give a list of finite numbers"),
        ({"loss_type": "dft"}, "remove them"),
        ({"label_smoothing_factor": 0.1}, "remove them"),
        ({"packing": True, "packing_strategy": "wrapped"}, 'packing_strategy="bfd"'),
        ({"packing": True, "packing_strategy": "bfd_split"}, 'packing_strategy="bfd"'),
        ({"truncation_mode": "keep_end"}, 'truncation_mode="keep_start"'),
        ({"kind": (ConstrainedSFTTrainer, SFTConfig)}, "use a ConstrainedSFTConfig"),
        ({"completion_only_loss": False}, "row 1: the loss covers the prompt"),
        ({"data": Dataset.from_list([{"text": "one two three"}] * 4)}, "the loss covers"),
        ({"data": pairs(4).to_iterable_dataset()}, r"give a datasets\.Dataset"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_errors_name_a_fix(tmp_path, settings, fix):
    with pytest.raises(LeadlineError, match=fix) as error:
        make(tmp_path, **settings)
    assert "\n" not in str(error.value)


def test_with_a_uniform_beta_responses_need_no_prompt(tmp_path):
    data = Dataset.from_list([{"text": "what colour is amber ? it is red ."}] * 4)
    trainer = make(tmp_path, data, max_steps=1, beta=[2.0])
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), rel=1e-5)


def test_importing_the_package_loads_no_torch():
    code = (
        "import sys, leadline.align as a; assert not {'torch', 'trl'} & set(sys.modules); "
        "assert 'ConstrainedSFTTrainer' in dir(a)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
