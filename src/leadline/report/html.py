"""Rendering of report pages: one self-contained file, whose content security policy allows only
its own scripts, from templates that escape all text."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ..text import percent, script_code, script_json, shorten, visible

if TYPE_CHECKING:
    import jinja2


def render(
    template: str, *, plots: Mapping[str, Any], scripts: Sequence[str], styles: Sequence[str],
    **context: Any,
) -> str:  # fmt: skip
    """The page as text. `plots` holds the data of each plot by name; `scripts` are joined into one,
    after plotly if there is any plot."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    folder = files(__package__) / "templates"
    code = ["\n".join((folder / name).read_text("utf-8") for name in scripts)]
    if plots:
        code.insert(0, get_plotlyjs())
    code = [script_code(script) for script in code]
    hashes = [b64encode(sha256(script.encode()).digest()).decode() for script in code]
    return _environment().get_template(template).render(
        context,
        plots={name: Markup(script_json(plot)) for name, plot in plots.items()},
        scripts=[Markup(script) for script in code],
        style=Markup("\n".join((folder / name).read_text("utf-8") for name in styles)),
        policy=Markup(" ".join(f"'sha256-{digest}'" for digest in hashes)),
    )  # fmt: skip


def _environment() -> jinja2.Environment:
    """A template environment that escapes every value and makes hidden characters visible."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("leadline.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {"percent": percent, "shorten": shorten, "tight": _tight}
    return environment


def _tight(sentence: str) -> str:
    """A sentence with no line break inside of an interval such as [7%, 27%]."""
    return re.sub(r" \[[^\[\]]{1,24}\]", lambda found: found[0].replace(" ", "\u00a0"), sentence)
