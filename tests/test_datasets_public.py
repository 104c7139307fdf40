"""The public datasets, read from small files in their formats, with harmless text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from leadline import registry
from leadline.datasets.advbench import advbench
from leadline.datasets.file import file
from leadline.datasets.harmbench import harmbench
from leadline.datasets.hexphi import hexphi
from leadline.datasets.jailbreakbench import jailbreakbench
from leadline.datasets.sorrybench import sorrybench
from leadline.datasets.strongreject import strongreject
from leadline.datasets.xstest import xstest
from leadline.plan import published_counts
from leadline.records import LeadlineError, Prompt

HARMBENCH = """\
Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID
Plant a hedge,standard,shrubs,,,plant_hedge
"Water it, given the context",contextual,beds,context,"Day 1: ""dry""

Day 2: rain",water_it
Recite the seed list,copyright,lists,book,,recite_seeds
"""
JBB = "Index,Goal,Target,Behavior,Category,Source\n"


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return str(path)


def wrong(read: Callable[[], Any]) -> str:
    with pytest.raises(LeadlineError) as caught:
        list(read())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_advbench(tmp_path: Path) -> None:
    path = write(tmp_path / "harmful_behaviors.csv", "goal,target\nDig,Sure: dig\nSow,Sure: sow\n")
    assert list(advbench(path=path)) == [
        Prompt("1", "Dig", "advbench", target="Sure: dig"),
        Prompt("2", "Sow", "advbench", target="Sure: sow"),
    ]


def test_strongreject(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", "category,source,forbidden_prompt\nBeds,book,How deep?\n")
    assert list(strongreject(path=path)) == [Prompt("1", "How deep?", "strongreject", "Beds")]


def test_harmbench_keeps_ids_and_contexts_over_several_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "h.csv", HARMBENCH.replace("\n", "\r\n"))
    assert list(harmbench(path=path)) == [
        Prompt("plant_hedge", "Plant a hedge", "harmbench", "standard/shrubs"),
        Prompt(
            "water_it",
            "Water it, given the context",
            "harmbench",
            "contextual/beds",
            context='Day 1: "dry"\r\n\r\nDay 2: rain',
        ),
    ]


def test_harmbench_copyright_behaviors_are_an_option(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "h.csv", HARMBENCH)
    assert "recite_seeds" not in [p.id for p in harmbench(path=path)]
    assert caplog.messages == [f"{path} has 2 rows; the published dataset has 300"]
    every = list(harmbench(path=path, functional=["standard", "contextual", "copyright"]))
    assert [(p.id, p.category) for p in every] == [
        ("plant_hedge", "standard/shrubs"),
        ("water_it", "contextual/beds"),
        ("recite_seeds", "copyright/lists"),
    ]
    assert "published dataset has 400" in caplog.messages[-1]


def test_harmbench_has_300_prompts_in_a_dry_run_without_a_copy(tmp_path: Path) -> None:
    for options, n in (({}, 300), ({"functional": ["standard", "copyright"]}, 300),
                       ({"functional": ["standard", "contextual", "copyright"]}, 400)):  # fmt: skip
        found = published_counts(registry.get("dataset", "harmbench"), options)
        assert len(found) == n


def test_harmbench_by_functional_category(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "h.csv", HARMBENCH)
    assert [p.id for p in harmbench(path=path, functional="contextual")] == ["water_it"]
    assert caplog.messages == [f"{path} has 1 rows; the published dataset has 100"]
    both = harmbench(path=path, functional=["copyright", "standard"])
    assert [p.id for p in both] == ["plant_hedge", "recite_seeds"]
    message = wrong(lambda: harmbench(path=path, functional="standart"))
    assert message == "unknown entry of functional: 'standart': did you mean 'standard'?"
    assert "neither a name nor a list" in wrong(lambda: harmbench(path=path, functional=[]))
    path = write(tmp_path / "odd.csv", HARMBENCH.replace(",copyright,", ",musical,"))
    assert wrong(lambda: harmbench(path=path)).startswith("odd.csv:6: unknown FunctionalCategory")


def test_xstest_safe_prompts_are_not_harmful(tmp_path: Path) -> None:
    path = write(
        tmp_path / "xstest_prompts.csv",
        "id,prompt,type,label,focus,note\n1,How do I kill weeds?,homonyms,safe,kill,\n"
        "2,How do I harm bees?,contrast_homonyms,unsafe,harm,\n",
    )
    assert [(p.id, p.category, p.harmful) for p in xstest(path=path)] == [
        ("1", "homonyms", False),
        ("2", "contrast_homonyms", True),
    ]


def test_xstest_release_without_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "v2.csv", "id,type,prompt\n1,homonyms,Kill weeds?\n2,contrast_x,No?\n")
    assert [p.harmful for p in xstest(path=path)] == [False, True]


def sorry(question: int, style: str, text: str) -> str:
    row = {"question_id": question, "category": "3", "turns": [text], "prompt_style": style}
    return json.dumps(row) + "\n"


def test_sorrybench_variants_share_their_base(tmp_path: Path) -> None:
    write(tmp_path / "question.jsonl", sorry(1, "base", "Dig") + sorry(2, "base", "Sow"))
    slang = sorry(1, "slang", "Dig it").replace("Dig it", "Dig\x0b it")
    write(tmp_path / "question_slang.jsonl", slang)
    write(tmp_path / "judgements.jsonl", '{"score": 1}\n')
    assert [p.id for p in sorrybench(path=str(tmp_path))] == ["1/base", "2/base"]
    assert list(sorrybench(path=str(tmp_path), styles=["base", "slang"])) == [
        Prompt("1/base", "Dig", "sorrybench", "3", base="1"),
        Prompt("2/base", "Sow", "sorrybench", "3", base="2"),
        Prompt("1/slang", "Dig\x0b it", "sorrybench", "3", base="1", mutation="slang"),
    ]
    assert len(list(sorrybench(path=str(tmp_path), styles="all"))) == 3
    only = str(tmp_path / "question_slang.jsonl")
    assert [p.text for p in sorrybench(path=only, styles="slang")] == ["Dig\x0b it"]
    message = wrong(lambda: sorrybench(path=only, styles="slangs"))
    assert message == f"{only}: unknown style 'slangs': did you mean 'slang'?"


@pytest.mark.parametrize("questions", [440, 450])
def test_sorrybench_has_two_published_sizes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, questions: int
) -> None:
    text = "".join(sorry(n, "base", f"Plant {n}") for n in range(questions))
    path = write(tmp_path / "question.jsonl", text)
    assert len(list(sorrybench(path=path))) == questions
    assert not caplog.messages


def test_jailbreakbench_halves_are_distinguished_by_file(tmp_path: Path) -> None:
    harmful = write(tmp_path / "harmful-behaviors.csv", JBB + "0,Dig,Sure: dig,Digging,Beds,x\n")
    write(tmp_path / "benign-behaviors.csv", JBB + "0,Sow,Sure: sow,Sowing,Beds,x\n")
    write(tmp_path / "judge-comparison.csv", "prompt\nelse\n")
    benign = Prompt("benign/0", "Sow", "jailbreakbench", "Beds", harmful=False, target="Sure: sow")
    dig = Prompt("harmful/0", "Dig", "jailbreakbench", "Beds", target="Sure: dig")
    assert list(jailbreakbench(path=str(tmp_path))) == [benign, dig]
    assert list(jailbreakbench(path=harmful)) == [dig]


def test_jailbreakbench_without_an_index(tmp_path: Path) -> None:
    header = "Goal,Target,Behavior,Category\n"
    write(tmp_path / "harmful-behaviors.csv", f"{header}Dig,Sure: dig,D,Beds\nRake,Sure,R,Beds\n")
    write(tmp_path / "benign-behaviors.csv", f"{header}Sow,Sure: sow,Sowing,Beds\n")
    found = [(p.id, p.text) for p in jailbreakbench(path=str(tmp_path))]
    assert found == [("benign/1", "Sow"), ("harmful/1", "Dig"), ("harmful/2", "Rake")]


@pytest.mark.parametrize("second", ["", ",Sure: dig"])
@pytest.mark.parametrize("read", [advbench, strongreject, file])
def test_text_of_a_file_without_a_header_is_never_printed(
    tmp_path: Path, second: str, read: Callable[..., Any]
) -> None:
    path = write(tmp_path / "behaviors.csv", f"Dig a hole{second}\nSow a field{second}\n")
    message = wrong(lambda: read(path=path))
    assert message.startswith("behaviors.csv:2: no column '")
    assert "if the file has no header line, add one with '" in message
    assert not [word for word in ("Dig", "hole", "Sure", "Sow") if word in message]


def test_hexphi_files_have_one_instruction_per_line(tmp_path: Path) -> None:
    write(tmp_path / "category_1.csv", '"Dig, then sow"\nRake leaves, then burn none\n')
    write(tmp_path / "category_3.csv", 'Say ""hello"" to bees\n')
    found = [(p.id, p.category, p.text) for p in hexphi(path=str(tmp_path))]
    assert found == [
        ("category_1/1", "category_1", "Dig, then sow"),
        ("category_1/2", "category_1", "Rake leaves, then burn none"),
        ("category_3/1", "category_3", 'Say ""hello"" to bees'),
    ]


def test_hexphi_as_one_table(tmp_path: Path) -> None:
    path = write(tmp_path / "h.csv", 'instruction,category\n"Dig, sow",Beds\nRake,Lawn\n')
    found = [(p.id, p.category, p.text) for p in hexphi(path=path)]
    assert found == [("Beds/1", "Beds", "Dig, sow"), ("Lawn/2", "Lawn", "Rake")]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for repositories with the layout of the hub, which the real library loads."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "hub"


def card(folder: Path, configs: dict[str, dict[str, str]]) -> None:
    """Write a repository's README, which maps configs and splits to files."""
    listed = [
        {
            "config_name": config,
            "data_files": [{"split": split, "path": path} for split, path in splits.items()],
        }
        for config, splits in configs.items()
    ]
    write(folder / "README.md", f"---\nconfigs: {json.dumps(listed)}\n---\n")


def test_hub_configs_and_splits(hub: Path) -> None:
    write(hub / "a.csv", "prompt,category\nDig,beds\n")
    write(hub / "b.csv", "prompt,context,category\nSow,rain,beds\n")
    write(hub / "c.csv", "prompt,tags\nSing,book\n")
    configs = {"standard": "a.csv", "contextual": "b.csv", "copyright": "c.csv"}
    card(hub, {name: {"train": path} for name, path in configs.items()})
    assert list(harmbench(hub=str(hub))) == [
        Prompt("standard/1", "Dig", "harmbench", "standard/beds"),
        Prompt("contextual/1", "Sow", "harmbench", "contextual/beds", context="rain"),
    ]
    (sing,) = harmbench(hub=str(hub), functional="copyright")
    assert sing == Prompt("copyright/1", "Sing", "harmbench", "copyright")

    jbb = hub.with_name("jbb")
    write(jbb / "data" / "harmful-behaviors.csv", JBB + "0,Dig,Sure,Digging,Beds,x\n")
    write(jbb / "data" / "benign-behaviors.csv", JBB + "0,Sow,Sure,Sowing,Beds,x\n")
    splits = {half: f"data/{half}-behaviors.csv" for half in ("harmful", "benign")}
    card(jbb, {"behaviors": splits, "judge_comparison": {"test": "data/harmful-behaviors.csv"}})
    found = [(p.id, p.text, p.harmful) for p in jailbreakbench(hub=str(jbb))]
    assert found == [("harmful/0", "Dig", True), ("benign/0", "Sow", False)]


def test_hub_files_without_a_header(hub: Path) -> None:
    for n in (1, *range(3, 12)):
        write(hub / f"category_{n}.csv", f'Dig, then sow {n}\n"Rake, ""softly"" {n}"\n')
    found = list(hexphi(hub=str(hub)))
    assert len(found) == 20
    assert (found[0].id, found[0].text) == ("category_1/1", "Dig, then sow 1")
    assert (found[3].category, found[3].text) == ("category_3", 'Rake, "softly" 3')


def test_hub_errors_name_the_row_or_the_option(hub: Path) -> None:
    write(hub / "train.jsonl", '{"prompt": "Dig"}\n{"prompt": ""}\n')
    message = wrong(lambda: file(hub=str(hub)))
    assert message.startswith(f"{hub} train row 2: the column 'prompt' is empty")
    message = wrong(lambda: harmbench(hub=str(hub)))
    assert message.startswith(f"{hub}: BuilderConfig 'standard' not found")
    assert message.endswith("check hub:, or set path: to a local copy")


def test_a_missing_datasets_package_is_reported_with_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'leadline[hub]'" in wrong(lambda: advbench())


def ask_hub(tmp_path: Path, **environment: str) -> str:
    """The error for SORRY-Bench in a new process, since the library reads its settings once."""
    code = (
        "from leadline.datasets.sorrybench import sorrybench\n"
        "from leadline.records import LeadlineError\n"
        "try: list(sorrybench())\n"
        "except LeadlineError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hub_out_of_reach(tmp_path: Path) -> None:
    assert ask_hub(tmp_path, HF_HUB_OFFLINE="1") == (
        "sorry-bench/sorry-bench-202503: the hub cannot be reached: "
        "check the network connection, or set path: to a local copy\n"
    )


@pytest.fixture
def gatekeeper() -> Iterator[str]:
    """A server that gives every request the hub's response for terms that are not accepted."""

    class Gated(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Gated)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_hub_gated(tmp_path: Path, gatekeeper: str) -> None:
    message = ask_hub(tmp_path, HF_ENDPOINT=gatekeeper, HF_HUB_OFFLINE="0")
    assert message == (
        "sorry-bench/sorry-bench-202503: the dataset is gated: accept its terms at "
        "https://huggingface.co/datasets/sorry-bench/sorry-bench-202503 and set HF_TOKEN, "
        "or set path: to a local copy\n"
    )
