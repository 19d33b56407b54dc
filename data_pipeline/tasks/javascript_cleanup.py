"""JavaScript rules that delete debug code or move output elsewhere."""

from data_pipeline.tasks.rule import Rule
from data_pipeline.tasks.scenes import javascript_scene

# Collects what console.log prints while `action` runs.
_CAPTURE = """const captured = (action) => {
  const lines = [];
  const real = console.log;
  console.log = (...args) => lines.push(args.join(" "));
  try {
    action();
  } finally {
    console.log = real;
  }
  return lines;
};"""

RULES = (
    Rule(
        name="javascript-delete-log",
        language="javascript",
        kind="delete",
        pattern="console.log($$$ARGS);",
        replacement="",
        instructions=(
            "Delete the debug `console.log` calls",
            "Remove every `console.log(...);` statement",
            "Drop the leftover `console.log` calls",
            "No output on stdout: delete the `console.log` statements",
        ),
        think=(
            "The logs are debug leftovers. Match console.log with any arguments, semicolon included, and delete it.",
            "Match the whole console.log statement and replace it by nothing.",
        ),
        decision="delete console.log calls",
        keep="keep «lib».log",
        real=r"^ +console\.log\(.*\);$",
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(«lib», value) {
-  console.log("«noun»", value);
+  «»
   «lib».log(value);
-  console.log(value);
+  «»
   return value + «n»;
 }
""",
                "«verb»«Noun»",
                setup=_CAPTURE,
                silent="assert.deepEqual(captured(() => «verb»«Noun»({ log: () => 0 }, 1)), []);",
                kept=(
                    "const seen = [];\n"
                    "captured(() => «verb»«Noun»({ log: (x) => seen.push(x) }, 2));\n"
                    "assert.deepEqual(seen, [2]);"
                ),
                overbroad=("$M.log($$$ARGS);", ""),
            ),
        ),
    ),
    Rule(
        name="javascript-delete-debugger",
        language="javascript",
        kind="delete",
        pattern="debugger;",
        replacement="",
        instructions=(
            "Delete the forgotten `debugger;` statements",
            "Remove every `debugger;`",
            "Drop the `debugger;` statements",
            "The code must not stop in the debugger: delete `debugger;`",
        ),
        think=(
            "The debugger statements are leftovers without arguments, so match them literally and delete.",
            "Match the whole debugger statement and replace it by nothing.",
        ),
        decision="delete debugger statements",
        keep="keep «lib».debugger",
        real=r"^ +debugger;",
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(«lib», value) {
-  debugger;
+  «»
   «lib».debugger(value);
   return value - «n»;
 }
""",
                "«verb»«Noun»",
                gone="assert.equal(/^\\s*debugger/m.test(«verb»«Noun».toString()), false);",
                kept=(
                    "const seen = [];\n"
                    "«verb»«Noun»({ debugger: (x) => seen.push(x) }, 2);\n"
                    "assert.deepEqual(seen, [2]);"
                ),
                overbroad=("«lib».debugger($$$ARGS);", ""),
            ),
        ),
    ),
    Rule(
        name="javascript-delete-trace",
        language="javascript",
        kind="delete",
        pattern="«lib».trace($$$ARGS);",
        replacement="",
        instructions=(
            "Delete the `«lib».trace` calls",
            "Remove every `«lib».trace(...);` statement",
            "`«lib».trace` is gone; drop its calls",
            "Drop the calls of `«lib».trace`",
        ),
        think=(
            "«lib».trace no longer exists. Match its statements with any arguments and delete them.",
            "Match trace on «lib» only, semicolon included, and replace the call by nothing.",
        ),
        decision="delete «lib».trace calls",
        keep="keep «other».trace",
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(«lib», «other», value) {
-  «lib».trace("«noun»", value);
+  «»
   «other».trace(value);
   return «lib».«verb»(value);
 }
""",
                "«verb»«Noun»",
                setup="const «lib» = { «verb»: (x) => x * «n» };",
                deleted="assert.equal(«verb»«Noun»(«lib», { trace: () => 0 }, 2), 2 * «n»);",
                kept=(
                    "const seen = [];\n"
                    "«verb»«Noun»(«lib», { trace: (x) => seen.push(x) }, 3);\n"
                    "assert.deepEqual(seen, [3]);"
                ),
                overbroad=("$M.trace($$$ARGS);", ""),
            ),
        ),
    ),
    Rule(
        name="javascript-log-to-logger",
        language="javascript",
        kind="log",
        pattern="console.log($$$ARGS)",
        replacement="«lib».info($$$ARGS)",
        instructions=(
            "Log with `«lib».info` instead of `console.log`",
            "Replace `console.log(...)` with `«lib».info(...)`",
            "Messages belong in `«lib»`: call `«lib».info`, not `console.log`",
            "Use `«lib».info` where the code calls `console.log`",
        ),
        think=(
            "Messages belong in «lib». Match console.log with any arguments and pass them to info.",
            "Keep every argument of console.log and send it to «lib».info.",
        ),
        decision="use «lib».info for console.log",
        keep="keep «other».log",
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(«lib», «other», value) {
-  console.log("«word»", value);
+  «lib».info("«word»", value);
   «other».log(value);
   return value + «n»;
 }
""",
                "«verb»«Noun»",
                setup=_CAPTURE,
                logged=(
                    "const seen = [];\n"
                    "const «lib» = { info: (...args) => seen.push(args) };\n"
                    "captured(() => «verb»«Noun»(«lib», { log: () => 0 }, 1));\n"
                    'assert.deepEqual(seen, [["«word»", 1]]);'
                ),
                kept=(
                    "const seen = [];\n"
                    "captured(() => «verb»«Noun»({ info: () => 0 }, { log: (x) => seen.push(x) }, 2));\n"
                    "assert.deepEqual(seen, [2]);"
                ),
                overbroad=("$M.log($$$ARGS)", "«lib».info($$$ARGS)"),
            ),
        ),
    ),
    Rule(
        name="javascript-log-to-error",
        language="javascript",
        kind="log",
        pattern="console.log($$$ARGS)",
        replacement="console.error($$$ARGS)",
        instructions=(
            "Write messages to stderr: `console.error` instead of `console.log`",
            "Replace `console.log(...)` with `console.error(...)`",
            "Stdout must stay clean; call `console.error`, not `console.log`",
            "Use `console.error` where the code calls `console.log`",
        ),
        think=(
            "Messages belong on stderr. Match console.log with any arguments and call console.error.",
            "Keep every argument of console.log and send it to console.error.",
        ),
        decision="use console.error for console.log",
        keep="keep «other».log",
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(«other», value) {
-  console.log("«word»", value);
+  console.error("«word»", value);
   «other».log(value);
   return value * «n»;
 }
""",
                "«verb»«Noun»",
                setup=_CAPTURE + "\nconsole.error = () => 0;",
                silent="assert.deepEqual(captured(() => «verb»«Noun»({ log: () => 0 }, 1)), []);",
                kept=(
                    "const seen = [];\ncaptured(() => «verb»«Noun»({ log: (x) => seen.push(x) }, 2));\n"
                    "assert.deepEqual(seen, [2]);"
                ),
                overbroad=("$M.log($$$ARGS)", "console.error($$$ARGS)"),
            ),
        ),
    ),
)
