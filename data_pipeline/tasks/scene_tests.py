"""Test files of generated repositories, assembled from one-idea bodies."""

from textwrap import indent


def unittest_file(imports: str, **bodies: str) -> str:
    """A unittest module: `imports`, then one `RewriteTest` method per keyword (its name) with that body."""
    methods = [f"    def {name}(self):\n{indent(body, ' ' * 8)}\n" for name, body in bodies.items()]
    return f"import unittest\n\n{imports}\n\n\nclass RewriteTest(unittest.TestCase):\n" + "\n".join(methods)


def node_test_file(imports: str, **bodies: str) -> str:
    """A CommonJS `node --test` file: `imports`, then one `test` per keyword (its name, "_" read as a space)."""
    head = f'const {{ test }} = require("node:test");\nconst assert = require("node:assert/strict");\n{imports}\n'
    cases = [
        f'\ntest("{name.replace("_", " ")}", async () => {{\n{indent(body, "  ")}\n}});\n'
        for name, body in bodies.items()
    ]
    return head + "".join(cases)
