"""Python rules that delete debug code or move output to a logger."""

from data_pipeline.tasks.rule import Rule
from data_pipeline.tasks.scenes import python_scene

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
            python_scene(
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
            python_scene(
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
            python_scene(
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
            python_scene(
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
            python_scene(
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
            python_scene(
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
            python_scene(
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
            python_scene(
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
)
