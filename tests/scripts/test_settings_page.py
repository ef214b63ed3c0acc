"""docs/settings.md says what the settings do, all of them."""

from __future__ import annotations

import sys

from scripts import document_settings
from scripts.document_settings import PAGE, page
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.schema import setting_types


def test_the_page_is_of_today():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make settings`"


def test_every_setting_is_there():
    written = page()
    for name, _ in setting_types(RunConfig):
        assert f"`{name}`" in written or f"## {name}\n" in written, name
    for name, _ in setting_types(ConversionConfig):
        known = (f"`{name}`", f"## {name}\n", f"`model.{name}`", f"## model.{name}\n")
        assert any(words in written for words in known), name


def test_a_page_that_is_out_of_date_fails_the_check(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(document_settings, "PAGE", tmp_path / "settings.md")
    monkeypatch.setattr(sys, "argv", ["document_settings.py", "--check"])
    assert document_settings.main() == 1 and "make settings" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["document_settings.py"])
    assert document_settings.main() == 0
    monkeypatch.setattr(sys, "argv", ["document_settings.py", "--check"])
    assert document_settings.main() == 0
