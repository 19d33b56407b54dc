"""How scenes are put together: test files from one-idea bodies, and the common shape of one module with its tests."""

from textwrap import indent

from data_pipeline.tasks.rule import Scene


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


def java_test_file(name: str, imports: str, members: str, **bodies: str) -> str:
    """A Java test class `name`: `imports`, `members`, then one method ``testKeyword`` per keyword with that body."""
    parts = [members] if members else []
    parts += [
        f"public void test{title.capitalize()}() {{\n{indent(body, '    ')}\n}}" for title, body in bodies.items()
    ]
    head = f"{imports}\n\n" if imports else ""
    return f"{head}public class {name} {{\n" + indent("\n\n".join(parts), "    ") + "\n}\n"


def python_scene(
    source: str,
    *,
    imports: str = "",
    overbroad: tuple[str, str] | tuple[()] = (),
    others: dict[str, str] | None = None,
    **bodies: str,
) -> Scene:
    """A one-module scene; the tests import it and whatever `imports` adds."""
    tests = {"test_«mod».py": unittest_file(f"import «mod»\n{imports}".rstrip(), **bodies)}
    return Scene({"«mod».py": source, **(others or {})}, tests, overbroad)


def javascript_scene(
    source: str,
    exports: str,
    *,
    overbroad: tuple[str, str] | tuple[()] = (),
    others: dict[str, str] | None = None,
    setup: str = "",
    **bodies: str,
) -> Scene:
    """A one-module scene that exports the comma-separated names `exports`; `setup` runs before the tests."""
    text = source.rstrip("\n") + f"\n \n module.exports = {{ {exports} }};\n"
    imports = f'const {{ {exports} }} = require("./«mod»");\n{setup}'.rstrip()
    tests = {"«mod».test.js": node_test_file(imports, **bodies)}
    return Scene({"«mod».js": text, **(others or {})}, tests, overbroad)


def java_scene(
    members: str,
    *,
    imports: str = "",
    overbroad: tuple[str, str] | tuple[()] = (),
    others: dict[str, str] | None = None,
    setup: str = "",
    stands_before: bool = True,
    **bodies: str,
) -> Scene:
    """A scene of the class «Mod» with the diff body `members`; `setup` are members of its test class.

    Both files begin with `imports`.
    """
    head = "".join(f" {line}\n" for line in imports.split("\n") if line) + (" \n" if imports else "")
    source = f"{head} class «Mod» {{\n" + members.strip("\n") + "\n }\n"
    tests = {"«Mod»Test.java": java_test_file("«Mod»Test", imports, setup, **bodies)}
    return Scene({"«Mod».java": source, **(others or {})}, tests, overbroad, stands_before)


def typescript_scene(source: str, *, overbroad: tuple[str, str], others: dict[str, str] | None = None) -> Scene:
    """A one-module scene without tests: types leave no trace at run time, so the expected files alone decide."""
    return Scene({"«mod».ts": source, **(others or {})}, {}, overbroad)
