"""What is taken from transformers' tokenizers although it is no public interface of theirs.

`tests/upstream/test_tokenizers.py` fails where a new version behaves otherwise: look here first then.
"""

from collections.abc import Sequence
from typing import Any


def control_tokens(tokenizer: Any, template: str) -> Sequence[str]:
    """The tokens that text of a message must never become, for a tokenizer and one chat template.

    Taken: `PreTrainedTokenizerBase._get_control_tokens`, the choice that
    `apply_chat_template(..., sanitize_control_tokens=True)` makes: `chat_control_tokens` of the
    tokenizer where it lists them, else the added tokens that are special or stand in the template.
    Why: the public call sanitizes one conversation and gives its ids. Rows are rendered and encoded
    here in batches, and a row whose text spells no control token is not marked at all, so the
    tokens have to be known; with a choice of our own the ids would differ from a server's.
    Read in transformers 5.23.0.
    """
    return tokenizer._get_control_tokens(template)
