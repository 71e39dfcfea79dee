"""Which conversations the checks before a run look at: few, but of every structure."""

from collections.abc import Hashable, Sequence
from itertools import zip_longest

from sft_recipes.messages import Example

MOST_EXAMPLES = 200
# Of data with many structures no more of one are kept.
FEW_STRUCTURES = 10
KEPT_OF_MANY = 20
# From here on longer conversations count as one structure.
LONG_CONVERSATION = 6


def structure(source: int, example: Example) -> Hashable:
    """What decides whether two conversations may be laid out differently by a template."""
    fields: set[str] = set()
    for message in example.messages:
        fields.update(key for key, value in message.items() if value)
    roles = tuple(message["role"] for message in example.messages[:LONG_CONVERSATION])
    return (
        source,
        roles,
        frozenset(fields),
        bool(example.tools),
        bool(example.train),
        example.text is None,
    )


class CheckExamples:
    """Keeps examples as they pass: the first ones of every structure.

    `kept`: in the order they passed in. What is kept of some of them, one part after the other,
    and then of all that is kept of the parts, is what is kept of all of them.
    """

    def __init__(self) -> None:
        self._by_structure: dict[Hashable, list[Example]] = {}
        self.kept: list[Example] = []

    def add(self, source: int, example: Example) -> bool:
        """Keep the example if its structure has few so far; returns whether it is kept."""
        alike = self._by_structure.setdefault(structure(source, example), [])
        most = MOST_EXAMPLES
        if len(self._by_structure) > FEW_STRUCTURES:
            most = KEPT_OF_MANY
        if len(alike) >= most:
            return False
        alike.append(example)
        self.kept.append(example)
        return True

    def chosen(self) -> Sequence[Example]:
        """Up to 200 examples: one of each structure, then a second of each, and so on."""
        chosen: list[Example] = []
        for one_of_each in zip_longest(*self._by_structure.values()):
            chosen += filter(None, one_of_each)
        return chosen[:MOST_EXAMPLES]
