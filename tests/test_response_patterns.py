"""Private data by rule and validator, masks that hide it, and the lists of expressions."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import yaml

from sft_recipes.response_patterns import (
    PATTERNS,
    find,
    find_refusal,
    is_repetitive,
    mask,
    opener,
    pattern,
    private_spans,
    refusal_error,
    repetition,
)
from sft_recipes.statistics import proportion
from tests.audit.planted import card_number, personal, secret


def kinds(text: str) -> list[str]:
    """Types of private data in a text."""
    return [kind for kind, _, _ in private_spans(text)]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to jo.doe+x@uni.ac.uk now", "email"),
        ("card 4111 1111 1111 1111 is a test", "card_number"),
        ("amex 3782-822463-10005.", "card_number"),
        ("to GB82 WEST 1234 5698 7654 32", "iban"),
        ("to DE89370400440532013000.", "iban"),
        ("ssn 219-09-9999", "social_security_number"),
        ("call +44 20 7946 0958", "phone_number"),
        ("call (415) 781-2345", "phone_number"),
        ("call 415-781-2345!", "phone_number"),
        ("host 81.2.69.142", "ip_address"),
        ("hf_" + "aB3" * 12, "access_key"),
        ("export KEY=sk-proj-" + "a1B2" * 6, "access_key"),
        ("AKIA" + "ABCD" * 4, "access_key"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSMeK", "web_token"),
        ("-----BEGIN PRIVATE KEY-----\nMIIB\nabc", "private_key"),
        ("password=" + "hunter" + "2xyz", "assigned_secret"),
        ('"db_password": "' + "S3cr3t!x" + '"', "assigned_secret"),
        ("redis://:" + "k3y" * 4 + "@cache/0", "address_with_password"),
        ("https://x/y?sig=" + "aB3" * 12, "signed_address"),
    ],
)
def test_private_data_is_found_and_masked(text: str, kind: str) -> None:
    """Each kind is found once, and the mask, which holds nothing private, hides its text."""
    (found,) = private_spans(text)
    assert found[0] == kind
    assert text[found[1] : found[2]] not in mask(text) and f"[{kind.replace('_', ' ')}]" in mask(
        text
    )
    assert kinds(mask(text)) == [] and mask(mask(text)) == mask(text)


@pytest.mark.parametrize(
    "text",
    [
        "jane@example.com",
        "name@email.com",
        "a@b",
        "@property",
        "card 4111 1111 1111 1112",
        "4111-1111-1111-11110",
        "0000 0000 0000 0000",
        "GB82 WEST 1234 5698 7654 33",
        "219-00-9999 and 000-12-3456 and 900-12-3456",
        "555-0123 and (212) 555-0123",
        "1914-1918, 2000-2001, 1990-2000-2010",
        "ISBN 978-3-16-148410-0",
        "48 + 24 = 72 and 1000-200-300",
        "version 1.2.3.4 and section 10.1.1.2",
        "192.168.0.1, 127.0.0.1, 300.2.69.142, 81.2.69.142.3",
        "task-force-sk-learn-and-more-words-here",
        "hf_transformers and ghp_token",
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
        "100000000000000000000",
        "date 2023-11-22 18:26:12",
        "x" * 100_000,
        "12" * 50_000,
        "a@" * 30_000,
        "1-" * 30_000,
        "sk-" * 30_000,
        "eyJ-" * 30_000 + ".eyJ",
        "password " + "= " * 30_000,
        "password " + "=" * 30_000,
        "://" + "a:" * 30_000,
        "password: incorrect ones are refused",
        "password=settings.password, api_key=YOUR_KEY_1, token=${TOKEN_1}",
        "https://user:password@host/x and https://host:8000/a@b",
    ],
)
def test_what_only_looks_private(text: str) -> None:
    """Dates, sums, versions, invented and broken numbers are left alone, long texts included."""
    assert kinds(text) == []


def test_masks_hide_generated_values() -> None:
    """No generated secret, card or address is left in a masked text, wherever it stands."""
    random = Random(0)
    for _ in range(300):
        value = random.choice([card_number, secret, personal])(random)
        masked = mask(f"see ({value}), and again:\n{value}")
        assert value not in masked, value
        assert masked.count("[") == 2, value


@pytest.mark.parametrize(
    "name", [name for name, value in PATTERNS.items() if isinstance(value, list)]
)
def test_no_expression_matches_nothing(name: str) -> None:
    """Every list compiles, and no expression matches the empty text, which would flag all rows."""
    assert pattern(name).search("") is None


@pytest.mark.parametrize(
    "answer",
    [
        "N/A",
        " n/a.",
        "<nooutput>",
        "No Output",
        "TODO",
        "nan",
        "[your answer here]",
        "Lorem ipsum dolor",
    ],
)
def test_placeholders(answer: str) -> None:
    """Stand-ins are found if they are the whole answer, and not inside one."""
    assert pattern("placeholder").fullmatch(answer.strip())
    assert not pattern("placeholder").fullmatch(f"The field says {answer} today.")


def test_curly_apostrophes_and_position() -> None:
    """A refusal is found with either apostrophe, and only in the first 200 characters."""
    straight = "I'm sorry, but I can't help with that."
    curly = straight.replace("'", "\u2019")
    assert find_refusal(straight)
    assert find_refusal(curly) == find_refusal(straight)
    assert not find_refusal("Words. " * 40 + "I can't help you.")
    assert find("cutoff", "As of my last knowledge update in 2021, it stood.")


def test_the_refusal_rules_error_is_that_on_the_labelled_answers() -> None:
    """Precision and recall, 24 of 25 and 24 of 30, with Wilson intervals, counted again."""
    path = Path(__file__).parent / "audit" / "refusals.yaml"
    labelled = yaml.safe_load(path.read_text(encoding="utf-8"))
    right = len(list(filter(find_refusal, labelled["refusals"])))
    wrong = len(list(filter(find_refusal, labelled["others"])))
    shares = {
        "precision": proportion(right, right + wrong),
        "recall": proportion(right, len(labelled["refusals"])),
    }
    error = refusal_error()
    assert error["n"] == len(labelled["refusals"]) + len(labelled["others"])
    for name, share in shares.items():
        interval = f"[{share.ci_low:.2f}, {share.ci_high:.2f}]"
        print(f"refusal rule, {name}: {share.value:.3f} {interval}, n = {share.n}")
        assert error[name] == pytest.approx(share.value, abs=0.005)
        assert error[f"{name}_ci"] == pytest.approx([share.ci_low, share.ci_high], abs=5e-5)
    assert shares["precision"].value >= 0.9
    assert shares["recall"].value >= 0.75


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("", 4, None),
        ("a b c", 4, None),
        ("a b c d", 4, 0.0),
        ("a b c d a b c d", 4, 1 / 5),
        ("A a a A a", 4, 1 / 2),
        ("a b a b a b", 2, 3 / 5),
    ],
)
def test_repetition_is_the_share_of_repeated_ngrams(text: str, n: int, share: float | None) -> None:
    """1 - distinct / all, case aside; a text shorter than n words has no value."""
    assert repetition(text, n) == (None if share is None else pytest.approx(share))


def test_repetitive_needs_fifty_words_and_half_of_the_4_grams() -> None:
    """49 words of one phrase are too few; 50 are enough; 50 different words are not repetitive."""
    words_49 = "so it goes on " * 12 + "so"
    assert not is_repetitive(words_49)
    assert is_repetitive(f"{words_49} it")
    assert not is_repetitive(" ".join(map(str, range(60))))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("Sure, here it is", None),
        ("Sure, here it is: a list", "sure, here it is:"),
        ("  Sure,\nhere it IS a list", "sure, here it is"),
        ("x" * 300 + " a b c d e", None),
    ],
)
def test_openers_are_the_first_four_words_of_longer_texts(text: str, expected: str | None) -> None:
    """Case and spaces aside; four words or fewer are an answer."""
    assert opener(text) == expected
