"""Code reads at the speed of a good page: short lines, short functions, one thought a statement.

The limits are those of the project's style, with room; `python -m tests.test_shape` prints where the package stands.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sft_recipes

PACKAGE = Path(sft_recipes.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "shipped" not in path.parts)

TOKENS_A_LINE = 9.0
# Of the whole package. Raising it takes a line with the reason in CHANGELOG.md.
TOKENS = 256_000
FUNCTION_LINES = 50
FILE_LINES = 400
# Per 1,000 lines of code: the highest of nine code bases that engineers hold up as models (17 and 23), with room.
CONDITIONAL_EXPRESSIONS = 20
COMPREHENSIONS = 40

_NOT_COUNTED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Shape:
    """Counts of one source text."""

    tokens: int
    code_lines: int
    lines: int
    conditional_expressions: int
    comprehensions: int


def measure(source: str) -> Shape:
    """Tokens and code lines without comments and docstrings, and how many expressions hold a decision or a loop."""
    tree = ast.parse(source)
    described = _docstring_lines(tree)
    lines = set()
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NOT_COUNTED and token.start[0] not in described:
            tokens += 1
            lines.update(range(token.start[0], token.end[0] + 1))
    nodes = list(ast.walk(tree))
    return Shape(
        tokens=tokens,
        code_lines=len(lines),
        lines=source.count("\n"),
        conditional_expressions=sum(isinstance(node, ast.IfExp) for node in nodes),
        comprehensions=sum(isinstance(node, _COMPREHENSIONS) for node in nodes),
    )


def _docstring_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTIONS)) and ast.get_docstring(node):
            docstring = node.body[0]
            lines.update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return lines


def package_shape() -> Shape:
    """The sums over all modules of the package."""
    shapes = [measure(path.read_text(encoding="utf-8")) for path in MODULES]
    return Shape(
        tokens=sum(shape.tokens for shape in shapes),
        code_lines=sum(shape.code_lines for shape in shapes),
        lines=sum(shape.lines for shape in shapes),
        conditional_expressions=sum(shape.conditional_expressions for shape in shapes),
        comprehensions=sum(shape.comprehensions for shape in shapes),
    )


def faults(source: str) -> Iterator[str]:
    """What a reader has to unfold before reading on, by line."""
    for node in ast.walk(ast.parse(source)):
        for fault in _faults_of(node):
            yield f"{getattr(node, 'lineno', 0)}: {fault}"


def _faults_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.IfExp) and _holds(node, ast.IfExp):
        yield "a conditional expression inside another"
    if isinstance(node, _COMPREHENSIONS) and _holds(node, ast.NamedExpr):
        yield "an assignment expression inside a comprehension"
    if isinstance(node, _COMPREHENSIONS) and _is_deep(node):
        yield "a comprehension over more than one `for` and one `if`"
    if isinstance(node, ast.Assign) and _is_long_tuple_assignment(node):
        yield "more than two names assigned at once"
    if isinstance(node, ast.Call) and any(_unpacks_a_literal(word) for word in node.keywords):
        yield "** of a literal"
    if isinstance(node, _FUNCTIONS):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > FUNCTION_LINES:
            yield f"{node.name} has {length} lines"


def _holds(node: ast.AST, kind: type[ast.AST]) -> bool:
    return any(isinstance(inner, kind) for inner in ast.walk(node) if inner is not node)


def _is_deep(node: Any) -> bool:
    return len(node.generators) > 1 or len(node.generators[0].ifs) > 1


def _unpacks_a_literal(keyword: ast.keyword) -> bool:
    return keyword.arg is None and isinstance(keyword.value, ast.Dict)


def _is_long_tuple_assignment(node: ast.Assign) -> bool:
    target = node.targets[0]
    if not isinstance(target, ast.Tuple) or not isinstance(node.value, ast.Tuple):
        return False
    return len(target.elts) > 2


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(PACKAGE)) for path in MODULES])
def test_one_thought_a_statement(path: Path) -> None:
    """No statement hides decisions or loops in an expression; functions and files end before a reader is lost."""
    source = path.read_text(encoding="utf-8")
    assert not list(faults(source))
    assert source.count("\n") <= FILE_LINES


def test_lines_read_at_a_glance() -> None:
    """Over the whole package: tokens a line, and the share of decisions and loops that stand inside expressions."""
    shape = package_shape()
    assert shape.tokens / shape.code_lines <= TOKENS_A_LINE
    assert shape.tokens <= TOKENS
    assert 1000 * shape.conditional_expressions / shape.code_lines <= CONDITIONAL_EXPRESSIONS
    assert 1000 * shape.comprehensions / shape.code_lines <= COMPREHENSIONS


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("x = 1 if a else 2 if b else 3", "conditional expression inside another"),
        ("x = [y for z in a if (y := z)]", "assignment expression"),
        ("x = [z for y in a for z in y]", "more than one `for`"),
        ("x = [z for z in a if z if z > 1]", "more than one `for`"),
        ("a, b, c = 1, 2, 3", "more than two names"),
        ("f(**{'a': 1})", r"\*\* of a literal"),
        ("def f():\n" + "    pass\n" * 50, "f has 51 lines"),
    ],
)
def test_faults_are_seen(source: str, fault: str) -> None:
    """The check itself finds each of them."""
    assert any(fault.replace("\\", "") in found for found in faults(source))


def test_known_counts() -> None:
    """Comments and docstrings are no code; a text over several lines counts its lines."""
    shape = measure('"""A text."""\n# why\nx = (\n    1 if a else [b for b in c]\n)\n')
    assert (shape.tokens, shape.code_lines, shape.lines) == (15, 3, 5)
    assert (shape.conditional_expressions, shape.comprehensions) == (1, 1)


if __name__ == "__main__":
    whole = package_shape()
    print(
        f"{whole.tokens:,} tokens in {whole.code_lines:,} lines of code, "
        f"{whole.tokens / whole.code_lines:.2f} a line; per 1,000 lines "
        f"{1000 * whole.conditional_expressions / whole.code_lines:.1f} conditional expressions, "
        f"{1000 * whole.comprehensions / whole.code_lines:.1f} comprehensions"
    )
    for module in MODULES:
        text = module.read_text(encoding="utf-8")
        counts = measure(text)
        name = str(module.relative_to(PACKAGE))
        print(
            f"{name:40} {counts.tokens / max(counts.code_lines, 1):5.1f} a line, {counts.lines} lines"
        )
        for fault in faults(text):
            print(f"    {fault}")
