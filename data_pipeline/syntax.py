"""Python's own parser, one thread at a time.

CPython 3.11 counts the depth of syntax trees in one place for all threads, so that two that build trees at once end
now and then in "SystemError: AST constructor recursion depth mismatch" (python/cpython issue 106905).
"""

import ast
import threading

_ONE_AT_A_TIME = threading.Lock()


def parse_python(text: str) -> ast.Module:
    """`ast.parse(text)`, with its errors: SyntaxError, ValueError, RecursionError."""
    with _ONE_AT_A_TIME:
        return ast.parse(text)
