"""Java rules that add a guard, delete debug code or move output elsewhere."""

from data_pipeline.tasks.rule import Rule
from data_pipeline.tasks.scenes import java_scene

# Collects what is printed on standard output while an action runs.
_CAPTURE = (
    "static String captured(Runnable action) {\n"
    "    PrintStream real = System.out;\n"
    "    ByteArrayOutputStream text = new ByteArrayOutputStream();\n"
    "    System.setOut(new PrintStream(text, true));\n"
    "    try {\n        action.run();\n    } finally {\n        System.setOut(real);\n    }\n"
    "    return text.toString();\n"
    "}"
)
# A logger that keeps its messages.
_LOGGER = {
    "«Lib».java": """
 import java.util.*;
 
 class «Lib» {
     final List<Object> seen = new ArrayList<>();
 
     void info(Object message) {
         seen.add(message);
     }
 
     void debug(Object message) {
         throw new IllegalStateException();
     }
 
     void println(Object message) {
         seen.add("kept " + message);
     }
 }
"""
}

RULES = (
    Rule(
        name="java-constant-first",
        language="java",
        kind="guard",
        pattern="$A.equals($B)",
        replacement="$B.equals($A)",
        constraints={"B": {"kind": "string_literal"}},
        instructions=(
            "Call `equals` on the string literal, not on the variable",
            'Turn `s.equals("text")` into `"text".equals(s)` so that null is safe',
            "A null string must not crash: put the literal in front of `equals`",
            'Write `"text".equals(s)` where the code says `s.equals("text")`',
        ),
        think=(
            "The variable may be null, the literal never. Demand a string literal and swap both sides of equals.",
            "Bind both sides of equals, demand a string literal as argument, and call equals on it.",
        ),
        decision="call equals on the literal",
        keep="keep equals of two variables",
        difficulty=3,
        real=r'\b\w+\.equals\("',
        scenes=(
            java_scene(
                """
     static boolean «verb»«Noun»(String «field») {
-        return «field».equals("«word»");
+        return "«word»".equals(«field»);
     }
 
     static boolean same(Object «field», Object «field2») {
         return «field».equals(«field2»);
     }
""",
                setup=(
                    "static class Sly {\n    public boolean equals(Object other) { return true; }\n"
                    "    public int hashCode() { return 0; }\n}"
                ),
                missing="assert !«Mod».«verb»«Noun»(null);",
                kept='assert «Mod».same(new Sly(), "x") && !«Mod».same("x", new Sly());',
                overbroad=("$A.equals($B)", "$B.equals($A)"),
            ),
        ),
    ),
    Rule(
        name="java-objects-equals",
        language="java",
        kind="guard",
        pattern="«field».equals($X)",
        replacement="Objects.equals(«field», $X)",
        instructions=(
            "Compare `«field»` with `Objects.equals`; it may be null",
            "Replace `«field».equals(x)` with `Objects.equals(«field», x)`",
            "`«field»` may be null: use `Objects.equals(«field», x)`",
            "Make comparisons `«field».equals(x)` safe for null with `Objects.equals`",
        ),
        think=(
            "«field» may be null, and Objects.equals takes that. Match equals on «field» only.",
            "Bind what «field» is compared with and pass both to Objects.equals.",
        ),
        decision="compare «field» with Objects.equals",
        keep="keep «field2».equals",
        scenes=(
            java_scene(
                """
     static boolean «verb»«Noun»(Object «field», Object «field2») {
-        boolean same = «field».equals("«word»");
+        boolean same = Objects.equals(«field», "«word»");
         return same || «field2».equals(«n»);
     }
""",
                imports="import java.util.Objects;",
                missing="assert «Mod».«verb»«Noun»(null, «n»);",
                kept=(
                    "try {\n    «Mod».«verb»«Noun»(1, null);\n"
                    "} catch (NullPointerException expected) {\n    return;\n}\n"
                    "assert false;"
                ),
                overbroad=("$A.equals($X)", "Objects.equals($A, $X)"),
            ),
        ),
    ),
    Rule(
        name="java-require-non-null",
        language="java",
        kind="guard",
        pattern="this.«field» = «field»;",
        replacement="this.«field» = Objects.requireNonNull(«field»);",
        instructions=(
            "Refuse a null `«field»` with `Objects.requireNonNull` where it is stored",
            "Store `Objects.requireNonNull(«field»)` in `this.«field»`",
            "`«field»` must not be null: check it in the assignment to `this.«field»`",
            "Guard `this.«field» = «field»` with `Objects.requireNonNull`",
        ),
        think=(
            "«field» must not be null. Match its assignment and wrap the value in Objects.requireNonNull.",
            "Match the assignment of «field» only and add requireNonNull; «field2» may be null.",
        ),
        decision="refuse a null «field»",
        keep="keep «field2» optional",
        scenes=(
            java_scene(
                """
     private final String «field»;
     private String «field2»;
 
     «Mod»(String «field», String «field2») {
-        this.«field» = «field»;
+        this.«field» = Objects.requireNonNull(«field»);
         this.«field2» = «field2»;
     }
 
     public String toString() {
         return «field» + "«n»" + «field2»;
     }
""",
                imports="import java.util.Objects;",
                refused=(
                    'try {\n    new «Mod»(null, "a");\n} catch (NullPointerException expected) {\n    return;\n}\n'
                    "assert false;"
                ),
                kept='assert new «Mod»("a", null).toString().equals("a«n»null");',
                overbroad=("this.$F = $V;", "this.$F = Objects.requireNonNull($V);"),
            ),
        ),
    ),
    Rule(
        name="java-guard-division",
        language="java",
        kind="guard",
        pattern="return $A / $B;",
        replacement="return $B == 0 ? 0 : $A / $B;",
        instructions=(
            "Return 0 instead of dividing by zero in `return a / b`",
            "Guard returned divisions: 0 when the divisor is 0",
            "`return a / b` must give 0 when `b` is 0",
            "Make returned quotients `a / b` safe for a zero divisor by returning 0",
        ),
        think=(
            "A zero divisor throws. Bind both operands of the return and give 0 when the divisor is zero.",
            "Match returned divisions and add a condition on the divisor.",
        ),
        decision="return 0 for zero divisors",
        keep="keep other divisions",
        difficulty=2,
        scenes=(
            java_scene(
                """
     static int «field»Rate(int «noun», int «noun2») {
-        return «noun» / «noun2»;
+        return «noun2» == 0 ? 0 : «noun» / «noun2»;
     }
 
     static int pages(int «noun», int size) {
         int full = «noun» / size;
         return full + «n»;
     }
""",
                zero="assert «Mod».«field»Rate(«n», 0) == 0 && «Mod».«field»Rate(6, 3) == 2;",
                kept=(
                    "try {\n    «Mod».pages(1, 0);\n} catch (ArithmeticException expected) {\n    return;\n}\n"
                    "assert false;"
                ),
                overbroad=("$A / $B", "($B == 0 ? 0 : $A / $B)"),
            ),
        ),
    ),
    Rule(
        name="java-guard-null",
        language="java",
        kind="guard",
        pattern="return «noun».«field»();",
        replacement="return «noun» == null ? null : «noun».«field»();",
        instructions=(
            "Return null when `«noun»` is missing instead of calling `«noun».«field»()`",
            "Guard `return «noun».«field»()` against a missing `«noun»`",
            "`«noun»` may be null: call `«noun».«field»()` only if it is there",
            "Make `return «noun».«field»()` safe when `«noun»` is null",
        ),
        think=(
            "«noun» may be null, so call «field» only if it is there and return null otherwise.",
            "Match the return of «noun».«field» and add a condition on «noun».",
        ),
        decision="guard «noun» against null",
        keep="keep other returns",
        scenes=(
            java_scene(
                """
     record «Noun»(String «field», String «field2») {
     }
 
     static String «field»Of(«Noun» «noun») {
-        return «noun».«field»();
+        return «noun» == null ? null : «noun».«field»();
     }
 
     static String «field2»Of(«Noun» «noun») {
         return «noun».«field2»();
     }
""",
                missing='assert «Mod».«field»Of(null) == null && «Mod».«field»Of(new «Mod».«Noun»("a", "b")) == "a";',
                kept=(
                    "try {\n    «Mod».«field2»Of(null);\n} catch (NullPointerException expected) {\n    return;\n}\n"
                    "assert false;"
                ),
                overbroad=("return «noun».$M();", "return «noun» == null ? null : «noun».$M();"),
            ),
        ),
    ),
    Rule(
        name="java-delete-print",
        language="java",
        kind="delete",
        pattern="System.out.println($$$ARGS);",
        replacement="",
        instructions=(
            "Delete the debug `System.out.println` calls",
            "Remove every `System.out.println(...);` statement",
            "Drop the leftover `System.out.println` calls",
            "No output on stdout: delete the `System.out.println` statements",
        ),
        think=(
            "The System.out.println calls are debug leftovers. Match the statement with any arguments and delete it.",
            "Match the whole System.out.println statement and replace it by nothing.",
        ),
        decision="delete System.out.println calls",
        keep="keep other println calls",
        real=r"^ +System\.out\.println\(.*\);$",
        scenes=(
            java_scene(
                """
     static int «verb»«Noun»(«Lib» «lib», int value) {
-        System.out.println("«noun» " + value);
+        «»
         «lib».println(value);
-        System.out.println();
+        «»
         return value + «n»;
     }
""",
                imports="import java.io.*;",
                others=_LOGGER,
                setup=_CAPTURE,
                silent='assert captured(() -> «Mod».«verb»«Noun»(new «Lib»(), 1)).equals("");',
                kept=(
                    "«Lib» lib = new «Lib»();\ncaptured(() -> «Mod».«verb»«Noun»(lib, 2));\n"
                    'assert lib.seen.get(0).equals("kept 2");'
                ),
                overbroad=("$O.println($$$ARGS);", ""),
            ),
        ),
    ),
    Rule(
        name="java-delete-debug",
        language="java",
        kind="delete",
        pattern="«lib».debug($$$ARGS);",
        replacement="",
        instructions=(
            "Delete the `«lib».debug` calls",
            "Remove every `«lib».debug(...);` statement",
            "`«lib».debug` is gone; drop its calls",
            "Drop the calls of `«lib».debug`",
        ),
        think=(
            "«lib».debug no longer works. Match its statements with any arguments and delete them.",
            "Match debug on «lib» only, semicolon included, and replace the call by nothing.",
        ),
        decision="delete «lib».debug calls",
        keep="keep «lib».info",
        scenes=(
            java_scene(
                """
     static int «verb»«Noun»(«Lib» «lib», int value) {
-        «lib».debug("«word»");
+        «»
         «lib».info(value);
         return value - «n»;
     }
""",
                others=_LOGGER,
                deleted="assert «Mod».«verb»«Noun»(new «Lib»(), «n») == 0;",
                kept=("«Lib» lib = new «Lib»();\n«Mod».«verb»«Noun»(lib, 2);\nassert lib.seen.get(0).equals(2);"),
                overbroad=("«lib».$M($$$ARGS);", ""),
            ),
        ),
    ),
    Rule(
        name="java-print-to-logger",
        language="java",
        kind="log",
        pattern="System.out.println($X);",
        replacement="«lib».info($X);",
        instructions=(
            "Log with `«lib».info` instead of `System.out.println`",
            "Replace `System.out.println(x)` with `«lib».info(x)`",
            "Messages belong in `«lib»`: call `«lib».info`, not `System.out.println`",
            "Use `«lib».info` where the code calls `System.out.println`",
        ),
        think=(
            "Messages belong in «lib». Match System.out.println with its argument and pass it to info.",
            "Keep the argument of System.out.println and send it to «lib».info.",
        ),
        decision="use «lib».info for println",
        keep="keep other println calls",
        scenes=(
            java_scene(
                """
     static int «verb»«Noun»(«Lib» «lib», int value) {
-        System.out.println("«word» " + value);
+        «lib».info("«word» " + value);
         «lib».println(value);
         return value + «n»;
     }
""",
                imports="import java.io.*;\nimport java.util.*;",
                others=_LOGGER,
                setup=_CAPTURE,
                logged=(
                    "«Lib» lib = new «Lib»();\ncaptured(() -> «Mod».«verb»«Noun»(lib, 1));\n"
                    'assert lib.seen.equals(List.of("«word» 1", "kept 1")) : lib.seen;'
                ),
                overbroad=("$O.println($X);", "«lib».info($X);"),
            ),
        ),
    ),
    Rule(
        name="java-stack-trace",
        language="java",
        kind="log",
        pattern="$E.printStackTrace();",
        replacement="«lib».info($E);",
        instructions=(
            "Report exceptions with `«lib».info` instead of `printStackTrace`",
            "Replace `e.printStackTrace()` with `«lib».info(e)`",
            "Exceptions belong in `«lib»`: pass them to `«lib».info`",
            "Hand the exception to `«lib».info` where the code calls `printStackTrace`",
        ),
        think=(
            "printStackTrace writes past the log. Bind the exception and hand it to «lib».info.",
            "Match printStackTrace without arguments on any exception and pass that exception to info.",
        ),
        decision="report exceptions with «lib».info",
        keep="keep traces to a writer",
        scenes=(
            java_scene(
                """
     static int «verb»«Noun»(«Lib» «lib», PrintWriter out, String text) {
         try {
             return Integer.parseInt(text);
         } catch (NumberFormatException problem) {
-            problem.printStackTrace();
+            «lib».info(problem);
             problem.printStackTrace(out);
             return «n»;
         }
     }
""",
                imports="import java.io.*;",
                others=_LOGGER,
                logged=(
                    "«Lib» lib = new «Lib»();\n"
                    '«Mod».«verb»«Noun»(lib, new PrintWriter(new StringWriter()), "x");\n'
                    "assert lib.seen.get(0) instanceof NumberFormatException;"
                ),
                kept=(
                    "StringWriter text = new StringWriter();\n"
                    '«Mod».«verb»«Noun»(new «Lib»(), new PrintWriter(text, true), "x");\n'
                    'assert text.toString().contains("NumberFormat");'
                ),
                overbroad=("$E.printStackTrace($$$A);", "«lib».info($E);"),
            ),
        ),
    ),
)
