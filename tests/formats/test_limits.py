"""Memory that a file may take."""

from __future__ import annotations

from pathlib import Path

import pytest

from molgen_energy.errors import InputError
from molgen_energy.formats import limits


def test_the_least_limit_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo, group = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    monkeypatch.setattr(limits, "_MEMINFO", meminfo)
    monkeypatch.setattr(limits, "_CGROUP_LIMITS", (group,))
    monkeypatch.setattr(limits, "_address_space", lambda: None)
    assert limits.available_memory() == 5000 * 1024
    group.write_text("max\n")
    assert limits.available_memory() == 5000 * 1024
    group.write_text("1000\n")
    assert limits.available_memory() == 1000
    meminfo.unlink()
    group.unlink()
    assert limits.available_memory() == 4 << 30


def test_what_exceeds_memory_is_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available_memory", lambda: 3_000_000)
    limits.check_memory(3_000_000, "a.h5", "split it")
    with pytest.raises(InputError, match=r"a\.h5 takes 2\.0 GB, 3\.0 MB .* available; split it"):
        limits.check_memory(2_000_000_000, "a.h5", "split it")
