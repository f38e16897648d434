"""The table of targets is consistent, and lowering follows its rows."""

from __future__ import annotations

import pytest

from vmq.targets import TARGETS


def test_targets_name_each_operator_once() -> None:
    for name, target in TARGETS.items():
        assert target.name == name
        groups = [set(target.compute), target.carriers, target.movers, target.absorbed]
        assert sum(map(len, groups)) == len(set().union(*groups))
    with pytest.raises(TypeError):
        TARGETS["mine"] = TARGETS["cpu"]  # type: ignore[index]
