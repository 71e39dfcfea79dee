"""The chat templates that TRL ships as files.

`tests/upstream/test_templates.py` fails where one that is read here is gone.
"""

from importlib.util import find_spec
from pathlib import Path


def trl_chat_template(name: str) -> str:
    """The text of a template that TRL ships, by its name.

    Taken: the files of `trl/chat_templates`. Why: they are the templates of well-known models, as
    their makers publish them, which other tools write by name; TRL's public functions only compare
    a tokenizer's template with them. Read in TRL 1.16.0.
    """
    spec = find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")
