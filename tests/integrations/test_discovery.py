"""Registering with a library when, and only when, it is imported."""

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from pairquant.integrations import discovery

LIBRARY = "library_of_discovery"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """An importable library, for which `registration_of_discovery` would be imported; gives a writer of the latter."""
    (tmp_path / f"{LIBRARY}.py").write_text("loaded = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(discovery, "REGISTRATIONS", {LIBRARY: "registration_of_discovery"})
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield lambda code: (tmp_path / "registration_of_discovery.py").write_text(code)
    for name in (LIBRARY, "registration_of_discovery"):
        sys.modules.pop(name, None)


def finders():
    return [finder for finder in sys.meta_path if getattr(finder, "target", None) == LIBRARY]


def test_registration_follows_the_library_s_own_import(library):
    library(f"import {LIBRARY}; seen = {LIBRARY}.loaded")
    discovery.register()
    assert "registration_of_discovery" not in sys.modules
    module = __import__(LIBRARY)
    assert sys.modules["registration_of_discovery"].seen is True
    assert type(module.__loader__).__module__ != discovery.__name__, "the library keeps its own loader"
    assert finders() == []


def test_a_library_that_is_loaded_already_is_registered_with_at_once(library):
    library("done = True")
    __import__(LIBRARY)
    discovery.register()
    assert sys.modules["registration_of_discovery"].done
    assert finders() == []


def test_registering_twice_waits_once(library):
    discovery.register()
    discovery.register()
    assert len(finders()) == 1


def test_asking_whether_the_library_is_there_neither_imports_nor_forgets(library):
    library("done = True")
    discovery.register()
    assert find_spec(LIBRARY) is not None
    assert "registration_of_discovery" not in sys.modules
    __import__(LIBRARY)
    assert sys.modules["registration_of_discovery"].done


def test_other_modules_and_absent_libraries_are_left_to_others(monkeypatch):
    finder = discovery._AfterImport("absent_library_of_discovery")
    assert finder.find_spec("json") is None
    assert finder.find_spec("absent_library_of_discovery") is None


@pytest.mark.parametrize("fault", ["raise ImportError('no such name')", "import json; json.no_such_name"])
def test_a_version_that_we_do_not_know_goes_on_working_with_a_warning(library, fault):
    library(fault)
    discovery.register()
    with pytest.warns(UserWarning, match=f"cannot register with this version of {LIBRARY} .*no.such.name.*Needed: "):
        assert __import__(LIBRARY).loaded


def test_what_is_no_question_of_versions_is_raised(library):
    library("raise ZeroDivisionError")
    sys.modules[LIBRARY] = SimpleNamespace()
    with pytest.raises(ZeroDivisionError):
        discovery.register()


def test_the_modules_that_register_exist():
    assert all(find_spec(module) is not None for module in discovery.REGISTRATIONS.values())
