"""Every row of the table of families through the shared runner: a new row is tested by existing."""

from __future__ import annotations

import pytest

from tests.export.shared_runner import check_family
from tests.tiny import TINY_PRESETS

_DEEPSEEK = [name for name, (family, _) in TINY_PRESETS.items() if family.startswith("deepseek")]
_OTHERS = [name for name in TINY_PRESETS if name not in _DEEPSEEK]


# Two classes, so that two workers share the work.
class TestDeepSeek:
    @pytest.mark.parametrize("preset", _DEEPSEEK)
    def test_family(self, preset: str) -> None:
        check_family(preset)


class TestOthers:
    @pytest.mark.parametrize("preset", _OTHERS)
    def test_family(self, preset: str) -> None:
        check_family(preset)
