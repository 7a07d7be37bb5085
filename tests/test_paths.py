"""Paths of files that people share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from molgen_energy.paths import expand_home, find_again, portable_path


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A home with a project, in which one works."""
    home = tmp_path / "home" / "me"
    (home / "project" / "data").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(Path, "home", lambda: home)  # as it is on other systems too
    monkeypatch.chdir(home / "project")
    return tmp_path


def test_a_portable_path_names_no_home(places):
    home = places / "home" / "me"
    assert portable_path(Path("data/a.h5")) == "data/a.h5"
    assert portable_path(home / "project" / "data" / "a.h5") == "data/a.h5"
    assert portable_path(Path("data/../a.h5")) == "a.h5"
    assert portable_path(Path("../a.h5")) == "~/a.h5"
    assert portable_path(home / "b" / "a.h5") == "~/b/a.h5"
    assert portable_path(places / "a.h5") == str(places / "a.h5")
    os.chdir(places)  # outside of the home; the fixture goes back
    assert portable_path(home / "a.h5") == "~/a.h5"
    assert portable_path(places / "a.h5") == "a.h5"


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_links_do_not_bring_folders_back(places):
    home = places / "home" / "me"
    (places / "disk").mkdir()
    (home / "project" / "scratch").symlink_to(places / "disk")
    (places / "alias").symlink_to(home)
    assert portable_path(Path("scratch/a.h5")) == "scratch/a.h5"
    Path.home = lambda: places / "alias"  # restored by the fixture
    assert portable_path(home / "a.h5") == "~/a.h5"
    assert portable_path(places / "alias" / "a.h5") == "~/a.h5"


def test_what_a_portable_path_stands_for_is_found_again(places, monkeypatch):
    home = places / "home" / "me"
    data, run = home / "project" / "data" / "a.h5", home / "project" / "runs" / "mine"
    data.touch()
    (run / "checkpoints" / "last").mkdir(parents=True)
    for path in (Path("data/a.h5"), data):
        text = portable_path(path)
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(places)
            assert find_again(text, run) == data
            assert find_again(text, run / "checkpoints" / "last") == data
            assert find_again(text, Path("home/me/project/runs/mine")) == data
    assert find_again("data/a.h5", places / "copied") == Path("data/a.h5")  # that of this folder
    assert find_again("~/project/data/a.h5", places) == data
    assert find_again(str(places / "b.h5"), run) == places / "b.h5"
    assert expand_home("~other/a.h5") == Path("~other/a.h5")
    (home / "project" / "runs" / "data").mkdir()
    nearer = home / "project" / "runs" / "data" / "a.h5"
    nearer.touch()
    assert find_again("data/a.h5", run) == nearer
