"""Libraries are quiet about what nobody asked for, and speak under --debug."""

from __future__ import annotations

import warnings

import pytest
from transformers.utils import logging

from sft_recipes.crash import DEBUG
from sft_recipes.upstream.quiet import quiet_libraries


@pytest.mark.parametrize("debug", [False, True])
def test_bars_and_deprecations(monkeypatch: pytest.MonkeyPatch, debug: bool) -> None:
    """Bars and deprecations are off, other warnings stay; under --debug everything stays."""
    was_on = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    monkeypatch.delenv(DEBUG, raising=False)
    if debug:
        monkeypatch.setenv(DEBUG, "1")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            quiet_libraries()
            warnings.warn("old name", FutureWarning, stacklevel=1)
            warnings.warn("a weight is missing", UserWarning, stacklevel=1)
        assert logging.is_progress_bar_enabled() is debug
    finally:
        logging.enable_progress_bar() if was_on else logging.disable_progress_bar()
    kinds = [warning.category for warning in said]
    assert kinds == ([FutureWarning, UserWarning] if debug else [UserWarning])
