"""Python rules that delete debug code, move output to a logger or renew unittest assertions."""

from data_pipeline.tasks.rule import Rule, Scene
from data_pipeline.tasks.scene_tests import unittest_file


def _scene(
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
    scene = _scene(
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
    Rule(
        name="python-delete-print",
        language="python",
        kind="delete",
        pattern="print($$$ARGS)",
        replacement="",
        instructions=(
            "Delete the debug `print` calls",
            "Remove every `print(...)` statement",
            "Drop the leftover `print` calls",
            "No output on stdout: delete the calls of `print`",
        ),
        think=(
            "The prints are debug leftovers, so match print with any arguments and delete it.",
            "Match the plain function print with all its arguments and replace it by nothing.",
        ),
        decision="delete print calls",
        keep="keep «lib».print",
        real=r"^ +print\(",
        scenes=(
            _scene(
                """
 def «verb»_«noun»(«lib», value):
-    print("«noun»", value)
+    «»
     «lib».print(value)
-    print(value)
+    «»
     return value + «n»
""",
                imports="import contextlib\nimport io\nfrom unittest.mock import Mock",
                test_silent=(
                    "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
                    "    self.assertEqual(«mod».«verb»_«noun»(Mock(), 1), «n» + 1)\n"
                    'self.assertEqual(out.getvalue(), "")'
                ),
                test_kept="«lib» = Mock()\n«mod».«verb»_«noun»(«lib», 2)\n«lib».print.assert_called_once_with(2)",
                overbroad=("$F($$$ARGS)", ""),
            ),
        ),
    ),
    Rule(
        name="python-delete-breakpoint",
        language="python",
        kind="delete",
        pattern="breakpoint()",
        replacement="",
        instructions=(
            "Delete the forgotten `breakpoint()` calls",
            "Remove every `breakpoint()`",
            "Drop the `breakpoint()` statements",
            "The code must not stop in the debugger: delete `breakpoint()`",
        ),
        think=(
            "The breakpoint calls are debug leftovers without arguments, so match them literally and delete.",
            "Match the plain breakpoint call and replace it by nothing.",
        ),
        decision="delete breakpoint calls",
        keep="keep «lib».breakpoint",
        real=r"^ +breakpoint\(\)",
        scenes=(
            _scene(
                """
 def «verb»_«noun»(«lib», value):
-    breakpoint()
+    «»
     if value > «n»:
         «lib».breakpoint()
     return value - «n»
""",
                imports="from unittest.mock import Mock, patch",
                test_no_stop=(
                    'with patch("sys.breakpointhook") as hook:\n'
                    "    «mod».«verb»_«noun»(Mock(), 1)\n"
                    "hook.assert_not_called()"
                ),
                test_kept=(
                    '«lib» = Mock()\nwith patch("sys.breakpointhook"):\n    «mod».«verb»_«noun»(«lib», 100)\n'
                    "«lib».breakpoint.assert_called_once_with()"
                ),
                overbroad=("$F()", "None"),
            ),
        ),
    ),
    Rule(
        name="python-delete-debug",
        language="python",
        kind="delete",
        pattern="log.debug($$$ARGS)",
        replacement="",
        instructions=(
            "Delete the `log.debug` calls",
            "Remove every `log.debug(...)` statement",
            "Drop debug logging: delete `log.debug` calls",
            "`log.debug` is too noisy; remove its calls",
        ),
        think=(
            "Debug logging is noise here. Match log.debug with any arguments and delete it.",
            "Match only the debug level of log and replace the call by nothing.",
        ),
        decision="delete log.debug calls",
        keep="keep log.info",
        real=r"^ +log\.debug\(",
        scenes=(
            _scene(
                """
 import logging
 
 log = logging.getLogger("«mod»")
 
 
 def «verb»_«noun»(value):
-    log.debug("«noun» %s", value)
+    «»
     log.info("«word»")
     return value
""",
                test_quiet=(
                    'with self.assertLogs("«mod»", "DEBUG") as logs:\n    «mod».«verb»_«noun»(«n»)\n'
                    'self.assertEqual([record.levelname for record in logs.records], ["INFO"])'
                ),
                test_value=(
                    'with self.assertLogs("«mod»", "INFO"):\n    self.assertEqual(«mod».«verb»_«noun»(«n»), «n»)'
                ),
                overbroad=("log.$LEVEL($$$ARGS)", ""),
            ),
        ),
    ),
    Rule(
        name="python-delete-trace",
        language="python",
        kind="delete",
        pattern="«lib».trace($$$ARGS)",
        replacement="",
        instructions=(
            "Delete the `«lib».trace` calls",
            "Remove every `«lib».trace(...)` statement",
            "`«lib».trace` is gone; drop its calls",
            "Drop the calls of `«lib».trace`",
        ),
        think=(
            "«lib».trace no longer exists. Match its calls with any arguments and delete them.",
            "Match trace on «lib» only and replace the call by nothing.",
        ),
        decision="delete «lib».trace calls",
        keep="keep «other».trace",
        scenes=(
            _scene(
                """
 import «lib»
 
 
 def «verb»_«noun»(«other», value):
-    «lib».trace("«noun»", value)
+    «»
     «other».trace(value)
     return «lib».«verb»(value)
""",
                others={"«lib».py": "\n def «verb»(value):\n     return value * «n»\n"},
                imports="from unittest.mock import Mock",
                test_deleted="self.assertEqual(«mod».«verb»_«noun»(Mock(), 2), 2 * «n»)",
                test_kept="«other» = Mock()\n«mod».«verb»_«noun»(«other», 3)\n«other».trace.assert_called_once_with(3)",
                overbroad=("$M.trace($$$ARGS)", ""),
            ),
        ),
    ),
    Rule(
        name="python-print-to-log",
        language="python",
        kind="log",
        pattern="print($X)",
        replacement="log.info($X)",
        instructions=(
            "Log with `log.info` instead of `print`",
            "Replace `print(x)` with `log.info(x)`",
            "Send messages to the logger: `print(x)` becomes `log.info(x)`",
            "Use `log.info` where the code prints one value",
        ),
        think=(
            "Messages belong in the log. Match print with one argument, so prints to a file stay.",
            "Bind the single printed value and pass it to log.info.",
        ),
        decision="use log.info for print",
        keep="keep prints to files",
        real=r"^ +print\(\w+\)",
        scenes=(
            _scene(
                """
 import logging
 
 log = logging.getLogger("«mod»")
 
 
 def «verb»_«noun»(value, out):
-    print("«word»")
-    print(value)
+    log.info("«word»")
+    log.info(value)
     print(value, file=out)
""",
                imports="import io",
                test_logged=(
                    'with self.assertLogs("«mod»", "INFO") as logs:\n    «mod».«verb»_«noun»(«n», io.StringIO())\n'
                    'self.assertEqual([record.getMessage() for record in logs.records], ["«word»", "«n»"])'
                ),
                test_kept=(
                    'out = io.StringIO()\n«mod».«verb»_«noun»(«n», out)\nself.assertEqual(out.getvalue(), "«n»\\n")'
                ),
                overbroad=("print($X, $$$REST)", "log.info($X)"),
            ),
        ),
    ),
    Rule(
        name="python-warn-to-warning",
        language="python",
        kind="log",
        pattern="log.warn($$$ARGS)",
        replacement="log.warning($$$ARGS)",
        instructions=(
            "Replace the deprecated `log.warn` with `log.warning`",
            "Use `log.warning` instead of `log.warn`",
            "`log.warn` is deprecated; call `log.warning`",
            "Rename `log.warn(...)` to `log.warning(...)`",
        ),
        think=(
            "log.warn is a deprecated alias of log.warning. Keep every argument and leave other modules.",
            "Match warn on log only and call warning with the same arguments.",
        ),
        decision="use log.warning",
        keep="keep «other».warn",
        real=r"\blog\.warn\(",
        scenes=(
            _scene(
                """
 def «verb»_«noun»(log, «other», value):
-    log.warn("«word» %s", value)
+    log.warning("«word» %s", value)
     if value > «n»:
-        log.warn("too large")
+        log.warning("too large")
     «other».warn(value)
""",
                imports="from unittest.mock import Mock",
                test_warning=(
                    "log = Mock()\n"
                    "«mod».«verb»_«noun»(log, Mock(), 1)\n"
                    'log.warning.assert_called_once_with("«word» %s", 1)'
                ),
                test_kept=(
                    "«other» = Mock()\n«mod».«verb»_«noun»(Mock(), «other», 3)\n«other».warn.assert_called_once_with(3)"
                ),
                overbroad=("$L.warn($$$ARGS)", "$L.warning($$$ARGS)"),
            ),
        ),
    ),
    Rule(
        name="python-log-exception",
        language="python",
        kind="log",
        pattern="log.error($$$ARGS)",
        replacement="log.exception($$$ARGS)",
        instructions=(
            "Log with `log.exception` instead of `log.error` to keep the traceback",
            "Replace `log.error` with `log.exception`",
            "Error logs lack the traceback; call `log.exception`, not `log.error`",
            "Use `log.exception(...)` where the code calls `log.error(...)`",
        ),
        think=(
            "log.error drops the traceback; log.exception keeps it. Pass the same arguments.",
            "Match error on log only and call exception with the same arguments.",
        ),
        decision="use log.exception",
        keep="keep «other».error",
        real=r"^ +log\.error\(",
        scenes=(
            _scene(
                """
 def «verb»_«noun»(log, «other», value):
     try:
         return «n» // value
     except ZeroDivisionError:
-        log.error("«word» failed")
+        log.exception("«word» failed")
         «other».error(value)
         return None
""",
                imports="from unittest.mock import Mock",
                test_exception=(
                    "log = Mock()\n"
                    "«mod».«verb»_«noun»(log, Mock(), 0)\n"
                    'log.exception.assert_called_once_with("«word» failed")'
                ),
                test_kept=(
                    "«other» = Mock()\n"
                    "«mod».«verb»_«noun»(Mock(), «other», 0)\n"
                    "«other».error.assert_called_once_with(0)"
                ),
                overbroad=("$L.error($$$ARGS)", "$L.exception($$$ARGS)"),
            ),
        ),
    ),
    Rule(
        name="python-print-to-stderr",
        language="python",
        kind="log",
        pattern="print($X)",
        replacement="print($X, file=sys.stderr)",
        instructions=(
            "Print to `sys.stderr` where `print` gets one value",
            "Replace `print(x)` with `print(x, file=sys.stderr)`",
            "Messages go to stderr: add `file=sys.stderr` to `print(x)`",
            "Send one-argument prints to `sys.stderr`",
        ),
        think=(
            "Messages belong on stderr. Match print with one argument and add the file.",
            "Bind the single printed value and print it to sys.stderr; other prints stay.",
        ),
        decision="print to sys.stderr",
        keep="keep prints with an end",
        scenes=(
            _scene(
                """
 import sys
 
 
 def «verb»_«noun»(value):
-    print(value)
+    print(value, file=sys.stderr)
     print(value + «n», end="")
""",
                imports="import contextlib\nimport io",
                test_stderr=(
                    "with contextlib.redirect_stderr(io.StringIO()) as err:\n"
                    "    with contextlib.redirect_stdout(io.StringIO()):\n"
                    "        «mod».«verb»_«noun»(3)\n"
                    'self.assertEqual(err.getvalue(), "3\\n")'
                ),
                test_kept=(
                    "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
                    "    with contextlib.redirect_stderr(io.StringIO()):\n"
                    "        «mod».«verb»_«noun»(0)\n"
                    'self.assertTrue(out.getvalue().endswith("«n»"))'
                ),
                overbroad=("print($X, $$$REST)", "print($X, file=sys.stderr)"),
            ),
        ),
    ),
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
