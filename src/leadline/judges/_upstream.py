"""Published judge prompts, read from the source of the package `judgezoo`.

The prompts must match the published ones exactly. They are constants in judgezoo's modules, which
are parsed and not imported: the import would load torch and the clients of two providers.
"""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..records import LeadlineError


def judgezoo_constant(judge: str, module: str, class_name: str, name: str) -> Any:
    """The value of the class attribute `name` in a module of judgezoo, for our judge `judge`.

    Raises LeadlineError if judgezoo is not installed or has no such attribute.
    """
    spec = find_spec("judgezoo")
    if not spec or not spec.submodule_search_locations:
        raise LeadlineError(
            f"the judge {judge!r} reads its prompt from judgezoo, which is not installed: "
            "pip install 'leadline[judges]', or set your own prompt:"
        )
    try:
        file = Path(next(iter(spec.submodule_search_locations))) / f"{module}.py"
        body = ast.parse(file.read_text(encoding="utf-8")).body
        (class_,) = (c for c in body if isinstance(c, ast.ClassDef) and c.name == class_name)
        (value,) = (a.value for a in class_.body if isinstance(a, ast.Assign) and _sets(a, name))
        return ast.literal_eval(value)
    except (OSError, SyntaxError, ValueError):
        raise LeadlineError(
            f"the installed judgezoo has no {module}.{class_name}.{name}, which the judge "
            f"{judge!r} needs: pip install 'judgezoo>=0.1.9,<0.2', or set your own prompt:"
        ) from None


def _sets(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def fill(judge: str, template: str, **values: str) -> str:
    """The template with its {fields} replaced. Raises LeadlineError if it has unknown fields."""
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise LeadlineError(
            f"the prompt of the judge {judge!r} has an unknown field ({error}): use only "
            f"{', '.join('{' + name + '}' for name in values)}, and {{{{ for a literal brace"
        ) from None
