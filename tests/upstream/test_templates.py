"""TRL still ships the templates that `sft_recipes/upstream/templates.py` reads."""

from __future__ import annotations

import pytest

from sft_recipes.foreign.label_rules.axolotl import SAME_AS_TRL
from sft_recipes.upstream.templates import trl_chat_template


@pytest.mark.parametrize("name", sorted(set(SAME_AS_TRL.values())))
def test_the_template_is_there(name: str) -> None:
    """Each is a Jinja text that goes over messages."""
    assert "messages" in trl_chat_template(name)
