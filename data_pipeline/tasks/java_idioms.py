"""Java rules that swap one idiom for a better one."""

from data_pipeline.tasks.rule import Rule
from data_pipeline.tasks.scenes import java_scene

RULES = (
    Rule(
        name="java-is-empty",
        language="java",
        kind="idiom",
        pattern="$X.size() == 0",
        replacement="$X.isEmpty()",
        instructions=(
            "Replace `x.size() == 0` with `x.isEmpty()`",
            "Test emptiness with `isEmpty()` instead of `size() == 0`",
            "Counting a collection is slow; write `x.isEmpty()` for `x.size() == 0`",
            "Use `isEmpty()` where the code compares `size()` with 0",
        ),
        think=(
            "isEmpty says what is meant and never counts. Match size compared with zero; other sizes stay.",
            "Bind the collection whose size is compared with zero and call isEmpty on it.",
        ),
        decision="test emptiness with isEmpty",
        keep="keep other sizes",
        real=r"\.size\(\) == 0\b",
        scenes=(
            java_scene(
                """
     static int «verb»«Noun»(Collection<String> rows, List<String> others) {
-        if (rows.size() == 0) {
+        if (rows.isEmpty()) {
             return «n»;
         }
         return others.size() == 1 ? 1 : 2;
     }
""",
                imports="import java.util.*;",
                setup=(
                    "static class Endless extends AbstractCollection<String> {\n"
                    '    public Iterator<String> iterator() { return List.of("x").iterator(); }\n'
                    "    public int size() { throw new IllegalStateException(); }\n"
                    "    public boolean isEmpty() { return true; }\n"
                    "}"
                ),
                empty="assert «Mod».«verb»«Noun»(new Endless(), List.of()) == «n»;",
                kept='assert «Mod».«verb»«Noun»(List.of("a"), List.of("b")) == 1;',
                overbroad=("$X.size() == $N", "$X.isEmpty()"),
            ),
        ),
    ),
    Rule(
        name="java-string-equals",
        language="java",
        kind="idiom",
        pattern="$A == $B",
        replacement="$B.equals($A)",
        constraints={"B": {"kind": "string_literal"}},
        instructions=(
            "Compare with string literals by `equals`, literal first, instead of `==`",
            'Replace `s == "text"` with `"text".equals(s)`',
            '`==` compares references; write `"text".equals(s)` for string literals',
            'Use `"text".equals(s)` where a string is compared by `==` with a literal',
        ),
        think=(
            "Identity of strings is accidental. A constraint on B takes string literals only; call their equals.",
            "Bind both sides, demand a string literal on the right, and call equals on the literal.",
        ),
        decision="compare strings with equals",
        keep="keep other comparisons",
        difficulty=3,
        real=r' == "\w*"',
        scenes=(
            java_scene(
                """
     static int «verb»«Noun»(String «field», int «kw») {
-        if («field» == "«word»") {
+        if ("«word»".equals(«field»)) {
             return 1;
         }
         return «kw» == «n» ? 2 : 3;
     }
""",
                equal='assert «Mod».«verb»«Noun»(new String("«word»"), 0) == 1;',
                kept="assert «Mod».«verb»«Noun»(null, «n») == 2;",
                overbroad=("$A == $B", "$B.equals($A)"),
            ),
        ),
    ),
    Rule(
        name="java-string-unequal",
        language="java",
        kind="idiom",
        pattern="$A != $B",
        replacement="!$B.equals($A)",
        constraints={"B": {"kind": "string_literal"}},
        instructions=(
            "Compare with string literals by `!equals`, literal first, instead of `!=`",
            'Replace `s != "text"` with `!"text".equals(s)`',
            '`!=` compares references; write `!"text".equals(s)` for string literals',
            'Use `!"text".equals(s)` where a string is compared by `!=` with a literal',
        ),
        think=(
            "Identity of strings is accidental. A constraint on B takes string literals only; negate their equals.",
            "Bind both sides, demand a string literal on the right, and negate equals on the literal.",
        ),
        decision="compare strings with equals",
        keep="keep other comparisons",
        difficulty=3,
        real=r' != "\w*"',
        scenes=(
            java_scene(
                """
     static boolean «verb»«Noun»(String «field», String «field2») {
         boolean known = «field2» != null;
-        return known && «field» != "«word»";
+        return known && !"«word»".equals(«field»);
     }
""",
                equal='assert !«Mod».«verb»«Noun»(new String("«word»"), "a");',
                kept='assert !«Mod».«verb»«Noun»("«word2»", null) && «Mod».«verb»«Noun»(null, "a");',
                overbroad=("$A != $B", "!$B.equals($A)"),
            ),
        ),
    ),
    Rule(
        name="java-boxed-integer",
        language="java",
        kind="idiom",
        pattern="new Integer($X)",
        replacement="Integer.valueOf($X)",
        instructions=(
            "Replace `new Integer(x)` with `Integer.valueOf(x)`",
            "The constructor of `Integer` is deprecated; call `Integer.valueOf`",
            "Box with `Integer.valueOf(x)`, not with `new Integer(x)`",
            "Use `Integer.valueOf` wherever an `Integer` is made with `new`",
        ),
        think=(
            "new Integer always allocates and is deprecated; Integer.valueOf shares small numbers. Keep the argument.",
            "Match the Integer constructor with its one argument and call valueOf.",
        ),
        decision="box with Integer.valueOf",
        keep="keep new «Noun»",
        real=r"\bnew Integer\(",
        scenes=(
            java_scene(
                """
     static Object «verb»«Noun»(int value) {
-        return new Integer(value);
+        return Integer.valueOf(value);
     }
 
     static Object wrap(int value) {
         return new «Noun»(value);
     }
""",
                others={"«Noun».java": " record «Noun»(int value) {\n }\n"},
                shared="assert «Mod».«verb»«Noun»(«n») == «Mod».«verb»«Noun»(«n»);",
                kept="assert «Mod».wrap(1) instanceof «Noun»;",
                overbroad=("new $C($X)", "Integer.valueOf($X)"),
            ),
        ),
    ),
    Rule(
        name="java-boxed-boolean",
        language="java",
        kind="idiom",
        pattern="new Boolean($X)",
        replacement="Boolean.valueOf($X)",
        instructions=(
            "Replace `new Boolean(x)` with `Boolean.valueOf(x)`",
            "The constructor of `Boolean` is deprecated; call `Boolean.valueOf`",
            "Box with `Boolean.valueOf(x)`, not with `new Boolean(x)`",
            "Use `Boolean.valueOf` wherever a `Boolean` is made with `new`",
        ),
        think=(
            "new Boolean makes a third truth value by identity; Boolean.valueOf shares the two. Keep the argument.",
            "Match the Boolean constructor with its one argument and call valueOf.",
        ),
        decision="box with Boolean.valueOf",
        keep="keep new «Noun»",
        real=r"\bnew Boolean\(",
        scenes=(
            java_scene(
                """
     static Object[] «verb»«Noun»(boolean «field», int «kw») {
         Object built = new «Noun»(«kw»);
-        Object flag = new Boolean(«field»);
+        Object flag = Boolean.valueOf(«field»);
         return new Object[] {flag, built};
     }
""",
                others={"«Noun».java": " record «Noun»(int value) {\n }\n"},
                shared="assert «Mod».«verb»«Noun»(true, 1)[0] == Boolean.TRUE;",
                kept="assert «Mod».«verb»«Noun»(false, «n»)[1].equals(new «Noun»(«n»));",
                overbroad=("new $C($X)", "Boolean.valueOf($X)"),
            ),
        ),
    ),
    Rule(
        name="java-string-builder",
        language="java",
        kind="idiom",
        pattern="new StringBuffer($$$ARGS)",
        replacement="new StringBuilder($$$ARGS)",
        instructions=(
            "Create `StringBuilder` objects instead of `StringBuffer` objects",
            "Replace `new StringBuffer(...)` with `new StringBuilder(...)`",
            "The buffers stay in one thread; use `new StringBuilder(...)`",
            "Use a `StringBuilder` wherever a `StringBuffer` is created",
        ),
        think=(
            "A StringBuffer locks for nothing here. Match its creation with any arguments and make a StringBuilder.",
            "Match new StringBuffer with any arguments and keep them for the StringBuilder.",
        ),
        decision="use StringBuilder",
        keep="keep StringWriter",
        scenes=(
            java_scene(
                """
     static Object[] «verb»«Noun»(int «kw») {
-        var text = new StringBuffer("«word»");
+        var text = new StringBuilder("«word»");
         var log = new StringWriter(«kw»);
-        return new Object[] {text.append(«kw»), log, new StringBuffer()};
+        return new Object[] {text.append(«kw»), log, new StringBuilder()};
     }
""",
                imports="import java.io.StringWriter;",
                built=(
                    "Object[] made = «Mod».«verb»«Noun»(«n»);\n"
                    'assert made[0] instanceof StringBuilder && made[0].toString().equals("«word»«n»");'
                ),
                kept="assert «Mod».«verb»«Noun»(«n»)[1] instanceof StringWriter;",
                overbroad=("new $C($$$ARGS)", "new StringBuilder($$$ARGS)"),
            ),
        ),
    ),
    Rule(
        name="java-list-of",
        language="java",
        kind="idiom",
        pattern="Arrays.asList($$$ARGS)",
        replacement="List.of($$$ARGS)",
        instructions=(
            "Replace `Arrays.asList(...)` with `List.of(...)`",
            "Fixed lists must not change: use `List.of` instead of `Arrays.asList`",
            "Make lists with `List.of(...)`, not with `Arrays.asList(...)`",
            "Use `List.of` wherever `Arrays.asList` is called",
        ),
        think=(
            "Arrays.asList lets callers set elements; List.of does not. Keep every argument.",
            "Match asList on Arrays with any arguments and hand them to List.of.",
        ),
        decision="make fixed lists with List.of",
        keep="keep Arrays.sort",
        scenes=(
            java_scene(
                """
     static List<Integer> «verb»«Noun»(int[] values) {
         Arrays.sort(values);
-        return Arrays.asList(values[0], «n»);
+        return List.of(values[0], «n»);
     }
""",
                imports="import java.util.*;",
                fixed=(
                    "List<Integer> list = «Mod».«verb»«Noun»(new int[] {3, 2});\n"
                    "try {\n    list.set(0, 1);\n} catch (UnsupportedOperationException expected) {\n    return;\n}\n"
                    "assert false;"
                ),
                kept="assert «Mod».«verb»«Noun»(new int[] {3, 2}).get(0) == 2;",
                overbroad=("Arrays.$M($$$ARGS)", "List.of($$$ARGS)"),
            ),
        ),
    ),
    Rule(
        name="java-get-or-default",
        language="java",
        kind="idiom",
        pattern="$M.containsKey($K) ? $M.get($K) : $D",
        replacement="$M.getOrDefault($K, $D)",
        instructions=(
            "Replace `m.containsKey(k) ? m.get(k) : d` with `m.getOrDefault(k, d)`",
            "Look keys up once: use `getOrDefault` instead of `containsKey` and `get`",
            "Use `m.getOrDefault(k, d)` for the conditional with `containsKey`",
            "Write `getOrDefault` where a conditional asks `containsKey` first",
        ),
        think=(
            "The conditional looks the key up twice. Bind map, key and default and call getOrDefault.",
            "The same map and key stand twice in the pattern, so only true lookups match getOrDefault.",
        ),
        decision="look up with getOrDefault",
        keep="keep plain containsKey",
        difficulty=2,
        real=r"\.containsKey\([\w.]+\) \? ",
        scenes=(
            java_scene(
                """
     static int «verb»«Noun»(Map<String, Integer> «noun», String key) {
-        int value = «noun».containsKey(key) ? «noun».get(key) : «n»;
+        int value = «noun».getOrDefault(key, «n»);
         return value;
     }
 
     static int known(Map<String, Integer> «noun», String key) {
         return «noun».containsKey(key) ? 7 : 0;
     }
""",
                imports="import java.util.*;",
                setup=(
                    "static class Once extends HashMap<String, Integer> {\n"
                    "    public boolean containsKey(Object key) { throw new IllegalStateException(); }\n"
                    "}"
                ),
                once='assert «Mod».«verb»«Noun»(new Once(), "«word»") == «n»;',
                kept='assert «Mod».known(Map.of("a", 1), "a") == 7;',
                overbroad=("$M.containsKey($K) ? $V : $D", "$M.getOrDefault($K, $D)"),
            ),
        ),
    ),
    Rule(
        name="java-equals-ignore-case",
        language="java",
        kind="idiom",
        pattern="$A.toLowerCase().equals($B)",
        replacement="$A.equalsIgnoreCase($B)",
        instructions=(
            "Replace `a.toLowerCase().equals(b)` with `a.equalsIgnoreCase(b)`",
            "Compare without case by `equalsIgnoreCase`, not by lower-casing one side",
            "Use `a.equalsIgnoreCase(b)` where the code says `a.toLowerCase().equals(b)`",
            "Lower-casing only one side is wrong for capitals; call `equalsIgnoreCase`",
        ),
        think=(
            "Lower-casing one side misses capitals on the other. Bind both and call equalsIgnoreCase.",
            "Match equals on a toLowerCase call and compare with equalsIgnoreCase instead.",
        ),
        decision="compare with equalsIgnoreCase",
        keep="keep plain equals",
        difficulty=2,
        real=r"\.toLowerCase\(\)\.equals\(",
        scenes=(
            java_scene(
                """
     static boolean «verb»«Noun»(String «field», String «field2») {
-        return «field».toLowerCase().equals(«field2»);
+        return «field».equalsIgnoreCase(«field2»);
     }
 
     static boolean same(String «field», String «field2») {
         return «field».equals(«field2»);
     }
""",
                capitals='assert «Mod».«verb»«Noun»("«word»", "«WORD»");',
                kept='assert !«Mod».same("«word»", "«WORD»");',
                overbroad=("$A.equals($B)", "$A.equalsIgnoreCase($B)"),
            ),
        ),
    ),
)
