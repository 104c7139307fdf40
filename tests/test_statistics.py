"""Every interval covers the truth as often as it says (tests/simulations.py)."""

from __future__ import annotations

import pytest

from .simulations import LOWEST, SETTINGS, Setting, coverage

RUNS = 1000


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_coverage(setting: Setting) -> None:
    assert coverage(setting, RUNS) >= LOWEST


@pytest.mark.parametrize("setting", SETTINGS[:: len(SETTINGS) // 8], ids=lambda s: s.name)
def test_coverage_in_short(setting: Setting) -> None:
    assert coverage(setting, 100) >= 0.86
