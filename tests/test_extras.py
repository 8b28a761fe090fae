"""A test run that is meant to have an extra does not skip its tests."""

import importlib.util
import pathlib
import re

import extras

HERE = pathlib.Path(__file__).parent


def test_what_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else name)
    assert extras.missing("") == extras.missing("test") == ""
    message = extras.missing("test,parity")
    assert "not installed: trl (extra 'parity');" in message
    assert "-e '.[test,parity]'" in message


def test_every_module_that_tests_skip_on_is_listed():
    skipped_on = re.compile(r"(?:importorskip|find_spec)\(['\"](\w+)['\"]")
    found = {name for file in HERE.rglob("*.py") for name in skipped_on.findall(file.read_text())}
    assert found == {name for names in extras.MODULES.values() for name in names}


def test_every_test_target_of_the_makefile_says_what_must_be_there():
    text = (HERE.parent / "Makefile").read_text()
    told = dict(re.findall(r"^(\S+): export TPO_TEST_EXTRAS = (\S+)$", text, re.M))
    assert told.keys() == set(re.findall(r"^(test[\w-]*):(?! export)", text, re.M))
    assert set(",".join(told.values()).split(",")) == set(extras.MODULES)
