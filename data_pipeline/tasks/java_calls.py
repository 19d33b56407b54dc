"""Java rules that rename a call or change its arguments."""

from typing import Any

from data_pipeline.tasks.rule import Rule, Scene
from data_pipeline.tasks.scenes import java_scene


def _two_libraries(
    old: str, new: str, kept_call: str, lib: str, other: str, overbroad: tuple[str, str], **more: Any
) -> Scene:
    """A class that calls «Lib» (to rewrite) and «Other» (to keep); `lib` and `other` are members of those classes."""
    return java_scene(
        f"""
     static int run(int key) {{
-        int value = {old};
+        int value = {new};
         return value * 1000 + {kept_call};
     }}
 
     static int half(int key) {{
-        return {old} / 2;
+        return {new} / 2;
     }}
""",
        others={
            "«Lib».java": f" class «Lib» {{\n     {lib}\n }}\n",
            "«Other».java": f" class «Other» {{\n     {other}\n }}\n",
        },
        overbroad=overbroad,
        **more,
    )


RULES = (
    Rule(
        name="java-rename-static-call",
        language="java",
        kind="rename",
        pattern="«Lib».«verb»«Noun»($$$ARGS)",
        replacement="«Lib».«verb2»«Noun»($$$ARGS)",
        instructions=(
            "Rename calls of `«Lib».«verb»«Noun»` to `«Lib».«verb2»«Noun»`",
            "`«Lib».«verb»«Noun»` is now called `«Lib».«verb2»«Noun»`; update its callers",
            "Replace `«Lib».«verb»«Noun»(...)` with `«Lib».«verb2»«Noun»(...)`",
            "Use `«Lib».«verb2»«Noun»` wherever `«Lib».«verb»«Noun»` is called",
        ),
        think=(
            "«Lib».«verb»«Noun» was renamed. Match only that class's calls and keep every argument.",
            "Rename the call to «verb2»«Noun»; the class in the pattern protects «Other».",
        ),
        decision="use «verb2»«Noun»",
        keep="keep «Other».«verb»«Noun»",
        scenes=(
            _two_libraries(
                "«Lib».«verb»«Noun»(key)",
                "«Lib».«verb2»«Noun»(key)",
                "«Other».«verb»«Noun»(key)",
                "static int «verb2»«Noun»(int key) { return key + «n»; }",
                "static int «verb»«Noun»(int key) { return key; }",
                ("$M.«verb»«Noun»($$$ARGS)", "$M.«verb2»«Noun»($$$ARGS)"),
                renamed="assert «Mod».half(«n») == «n»;",
                kept="assert «Mod».run(4) == 1000 * («n» + 4) + 4;",
                stands_before=False,
            ),
        ),
    ),
    Rule(
        name="java-rename-method",
        language="java",
        kind="rename",
        pattern="$OBJ.«verb»«Noun»($$$ARGS)",
        replacement="$OBJ.«verb2»«Noun»($$$ARGS)",
        instructions=(
            "Rename the method `«verb»«Noun»` to `«verb2»«Noun»` in its calls",
            "Method `«verb»«Noun»` is now `«verb2»«Noun»`; update calls on any object",
            "Call method `«verb2»«Noun»` instead of method `«verb»«Noun»`",
            "Objects lost `«verb»«Noun»`; call their `«verb2»«Noun»` method",
        ),
        think=(
            "Method «verb»«Noun» has a new name. Match any receiver and keep every argument.",
            "Any receiver may call «verb»«Noun», so bind it; the call without a receiver has none.",
        ),
        decision="use method «verb2»«Noun»",
        keep="keep calls without a receiver",
        scenes=(
            java_scene(
                """
     static int «verb»«Noun»(int value) {
         return -value;
     }
 
     static int run(«Lib» first, «Lib» second) {
-        int total = first.«verb»«Noun»(«n») + second.«verb»«Noun»(«n2»);
+        int total = first.«verb2»«Noun»(«n») + second.«verb2»«Noun»(«n2»);
         return total + «verb»«Noun»(«n»);
     }
""",
                others={
                    "«Lib».java": (
                        " class «Lib» {\n     int «verb2»«Noun»(int value) {\n         return value;\n     }\n }\n"
                    )
                },
                renamed="assert «Mod».run(new «Lib»(), new «Lib»()) == «n2»;",
                kept="assert «Mod».«verb»«Noun»(3) == -3;",
                overbroad=("«verb»«Noun»($$$ARGS)", "new «Lib»().«verb2»«Noun»($$$ARGS)"),
                stands_before=False,
            ),
        ),
    ),
    Rule(
        name="java-rename-class",
        language="java",
        kind="rename",
        pattern="new «Noun»Reader($$$ARGS)",
        replacement="new «Noun»Loader($$$ARGS)",
        instructions=(
            "Create `«Noun»Loader` objects instead of `«Noun»Reader` objects",
            "Class `«Noun»Reader` is now `«Noun»Loader`; update where it is created",
            "Replace `new «Noun»Reader(...)` with `new «Noun»Loader(...)`",
            "Use `new «Noun»Loader(...)` wherever a `«Noun»Reader` is made",
        ),
        think=(
            "«Noun»Reader became «Noun»Loader. Match its creation and keep every constructor argument.",
            "Match new «Noun»Reader with any arguments and create a «Noun»Loader.",
        ),
        decision="create «Noun»Loader",
        keep="keep «Noun»Writer",
        scenes=(
            java_scene(
                """
     static int run(int size) {
-        var first = new «Noun»Reader(size);
-        var second = new «Noun»Reader(«n»);
+        var first = new «Noun»Loader(size);
+        var second = new «Noun»Loader(«n»);
         var writer = new «Noun»Writer(size);
         return first.size() * second.size() + writer.size();
     }
""",
                others={
                    "«Noun»Loader.java": " record «Noun»Loader(int size) {\n }\n",
                    "«Noun»Writer.java": (
                        " class «Noun»Writer {\n     private final int size;\n \n     «Noun»Writer(int size) {\n"
                        "         this.size = size;\n     }\n \n     int size() {\n         return -size;\n     }\n }\n"
                    ),
                },
                renamed="assert «Mod».run(2) == 2 * «n» - 2;",
                overbroad=("new $C($$$ARGS)", "new «Noun»Loader($$$ARGS)"),
                stands_before=False,
            ),
        ),
    ),
    Rule(
        name="java-factory-method",
        language="java",
        kind="rename",
        pattern="new «Noun»($$$ARGS)",
        replacement="«Noun».of($$$ARGS)",
        instructions=(
            "Create a `«Noun»` with the factory `«Noun».of`, not with its constructor",
            "Replace `new «Noun»(...)` with `«Noun».of(...)`",
            "The constructor of `«Noun»` becomes private; call `«Noun».of` instead",
            "Use the factory method `«Noun».of` wherever `new «Noun»(...)` stands",
        ),
        think=(
            "The «Noun» constructor is private now. Match its creation and hand the arguments to «Noun».of.",
            "Match new «Noun» with any arguments and hand them to «Noun».of.",
        ),
        decision="create «Noun» by its factory",
        keep="keep the constructor of «Noun2»",
        scenes=(
            java_scene(
                """
     static int run(int key) {
-        «Noun» «noun» = new «Noun»(key);
+        «Noun» «noun» = «Noun».of(key);
         «Noun2» «noun2» = new «Noun2»();
         return «noun».key + «noun2».key;
     }
""",
                others={
                    "«Noun».java": (
                        " class «Noun» {\n     final int key;\n \n     private «Noun»(int key) {\n"
                        "         this.key = key;\n     }\n \n     static «Noun» of(int key) {\n"
                        "         return new «Noun»(key + «n»);\n     }\n }\n"
                    ),
                    "«Noun2».java": " class «Noun2» {\n     final int key = «n2»;\n }\n",
                },
                made="assert «Mod».run(1) == 1 + «n» + «n2»;",
                overbroad=("new $C($$$ARGS)", "$C.of($$$ARGS)"),
                stands_before=False,
            ),
        ),
    ),
    Rule(
        name="java-add-argument",
        language="java",
        kind="arguments",
        pattern="«Lib».«verb»($X)",
        replacement="«Lib».«verb»($X, «n»)",
        instructions=(
            "Pass «n» as the second argument of `«Lib».«verb»` where there is only one",
            "`«Lib».«verb»` takes a second argument now; pass `«n»`",
            "Add the argument `«n»` to one-argument calls of `«Lib».«verb»`",
            "Call `«Lib».«verb»(x, «n»)` instead of `«Lib».«verb»(x)`",
        ),
        think=(
            "«Lib».«verb» needs a second argument. Match calls with one argument and append «n».",
            "Match one argument only, so calls that already pass two stay; append «n».",
        ),
        decision="pass «n» to «Lib».«verb»",
        keep="keep calls with two arguments",
        scenes=(
            _two_libraries(
                "«Lib».«verb»(key)",
                "«Lib».«verb»(key, «n»)",
                "«Lib».«verb»(key, 1)",
                "static int «verb»(int key, int limit) { return key * limit; }",
                "static int unused = 0;",
                ("«Lib».«verb»($X, $$$REST)", "«Lib».«verb»($X, «n»)"),
                added="assert «Mod».half(2) == «n»;",
                kept="assert «Mod».run(3) == 3000 * «n» + 3;",
                stands_before=False,
            ),
        ),
    ),
    Rule(
        name="java-swap-arguments",
        language="java",
        kind="arguments",
        pattern="«Lib».«verb»($A, $B)",
        replacement="«Lib».«verb»($B, $A)",
        instructions=(
            "Swap the two arguments of `«Lib».«verb»`",
            "`«Lib».«verb»(a, b)` is now `«Lib».«verb»(b, a)`; update its callers",
            "The parameters of `«Lib».«verb»` changed places; swap the arguments",
            "Turn `«Lib».«verb»(a, b)` into `«Lib».«verb»(b, a)`",
        ),
        think=(
            "The parameters of «Lib».«verb» changed places. Bind both arguments and write them in the new order.",
            "Match two arguments of «verb» on «Lib» and swap them; «Other» is another class.",
        ),
        decision="swap arguments of «Lib».«verb»",
        keep="keep «Other».«verb»",
        scenes=(
            _two_libraries(
                "«Lib».«verb»(key, «n»)",
                "«Lib».«verb»(«n», key)",
                "«Other».«verb»(key, 2)",
                "static int «verb»(int limit, int key) { return 10 * limit + key; }",
                "static int «verb»(int key, int limit) { return 10 * limit + key; }",
                ("$M.«verb»($A, $B)", "$M.«verb»($B, $A)"),
                swapped="assert «Mod».half(6) == 5 * «n» + 3;",
                kept="assert «Mod».run(3) == 1000 * (10 * «n» + 3) + 23;",
            ),
        ),
    ),
    Rule(
        name="java-drop-argument",
        language="java",
        kind="arguments",
        pattern="«Lib».«verb»($X, $Y)",
        replacement="«Lib».«verb»($X)",
        instructions=(
            "Drop the second argument of `«Lib».«verb»`",
            "`«Lib».«verb»` takes one argument now; drop the second",
            "Call `«Lib».«verb»(x)` instead of `«Lib».«verb»(x, y)`",
            "Remove the second argument from two-argument calls of `«Lib».«verb»`",
        ),
        think=(
            "«Lib».«verb» lost its second parameter. Match two arguments and keep only the first.",
            "Bind both arguments of «verb» on «Lib» and write back the first one.",
        ),
        decision="pass one argument to «Lib».«verb»",
        keep="keep «Other».«verb»",
        scenes=(
            _two_libraries(
                "«Lib».«verb»(key, «n»)",
                "«Lib».«verb»(key)",
                "«Other».«verb»(key, 2)",
                "static int «verb»(int key) { return key + «n2»; }",
                "static int «verb»(int key, int limit) { return key + limit; }",
                ("$M.«verb»($X, $Y)", "$M.«verb»($X)"),
                dropped="assert «Mod».half(«n2») == «n2»;",
                kept="assert «Mod».run(3) == 1000 * (3 + «n2») + 5;",
                stands_before=False,
            ),
        ),
    ),
    Rule(
        name="java-wrap-argument",
        language="java",
        kind="arguments",
        pattern="«Lib».«verb»($X)",
        replacement="«Lib».«verb»(new Key($X))",
        instructions=(
            "Wrap the argument of `«Lib».«verb»` in `new Key(...)`",
            "`«Lib».«verb»` takes a `Key` now; wrap its argument",
            "Pass `new Key(x)` to `«Lib».«verb»` instead of `x`",
            "Turn `«Lib».«verb»(x)` into `«Lib».«verb»(new Key(x))`",
        ),
        think=(
            "«Lib».«verb» takes a Key now. Bind the single argument and wrap it in a new Key.",
            "Match «verb» on «Lib» with one argument and construct a Key around it.",
        ),
        decision="wrap arguments of «Lib».«verb»",
        keep="keep «Other».«verb»",
        scenes=(
            _two_libraries(
                "«Lib».«verb»(key)",
                "«Lib».«verb»(new Key(key))",
                "«Other».«verb»(key)",
                "static int «verb»(Key key) { return key.value() + «n»; }\n }\n \n record Key(int value) {",
                "static int «verb»(int key) { return key; }",
                ("$M.«verb»($X)", "$M.«verb»(new Key($X))"),
                wrapped="assert «Mod».half(«n») == «n»;",
                kept="assert «Mod».run(2) == 1000 * (2 + «n») + 2;",
                stands_before=False,
            ),
        ),
    ),
    Rule(
        name="java-lower-locale",
        language="java",
        kind="arguments",
        pattern="$S.toLowerCase()",
        replacement="$S.toLowerCase(Locale.ROOT)",
        instructions=(
            "Pass `Locale.ROOT` to `toLowerCase` where it has no locale",
            "Lower case must not depend on the machine: call `toLowerCase(Locale.ROOT)`",
            "Give every `toLowerCase()` the argument `Locale.ROOT`",
            "Use `s.toLowerCase(Locale.ROOT)` instead of `s.toLowerCase()`",
        ),
        think=(
            "toLowerCase without a locale depends on the machine. Match calls without arguments and pass Locale.ROOT.",
            "Bind the string of toLowerCase and pass Locale.ROOT; calls that name a locale do not match.",
        ),
        decision="lower case in the root locale",
        keep="keep explicit locales",
        real=r"(?s)\A(?=.*^import java\.util\.(?:Locale|\*);).*?\.toLowerCase\(\)",
        scenes=(
            java_scene(
                """
     static String «verb»«Noun»(String «field», Locale locale) {
-        String lower = «field».toLowerCase();
+        String lower = «field».toLowerCase(Locale.ROOT);
         String local = «field».toLowerCase(locale);
         return lower + "«n»" + local;
     }
""",
                imports="import java.util.Locale;",
                root=(
                    'Locale.setDefault(new Locale("tr"));\nassert «Mod».«verb»«Noun»("I", Locale.ROOT).equals("i«n»i");'
                ),
                kept='assert «Mod».«verb»«Noun»("I", new Locale("tr")).endsWith("\\u0131");',
                overbroad=("$S.toLowerCase($$$A)", "$S.toLowerCase(Locale.ROOT)"),
            ),
        ),
    ),
    Rule(
        name="java-upper-locale",
        language="java",
        kind="arguments",
        pattern="$S.toUpperCase()",
        replacement="$S.toUpperCase(Locale.ROOT)",
        instructions=(
            "Pass `Locale.ROOT` to `toUpperCase` where it has no locale",
            "Upper case must not depend on the machine: call `toUpperCase(Locale.ROOT)`",
            "Give every `toUpperCase()` the argument `Locale.ROOT`",
            "Use `s.toUpperCase(Locale.ROOT)` instead of `s.toUpperCase()`",
        ),
        think=(
            "toUpperCase without a locale depends on the machine. Match calls without arguments and pass Locale.ROOT.",
            "Bind the string of toUpperCase and pass Locale.ROOT; calls that name a locale do not match.",
        ),
        decision="upper case in the root locale",
        keep="keep explicit locales",
        real=r"(?s)\A(?=.*^import java\.util\.(?:Locale|\*);).*?\.toUpperCase\(\)",
        scenes=(
            java_scene(
                """
     static String «verb»«Noun»(String «field», Locale locale) {
         String local = «field».toUpperCase(locale);
-        return «field».toUpperCase() + "«n»" + local;
+        return «field».toUpperCase(Locale.ROOT) + "«n»" + local;
     }
""",
                imports="import java.util.Locale;",
                root=(
                    'Locale.setDefault(new Locale("tr"));\nassert «Mod».«verb»«Noun»("i", Locale.ROOT).equals("I«n»I");'
                ),
                kept='assert «Mod».«verb»«Noun»("i", new Locale("tr")).endsWith("\\u0130");',
                overbroad=("$S.toUpperCase($$$A)", "$S.toUpperCase(Locale.ROOT)"),
            ),
        ),
    ),
)
