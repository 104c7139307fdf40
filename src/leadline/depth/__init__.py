"""How deep safety goes: along an answer, into decoding noise, into fine-tuning.

The module itself can be called: `leadline.depth("organism:aligned", base="organism:base")`, as
`leadline.run` can. (See `measure.depth`.)
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import DepthReport


class _Callable(ModuleType):
    """Python binds a package's name in its parent as soon as anything in it is imported, so a
    function of the same name would be hidden: the package answers to the call instead."""

    def __call__(self, *models: Any, **options: Any) -> DepthReport:
        from .run import depth

        return depth(*models, **options)


sys.modules[__name__].__class__ = _Callable
