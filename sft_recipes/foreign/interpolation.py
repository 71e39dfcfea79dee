"""Values of a config that name other values of it, `${output_dir}/logs`, as OmegaConf writes them."""

import re
from collections.abc import Mapping
from typing import Any

from sft_recipes.foreign.tables import value_text

_NAMED = re.compile(r"\$\{([^{}]*)\}")
# A key of the file, from its top: names and numbers with dots between them.
_KEY = re.compile(r"[\w-]+(?:\.[\w-]+)*")
# Values that name others may be named themselves, as deep as this.
_DEEPEST = 10


class Interpolation:
    """The tree of a config with what its values name in the place of their names.

    `used`: the keys that are named somewhere; `unknown`: the keys with a name that is none of the file.
    """

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self._tree = tree
        self.used: set[str] = set()
        self.unknown: set[str] = set()
        self.tree: dict[str, Any] = {key: self._filled(value, key) for key, value in tree.items()}

    def _filled(self, value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            return {name: self._filled(inner, f"{key}.{name}") for name, inner in value.items()}
        if isinstance(value, list):
            return [self._filled(inner, f"{key}.{n}") for n, inner in enumerate(value)]
        for _ in range(_DEEPEST):
            if not isinstance(value, str) or "${" not in value:
                return value
            value = self._filled_once(value)
        self.unknown.add(key)
        return value

    def _filled_once(self, text: str) -> Any:
        """One round; a text that is nothing but a name becomes the value itself, whatever its type."""
        whole = _NAMED.fullmatch(text)
        if whole is not None:
            return self._named(whole[1], text)
        return _NAMED.sub(lambda match: value_text(self._named(match[1], match[0])), text)

    def _named(self, name: str, text: str) -> Any:
        """The value of a key of the file; the text itself where there is none, or it is no key."""
        value: Any = self._tree
        if _KEY.fullmatch(name) is None:
            return text
        for part in name.split("."):
            if isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            elif isinstance(value, Mapping) and part in value:
                value = value[part]
            else:
                return text
        self.used.add(name)
        return value
