"""Python rules that renew unittest assertions."""

from data_pipeline.tasks.rule import Rule
from data_pipeline.tasks.scenes import python_scene

# A harness that knows only today's assertion names and records each call.
_HARNESS = """
 class Legacy:
     def __getattr__(self, name):
         return lambda *args: ("legacy", name)
 
 
 class Checks:
     legacy = Legacy()
 
     def __init__(self):
         self.calls = []
 
     def _record(self, name, *args):
         self.calls.append((name, *args))
 
     def __getattr__(self, name):
         if name not in MODERN:
             raise AttributeError(name)
         return lambda *args: self._record(name, *args)
 
 
 MODERN = "assertEqual assertTrue assertFalse assertIn assertIsNone assertNotEqual assertRaisesRegex".split()
"""


def _assertion_rule(
    name: str,
    pattern: str,
    replacement: str,
    instructions: tuple[str, ...],
    think: tuple[str, ...],
    decision: str,
    real: str,
    *,
    before: str,
    after: str,
    kept: str,
    expected: str,
    overbroad: tuple[str, str],
    keep: str = "keep legacy calls",
) -> Rule:
    """A rule on one unittest assertion, in a scene whose harness records which assertion ran."""
    source = f"""
 from harness import Checks
 
 
 class «Noun»Checks(Checks):
     def run(self, value, rows):
-        {before}
+        {after}
         return {kept}
"""
    scene = python_scene(
        source,
        others={"harness.py": _HARNESS},
        overbroad=overbroad,
        test_recorded=(
            f"checks = «mod».«Noun»Checks()\nchecks.run(«n», [«n»])\nself.assertEqual(checks.calls[0], {expected})"
        ),
        test_kept='self.assertEqual(«mod».«Noun»Checks().run(«n», [])[0], "legacy")',
    )
    return Rule(
        name=name,
        language="python",
        kind="assert",
        pattern=pattern,
        replacement=replacement,
        instructions=instructions,
        think=think,
        decision=decision,
        keep=keep,
        real=real,
        scenes=(scene,),
    )


RULES = (
    _assertion_rule(
        "python-assert-equals",
        "self.assertEquals($$$ARGS)",
        "self.assertEqual($$$ARGS)",
        (
            "Replace the removed `self.assertEquals` with `self.assertEqual`",
            "Use `self.assertEqual` instead of `self.assertEquals`",
            "`self.assertEquals` is gone; call `self.assertEqual`",
            "Rename `self.assertEquals(...)` to `self.assertEqual(...)`",
        ),
        (
            "assertEquals was an alias of assertEqual and is gone. Keep every argument.",
            "Match the alias on self only and call assertEqual with the same arguments.",
        ),
        "use assertEqual",
        r"self\.assertEquals\(",
        before="self.assertEquals(value, «n2»)",
        after="self.assertEqual(value, «n2»)",
        kept="self.legacy.assertEquals(value, 1)",
        expected='("assertEqual", «n», «n2»)',
        overbroad=("$O.assertEquals($$$ARGS)", "self.assertEqual($$$ARGS)"),
    ),
    _assertion_rule(
        "python-assert-underscore",
        "self.assert_($$$ARGS)",
        "self.assertTrue($$$ARGS)",
        (
            "Replace the removed `self.assert_` with `self.assertTrue`",
            "Use `self.assertTrue` instead of `self.assert_`",
            "`self.assert_` is gone; call `self.assertTrue`",
            "Rename `self.assert_(...)` to `self.assertTrue(...)`",
        ),
        (
            "assert_ was an alias of assertTrue and is gone. Keep every argument.",
            "Match the alias on self only and call assertTrue with the same arguments.",
        ),
        "use assertTrue",
        r"self\.assert_\(",
        before="self.assert_(value > «n2»)",
        after="self.assertTrue(value > «n2»)",
        kept="self.legacy.assert_(value)",
        expected='("assertTrue", «n» > «n2»)',
        overbroad=("$O.assert_($$$ARGS)", "self.assertTrue($$$ARGS)"),
    ),
    _assertion_rule(
        "python-assert-regexp",
        "self.assertRaisesRegexp($$$ARGS)",
        "self.assertRaisesRegex($$$ARGS)",
        (
            "Replace the removed `self.assertRaisesRegexp` with `self.assertRaisesRegex`",
            "Use `self.assertRaisesRegex` instead of `self.assertRaisesRegexp`",
            "`self.assertRaisesRegexp` is gone; call `self.assertRaisesRegex`",
            "Rename `self.assertRaisesRegexp(...)` to `self.assertRaisesRegex(...)`",
        ),
        (
            "assertRaisesRegexp was an alias of assertRaisesRegex and is gone. Keep every argument.",
            "Match the alias on self only and call assertRaisesRegex with the same arguments.",
        ),
        "use assertRaisesRegex",
        r"self\.assertRaisesRegexp\(",
        before='self.assertRaisesRegexp(ValueError, "«word»")',
        after='self.assertRaisesRegex(ValueError, "«word»")',
        kept="self.legacy.assertRaisesRegexp(value)",
        expected='("assertRaisesRegex", ValueError, "«word»")',
        overbroad=("$O.assertRaisesRegexp($$$ARGS)", "self.assertRaisesRegex($$$ARGS)"),
    ),
    _assertion_rule(
        "python-assert-equal-operator",
        "self.assertTrue($A == $B)",
        "self.assertEqual($A, $B)",
        (
            "Use `self.assertEqual(a, b)` instead of `self.assertTrue(a == b)`",
            "Replace `self.assertTrue(a == b)` with `self.assertEqual(a, b)`",
            "Failures should show both values: `self.assertTrue(a == b)` becomes `self.assertEqual(a, b)`",
            "Turn equality inside `self.assertTrue` into `self.assertEqual`",
        ),
        (
            "assertEqual shows both values on failure. Bind the two sides of the comparison.",
            "Match equality inside assertTrue and pass both sides to assertEqual.",
        ),
        "compare with assertEqual",
        r"self\.assertTrue\(\w+ == \w+\)",
        before="self.assertTrue(value == «n2»)",
        after="self.assertEqual(value, «n2»)",
        kept="self.legacy.assertTrue(value == 1)",
        expected='("assertEqual", «n», «n2»)',
        overbroad=("$O.assertTrue($A == $B)", "self.assertEqual($A, $B)"),
    ),
    _assertion_rule(
        "python-assert-in-operator",
        "self.assertTrue($A in $B)",
        "self.assertIn($A, $B)",
        (
            "Use `self.assertIn(a, b)` instead of `self.assertTrue(a in b)`",
            "Replace `self.assertTrue(a in b)` with `self.assertIn(a, b)`",
            "Failures should show the container: `self.assertTrue(a in b)` becomes `self.assertIn(a, b)`",
            "Turn membership inside `self.assertTrue` into `self.assertIn`",
        ),
        (
            "assertIn shows the container on failure. Bind the member and the container.",
            "Match membership inside assertTrue and pass both sides to assertIn.",
        ),
        "check membership with assertIn",
        r"self\.assertTrue\([^()]+ in \w+\)",
        before="self.assertTrue(value in rows)",
        after="self.assertIn(value, rows)",
        kept="self.legacy.assertTrue(value in rows)",
        expected='("assertIn", «n», [«n»])',
        overbroad=("$O.assertTrue($A in $B)", "self.assertIn($A, $B)"),
    ),
    _assertion_rule(
        "python-assert-is-none",
        "self.assertEqual($X, None)",
        "self.assertIsNone($X)",
        (
            "Use `self.assertIsNone(x)` instead of `self.assertEqual(x, None)`",
            "Replace `self.assertEqual(x, None)` with `self.assertIsNone(x)`",
            "Compare with None by identity: `self.assertEqual(x, None)` becomes `self.assertIsNone(x)`",
            "Turn `self.assertEqual` with None into `self.assertIsNone`",
        ),
        (
            "assertIsNone compares by identity. Bind the value and drop None.",
            "Match assertEqual whose second argument is None and call assertIsNone.",
        ),
        "check None with assertIsNone",
        r"self\.assertEqual\([^()]+, None\)",
        before="self.assertEqual(value, None)",
        after="self.assertIsNone(value)",
        kept="self.legacy.assertEqual(value, None)",
        expected='("assertIsNone", «n»)',
        overbroad=("$O.assertEqual($X, None)", "self.assertIsNone($X)"),
    ),
    _assertion_rule(
        "python-assert-not-equal-operator",
        "self.assertFalse($A == $B)",
        "self.assertNotEqual($A, $B)",
        (
            "Use `self.assertNotEqual(a, b)` instead of `self.assertFalse(a == b)`",
            "Replace `self.assertFalse(a == b)` with `self.assertNotEqual(a, b)`",
            "Failures should show both values: `self.assertFalse(a == b)` becomes `self.assertNotEqual(a, b)`",
            "Turn equality inside `self.assertFalse` into `self.assertNotEqual`",
        ),
        (
            "assertNotEqual shows both values on failure. Bind the two sides of the comparison.",
            "Match equality inside assertFalse and pass both sides to assertNotEqual.",
        ),
        "compare with assertNotEqual",
        r"self\.assertFalse\(\w+ == \w+\)",
        before="self.assertFalse(value == «n2»)",
        after="self.assertNotEqual(value, «n2»)",
        kept="self.legacy.assertFalse(value == 1)",
        expected='("assertNotEqual", «n», «n2»)',
        overbroad=("$O.assertFalse($A == $B)", "self.assertNotEqual($A, $B)"),
    ),
)
