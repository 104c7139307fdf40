"""The plug-in registry, with third-party packages that pip installs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from leadline import LeadlineError, registry

PLUGIN = '''
from leadline.plugins import Prompt, Verdict, attack, dataset, judge

@attack("shouting", family="style", source="this test")
def shouting(prompt: Prompt, *, marks: int = 1) -> str:
    """The request in capitals."""
    return prompt.text.upper() + "!" * marks

@dataset("kitchen", source="this test", rows=1)
def kitchen(*, path=None):
    """One request about soup."""
    yield Prompt(id="1", text="How is soup made?", dataset="kitchen")

@judge("length", source="this test")
def length(*, least: int = 3):
    """Unsafe when long."""
    return lambda prompt, attempt, response: Verdict(unsafe=len(response.answer) >= least)
'''


def install(folder: Path, code: str) -> dict[str, str]:
    """Install a wheel with this code and an entry point into a folder. Returns an environment with
    that folder in PYTHONPATH."""
    info = "gardenplugin-1.0.dist-info"
    wheel = folder / "gardenplugin-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gardenplugin.py", code)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gardenplugin\n"
                                             "Version: 1.0\n")  # fmt: skip
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\n"
                                          "Root-Is-Purelib: true\nTag: py3-none-any\n")  # fmt: skip
        archive.writestr(f"{info}/entry_points.txt", "[leadline]\ngarden = gardenplugin\n")
        archive.writestr(f"{info}/RECORD", "")
    site = folder / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index",
         "--target", str(site), str(wheel)],
        check=True, capture_output=True,
    )  # fmt: skip
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def call(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `leadline` with these arguments."""
    command = [str(Path(sys.executable).parent / "leadline"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_third_party_package_adds_attacks_datasets_and_judges(tmp_path, server):
    environment = install(tmp_path, PLUGIN)
    for what, name in [("attacks", "shouting"), ("datasets", "kitchen"), ("judges", "length")]:
        listed = json.loads(call(environment, "list", what, "--json").stdout)
        assert name in [row["name"] for row in listed]
    study = tmp_path / "study.yaml"
    study.write_text(
        f"targets: [{{model: m, url: '{server.url}'}}]\ndatasets: [kitchen]\n"
        "attacks: [{shouting: {marks: 2}}]\njudges: [{length: {least: 5}}]\n"
    )
    out = tmp_path / "out"
    ran = call(environment, "run", str(study), "--out", str(out))
    assert ran.returncode == 0, ran.stderr
    assert list(server.asked) == ["HOW IS SOUP MADE?!!"]
    cells = json.loads((out / "summary.json").read_text())["cells"]
    assert (cells[0]["attack"], cells[0]["unsafe"]) == ("shouting(marks=2)", 1)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError"),
        ("raise RuntimeError('line one\\nline two')", "RuntimeError: line one line two"),
        ("from leadline.registry import attack\nattack('x', family=None, source='')(print)",
         "TypeError"),
        ("from leadline.registry import attack\nattack(5, family='x', source='')(lambda p: '')",
         "TypeError: attack 5: name must be a string"),
        ("from leadline.registry import judge\njudge('x', source='')(7)",
         "TypeError: judge 'x': 7 is not a function"),
    ],
)  # fmt: skip
def test_a_package_that_does_not_load_is_a_warning_that_names_it(tmp_path, code, error):
    environment = install(tmp_path, code)
    ran = call(environment, "list", "attacks", "--json")
    assert ran.returncode == 0
    assert ran.stderr.startswith(
        "leadline: the plug-in 'garden' (gardenplugin) does not load and is ignored: " + error
    ), ran.stderr
    assert ran.stderr.endswith("fix or uninstall the package gardenplugin\n")
    assert len(ran.stderr.splitlines()) == 1
    assert "base64" in [row["name"] for row in json.loads(ran.stdout)]


def test_of_two_plugins_of_one_name_the_first_stays(caplog):
    def other(prompt):
        return ""

    first = registry.get("attack", "direct")  # load the attacks first
    registry.attack("direct", family="x", source="x")(other)
    assert registry.get("attack", "direct") is first
    assert "the attack 'direct' is registered more than once" in caplog.text
    assert "leadline.attacks.baseline.direct is used" in caplog.text
    assert "other is ignored" in caplog.text


def test_two_plugins_of_one_name_within_leadline_are_an_error():
    def other(prompt):
        return ""

    other.__module__ = "leadline.attacks.other"
    assert registry.get("attack", "direct")
    with pytest.raises(LeadlineError, match="the attack 'direct' is registered more than once"):
        registry.attack("direct", family="x", source="x")(other)


SHOUTING = PLUGIN[: PLUGIN.index("@dataset")]


def test_a_name_that_a_module_registers_twice_is_a_warning(tmp_path):
    environment = install(tmp_path, SHOUTING + SHOUTING)
    ran = call(environment, "list", "attacks", "--json")
    assert ran.returncode == 0
    assert ran.stderr == (
        "leadline: the attack 'shouting' is registered more than once: gardenplugin.shouting is "
        "used and gardenplugin.shouting is ignored: rename the second one, or uninstall its "
        "package\n"
    )
    assert [row["name"] for row in json.loads(ran.stdout)].count("shouting") == 1


RELOAD = """
import importlib
import gardenplugin
from leadline import registry

before = registry.get("attack", "shouting").function
importlib.reload(gardenplugin)
after = registry.get("attack", "shouting").function
assert before is not after is gardenplugin.shouting
assert [p.name for p in registry.plugins("attack")].count("shouting") == 1
"""


def test_a_plugin_module_can_be_reloaded(tmp_path):
    environment = install(tmp_path, SHOUTING)
    command = [sys.executable, "-c", RELOAD]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(LeadlineError, match="did you mean 'advbench'"):
        registry.get("dataset", "advbnech")
