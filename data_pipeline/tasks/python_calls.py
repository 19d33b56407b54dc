"""Python rules that rename a call or change its arguments."""

from data_pipeline.tasks.rule import Rule, Scene
from data_pipeline.tasks.scenes import unittest_file

TEST = "test_«mod».py"


def _two_libraries(
    old_call: str, new_call: str, kept_call: str, lib: str, other: str, overbroad: tuple[str, str]
) -> Scene:
    """A module that calls «lib» (to rewrite) and «other» (to keep); `lib` and `other` are the libraries' code."""
    return Scene(
        sources={
            "«mod».py": f"""
 import «lib»
 import «other»
 
 
 def run(key):
-    value = {old_call}
+    value = {new_call}
     backup = {kept_call}
     return value, backup
 
 
 def label(key):
-    return "«word»", {old_call}
+    return "«word»", {new_call}
""",
            "«lib».py": lib,
            "«other».py": other,
        },
        tests={},
        overbroad=overbroad,
    )


def _with_tests(scene: Scene, **bodies: str) -> Scene:
    tests = {TEST: unittest_file("import «mod»", **bodies)}
    return Scene(scene.sources, tests, scene.overbroad)


_MODULE_CALL = _with_tests(
    _two_libraries(
        "«lib».«verb»_«noun»(key)",
        "«lib».«verb2»_«noun»(key)",
        "«other».«verb»_«noun»(key)",
        '\n def «verb2»_«noun»(key):\n     return "«noun»", key\n',
        '\n def «verb»_«noun»(key):\n     return "kept", key\n',
        ("$M.«verb»_«noun»($$$ARGS)", "$M.«verb2»_«noun»($$$ARGS)"),
    ),
    test_renamed='self.assertEqual(«mod».label(3), ("«word»", ("«noun»", 3)))',
    test_kept='self.assertEqual(«mod».run(4), (("«noun»", 4), ("kept", 4)))',
)

RULES = (
    Rule(
        name="python-rename-module-call",
        language="python",
        kind="rename",
        pattern="«lib».«verb»_«noun»($$$ARGS)",
        replacement="«lib».«verb2»_«noun»($$$ARGS)",
        instructions=(
            "Rename calls of `«lib».«verb»_«noun»` to `«lib».«verb2»_«noun»`",
            "`«lib».«verb»_«noun»` is now called `«lib».«verb2»_«noun»`; update its callers",
            "Replace `«lib».«verb»_«noun»(...)` with `«lib».«verb2»_«noun»(...)`",
            "Use `«lib».«verb2»_«noun»` wherever `«lib».«verb»_«noun»` is called",
        ),
        think=(
            "«lib».«verb»_«noun» was renamed. Match only that module's calls and keep every argument.",
            "Rename the call to «verb2»_«noun»; the module in the pattern protects «other».",
        ),
        decision="use «verb2»_«noun»",
        keep="keep «other».«verb»_«noun»",
        scenes=(_MODULE_CALL,),
    ),
    Rule(
        name="python-rename-method",
        language="python",
        kind="rename",
        pattern="$OBJ.«verb»_«noun»($$$ARGS)",
        replacement="$OBJ.«verb2»_«noun»($$$ARGS)",
        instructions=(
            "Rename the method `«verb»_«noun»` to `«verb2»_«noun»` in its calls",
            "Method `«verb»_«noun»` is now `«verb2»_«noun»`; update calls on any object",
            "Call method `«verb2»_«noun»` instead of method `«verb»_«noun»`",
            "Objects lost `«verb»_«noun»`; call their `«verb2»_«noun»` method",
        ),
        think=(
            "Method «verb»_«noun» has a new name. Match any receiver and keep every argument.",
            "Any receiver may call «verb»_«noun», so bind it; the plain function has none.",
        ),
        decision="use method «verb2»_«noun»",
        keep="keep the plain function",
        scenes=(
            Scene(
                sources={
                    "«mod».py": """
 from helpers import «verb»_«noun»
 
 
 def run(«lib», «other»):
-    first = «lib».«verb»_«noun»(«n»)
-    second = «other».«verb»_«noun»(«n2», fast=True)
+    first = «lib».«verb2»_«noun»(«n»)
+    second = «other».«verb2»_«noun»(«n2», fast=True)
     return first, second, «verb»_«noun»(«n»)
""",
                    "helpers.py": """
 def «verb»_«noun»(value):
     return ["helper", value]
""",
                    "models.py": """
 class «Noun»Store:
     def «verb2»_«noun»(self, value, fast=False):
         return value, fast
""",
                },
                tests={
                    TEST: unittest_file(
                        "import helpers\nimport «mod»\nfrom models import «Noun»Store",
                        test_renamed=(
                            "result = «mod».run(«Noun»Store(), «Noun»Store())\n"
                            "self.assertEqual(result[:2], ((«n», False), («n2», True)))"
                        ),
                        test_kept=(
                            "result = «mod».run(«Noun»Store(), «Noun»Store())\n"
                            "self.assertEqual(result[2], helpers.«verb»_«noun»(«n»))"
                        ),
                    )
                },
                overbroad=("«verb»_«noun»", "«verb2»_«noun»"),
            ),
        ),
    ),
    Rule(
        name="python-rename-attribute",
        language="python",
        kind="rename",
        pattern="$OBJ.«field»",
        replacement="$OBJ.«field2»",
        instructions=(
            "Rename the attribute `«field»` to `«field2»`",
            "Attribute `.«field»` is now `.«field2»`; update every access",
            "Read `.«field2»` instead of `.«field»` on all objects",
            "Replace accesses of `.«field»` with `.«field2»`",
        ),
        think=(
            "«field» is now «field2» on every object. Match any receiver; keyword names do not match.",
            "Match attribute access on any object and rename it to «field2». The keyword argument stays.",
        ),
        decision="rename attribute «field» to «field2»",
        keep="keep the keyword «field»",
        scenes=(
            Scene(
                sources={
                    "«mod».py": """
 from models import make_«noun»
 
 
 def run(value):
     «noun» = make_«noun»(«field»=value)
-    return «noun».«field», «noun».parent.«field»
+    return «noun».«field2», «noun».parent.«field2»
""",
                    "models.py": """
 class «Noun»:
     def __init__(self, value, parent):
         self.«field2» = value
         self.parent = parent
 
 
 def make_«noun»(*, «field»):
     return «Noun»(«field», «Noun»(«n», None))
""",
                },
                tests={
                    TEST: unittest_file(
                        "import «mod»\nimport models",
                        test_renamed="self.assertEqual(«mod».run(3), (3, «n»))",
                        test_kept='self.assertEqual(models.make_«noun»(«field»="a").«field2», "a")',
                    )
                },
                overbroad=("«field»", "«field2»"),
            ),
        ),
    ),
    Rule(
        name="python-rename-keyword",
        language="python",
        kind="rename",
        pattern="«lib».«verb»($X, «kw»=$V)",
        replacement="«lib».«verb»($X, «kw2»=$V)",
        instructions=(
            "`«lib».«verb»` renamed its keyword `«kw»` to `«kw2»`; update the calls",
            "Pass `«kw2»=` instead of `«kw»=` to `«lib».«verb»`",
            "Rename the keyword `«kw»` to `«kw2»` in calls of `«lib».«verb»`",
            "In `«lib».«verb»(...)` replace the keyword `«kw»` by `«kw2»`",
        ),
        think=(
            "The keyword «kw» of «lib».«verb» became «kw2». Keep the value and the first argument as they are.",
            "Only «lib».«verb» takes «kw2», so name the module and carry the value over.",
        ),
        decision="rename keyword «kw» to «kw2»",
        keep="keep «other».«verb»",
        difficulty=2,
        scenes=(
            _with_tests(
                _two_libraries(
                    "«lib».«verb»(key, «kw»=«n»)",
                    "«lib».«verb»(key, «kw2»=«n»)",
                    "«other».«verb»(key, «kw»=«n2»)",
                    "\n def «verb»(key, *, «kw2»):\n     return key, «kw2»\n",
                    "\n def «verb»(key, *, «kw»):\n     return «kw», key\n",
                    ("$M.«verb»($X, «kw»=$V)", "$M.«verb»($X, «kw2»=$V)"),
                ),
                test_renamed='self.assertEqual(«mod».label(3), ("«word»", (3, «n»)))',
                test_kept="self.assertEqual(«mod».run(4), ((4, «n»), («n2», 4)))",
            ),
        ),
    ),
    Rule(
        name="python-rename-class",
        language="python",
        kind="rename",
        pattern="«lib».«Noun»($$$ARGS)",
        replacement="«lib».«Noun»«Verb»er($$$ARGS)",
        instructions=(
            "Build `«lib».«Noun»«Verb»er` instead of `«lib».«Noun»`",
            "Class `«lib».«Noun»` is now `«lib».«Noun»«Verb»er`; update the constructor calls",
            "Replace `«lib».«Noun»(...)` with `«lib».«Noun»«Verb»er(...)`",
            "Rename the class `«lib».«Noun»` to `«lib».«Noun»«Verb»er` where it is constructed",
        ),
        think=(
            "«lib».«Noun» is now «lib».«Noun»«Verb»er. Match its constructor only and keep the arguments.",
            "Rename the constructor to «Noun»«Verb»er. The module in the pattern protects the other class.",
        ),
        decision="rename «Noun» to «Noun»«Verb»er",
        keep="keep «other».«Noun»",
        scenes=(
            _with_tests(
                _two_libraries(
                    "«lib».«Noun»(key).value",
                    "«lib».«Noun»«Verb»er(key).value",
                    "«other».«Noun»(key).value",
                    "\n class «Noun»«Verb»er:\n     def __init__(self, value):\n         self.value = value\n",
                    "\n class «Noun»:\n     def __init__(self, value):\n         self.value = [value]\n",
                    ("$M.«Noun»($$$ARGS)", "$M.«Noun»«Verb»er($$$ARGS)"),
                ),
                test_renamed='self.assertEqual(«mod».label(3), ("«word»", 3))',
                test_kept="self.assertEqual(«mod».run(4), (4, [4]))",
            ),
        ),
    ),
    Rule(
        name="python-rename-constant",
        language="python",
        kind="rename",
        pattern="«lib».«NOUN»_LIMIT",
        replacement="«lib».MAX_«NOUN»",
        instructions=(
            "Rename the constant `«lib».«NOUN»_LIMIT` to `«lib».MAX_«NOUN»`",
            "Use `«lib».MAX_«NOUN»` instead of `«lib».«NOUN»_LIMIT`",
            "`«lib».«NOUN»_LIMIT` is now `«lib».MAX_«NOUN»`; update its uses",
            "Replace `«lib».«NOUN»_LIMIT` by `«lib».MAX_«NOUN»`",
        ),
        think=(
            "The constant of «lib» has a new name. Match it with its module, nothing else.",
            "Rename to MAX_«NOUN»; naming the module keeps the other constant.",
        ),
        decision="use MAX_«NOUN»",
        keep="keep «other».«NOUN»_LIMIT",
        scenes=(
            _with_tests(
                _two_libraries(
                    "min(key, «lib».«NOUN»_LIMIT)",
                    "min(key, «lib».MAX_«NOUN»)",
                    "max(key, «other».«NOUN»_LIMIT)",
                    "\n MAX_«NOUN» = «n»\n",
                    "\n «NOUN»_LIMIT = «n2»\n",
                    ("$M.«NOUN»_LIMIT", "$M.MAX_«NOUN»"),
                ),
                test_renamed='self.assertEqual(«mod».label(500), ("«word»", «n»))',
                test_kept="self.assertEqual(«mod».run(0), (0, «n2»))",
            ),
        ),
    ),
    Rule(
        name="python-add-keyword",
        language="python",
        kind="arguments",
        pattern="«lib».«verb»($X)",
        replacement="«lib».«verb»($X, «kw»=«n»)",
        instructions=(
            "Pass `«kw»=«n»` to every one-argument call of `«lib».«verb»`",
            "`«lib».«verb»` now needs a «kw»; add `«kw»=«n»` where it is missing",
            "Add the keyword `«kw»=«n»` to calls `«lib».«verb»(x)`",
            "Calls of `«lib».«verb»` with one argument must also give `«kw»=«n»`",
        ),
        think=(
            "Add «kw»=«n» after the single argument of «lib».«verb». Calls that already pass «kw» do not match.",
            "A one-argument pattern finds the calls that lack «kw»; append «kw»=«n» to them.",
        ),
        decision="pass «kw»=«n» to «lib».«verb»",
        keep="keep explicit «kw» values",
        scenes=(
            _with_tests(
                _two_libraries(
                    "«lib».«verb»(key)",
                    "«lib».«verb»(key, «kw»=«n»)",
                    "«lib».«verb»(key, «kw»=«n2»), «other».«verb»(key)",
                    "\n def «verb»(key, *, «kw»):\n     return key, «kw»\n",
                    "\n def «verb»(key):\n     return [key]\n",
                    ("«lib».«verb»($X, $$$REST)", "«lib».«verb»($X, «kw»=«n»)"),
                ),
                test_added='self.assertEqual(«mod».label(3), ("«word»", (3, «n»)))',
                test_kept="self.assertEqual(«mod».run(4), ((4, «n»), ((4, «n2»), [4])))",
            ),
        ),
    ),
    Rule(
        name="python-drop-argument",
        language="python",
        kind="arguments",
        pattern="«lib».«verb»($X, «n»)",
        replacement="«lib».«verb»($X)",
        instructions=(
            "Drop the second argument `«n»` from calls of `«lib».«verb»`",
            "`«lib».«verb»` no longer takes `«n»`; remove it from the calls",
            "Remove the argument `«n»` of `«lib».«verb»(x, «n»)`",
            "Call `«lib».«verb»` with one argument, without the `«n»`",
        ),
        think=(
            "«lib».«verb» takes one argument now. Match its calls with «n» and keep only the first argument.",
            "Drop «n» from «lib».«verb»; naming the module keeps the other library's call.",
        ),
        decision="drop «n» from «lib».«verb»",
        keep="keep «other».«verb»",
        scenes=(
            _with_tests(
                _two_libraries(
                    "«lib».«verb»(key, «n»)",
                    "«lib».«verb»(key)",
                    "«other».«verb»(key, «n»)",
                    "\n def «verb»(key):\n     return [key]\n",
                    "\n def «verb»(key, size):\n     return key, size\n",
                    ("$M.«verb»($X, «n»)", "$M.«verb»($X)"),
                ),
                test_dropped='self.assertEqual(«mod».label(3), ("«word»", [3]))',
                test_kept="self.assertEqual(«mod».run(4), ([4], (4, «n»)))",
            ),
        ),
    ),
    Rule(
        name="python-swap-arguments",
        language="python",
        kind="arguments",
        pattern="«lib».«verb»($A, $B)",
        replacement="«lib».«verb»($B, $A)",
        instructions=(
            "Swap the two arguments of `«lib».«verb»`",
            "`«lib».«verb»` takes its arguments in the other order now; swap them",
            "Reverse the argument order in calls of `«lib».«verb»`",
            "Exchange first and second argument of every `«lib».«verb»` call",
        ),
        think=(
            "«lib».«verb» takes its two arguments in reverse order now. Bind both and swap them.",
            "Bind the two arguments of «lib».«verb» and write them back in the other order.",
        ),
        decision="swap arguments of «lib».«verb»",
        keep="keep «other».«verb»",
        scenes=(
            _with_tests(
                _two_libraries(
                    "«lib».«verb»(key, «n»)",
                    "«lib».«verb»(«n», key)",
                    "«other».«verb»(key, «n2»)",
                    "\n def «verb»(size, key):\n     return size - key\n",
                    "\n def «verb»(key, size):\n     return size - key\n",
                    ("$M.«verb»($A, $B)", "$M.«verb»($B, $A)"),
                ),
                test_swapped='self.assertEqual(«mod».label(3), ("«word»", «n» - 3))',
                test_kept="self.assertEqual(«mod».run(4), («n» - 4, «n2» - 4))",
            ),
        ),
    ),
    Rule(
        name="python-name-argument",
        language="python",
        kind="arguments",
        pattern="«lib».«verb»($X, $V)",
        replacement="«lib».«verb»($X, «kw»=$V)",
        instructions=(
            "Pass the second argument of `«lib».«verb»` as `«kw»=`",
            "`«kw»` of `«lib».«verb»` is keyword-only now; name it in the calls",
            "Turn the second argument of `«lib».«verb»` into the keyword `«kw»`",
            "Name the second argument in `«lib».«verb»` calls: `«kw»=...`",
        ),
        think=(
            "«kw» is keyword-only in «lib».«verb» now. Bind the second argument and pass it by name.",
            "Keep the first argument of «lib».«verb» and give the second one its name «kw».",
        ),
        decision="pass «kw» by name",
        keep="keep «other».«verb»",
        scenes=(
            _with_tests(
                _two_libraries(
                    "«lib».«verb»(key, «n»)",
                    "«lib».«verb»(key, «kw»=«n»)",
                    "«other».«verb»(key, «n2»)",
                    "\n def «verb»(key, *, «kw»):\n     return key, «kw»\n",
                    "\n def «verb»(key, size, /):\n     return size, key\n",
                    ("$M.«verb»($X, $V)", "$M.«verb»($X, «kw»=$V)"),
                ),
                test_named='self.assertEqual(«mod».label(3), ("«word»", (3, «n»)))',
                test_kept="self.assertEqual(«mod».run(4), ((4, «n»), («n2», 4)))",
            ),
        ),
    ),
    Rule(
        name="python-wrap-argument",
        language="python",
        kind="arguments",
        pattern="«lib».«verb»($X)",
        replacement="«lib».«verb»(str($X))",
        instructions=(
            "Convert the argument of `«lib».«verb»` with `str`",
            "`«lib».«verb»` only accepts strings now; wrap its argument in `str(...)`",
            "Wrap what is passed to `«lib».«verb»` in `str()`",
            "Pass `str(x)` instead of `x` to `«lib».«verb»`",
        ),
        think=(
            "«lib».«verb» only accepts strings now. Bind its argument and wrap it in str.",
            "Wrap the single argument of «lib».«verb» in str; the other module gets the raw value.",
        ),
        decision="wrap the argument in str",
        keep="keep «other».«verb»",
        scenes=(
            _with_tests(
                _two_libraries(
                    "«lib».«verb»(key)",
                    "«lib».«verb»(str(key))",
                    "«other».«verb»(key)",
                    '\n def «verb»(text):\n     return "«word2» " + text\n',
                    "\n def «verb»(number):\n     return number + «n»\n",
                    ("$M.«verb»($X)", "$M.«verb»(str($X))"),
                ),
                test_wrapped='self.assertEqual(«mod».label(3), ("«word»", "«word2» 3"))',
                test_kept='self.assertEqual(«mod».run(4), ("«word2» 4", 4 + «n»))',
            ),
        ),
    ),
    Rule(
        name="python-wrap-call",
        language="python",
        kind="arguments",
        pattern="«lib».«verb»($X)",
        replacement="round(«lib».«verb»($X), 2)",
        instructions=(
            "Round the result of `«lib».«verb»` to 2 digits",
            "Wrap calls of `«lib».«verb»` in `round(..., 2)`",
            "`«lib».«verb»` returns too many digits; round its result to 2",
            "Use `round(«lib».«verb»(x), 2)` in place of `«lib».«verb»(x)`",
        ),
        think=(
            "Keep the call of «lib».«verb» and wrap it in round with 2 digits.",
            "Bind the argument of «lib».«verb», repeat the call and round it to 2 digits.",
        ),
        decision="round «lib».«verb» to 2 digits",
        keep="keep «other».«verb»",
        scenes=(
            _with_tests(
                _two_libraries(
                    "«lib».«verb»(key)",
                    "round(«lib».«verb»(key), 2)",
                    "«other».«verb»(key)",
                    "\n def «verb»(key):\n     return key + 0.12345\n",
                    "\n def «verb»(key):\n     return key + 0.56789\n",
                    ("$M.«verb»($X)", "round($M.«verb»($X), 2)"),
                ),
                test_rounded='self.assertEqual(«mod».label(3), ("«word»", 3.12))',
                test_kept="self.assertEqual(«mod».run(4), (4.12, 4.56789))",
            ),
        ),
    ),
    Rule(
        name="python-change-constant",
        language="python",
        kind="arguments",
        pattern="«lib».«verb»($X, «n»)",
        replacement="«lib».«verb»($X, «n2»)",
        instructions=(
            "Raise the second argument of `«lib».«verb»` from «n» to «n2»",
            "Change «n» to «n2» in calls of `«lib».«verb»`",
            "`«lib».«verb»(x, «n»)` should be `«lib».«verb»(x, «n2»)`",
            "Calls of `«lib».«verb»` must pass «n2» where they pass «n»",
        ),
        think=(
            "«lib».«verb» must get «n2» for «n». The constant in the pattern leaves other values.",
            "Match only the constant «n» in «lib».«verb» and write «n2» instead.",
        ),
        decision="pass «n2» to «lib».«verb»",
        keep="keep other numbers",
        scenes=(
            _with_tests(
                _two_libraries(
                    "«lib».«verb»(key, «n»)",
                    "«lib».«verb»(key, «n2»)",
                    "«lib».«verb»(key, «n3»), «other».«verb»(key, «n»)",
                    "\n def «verb»(key, size):\n     return key, size\n",
                    "\n def «verb»(key, size):\n     return [key, size]\n",
                    ("«lib».«verb»($X, $N)", "«lib».«verb»($X, «n2»)"),
                ),
                test_changed='self.assertEqual(«mod».label(3), ("«word»", (3, «n2»)))',
                test_kept="self.assertEqual(«mod».run(4), ((4, «n2»), ((4, «n3»), [4, «n»])))",
            ),
        ),
    ),
    Rule(
        name="python-prepend-argument",
        language="python",
        kind="arguments",
        pattern="«lib».«verb»($$$ARGS)",
        replacement='«lib».«verb»("«word2»", $$$ARGS)',
        instructions=(
            'Pass "«word2»" as the first argument of `«lib».«verb»`',
            '`«lib».«verb»` has a new first argument; give it "«word2»"',
            'Insert "«word2»" before the arguments of `«lib».«verb»`',
            'Prepend the argument "«word2»" to calls of `«lib».«verb»`',
        ),
        think=(
            "«lib».«verb» has a new first argument. Put «word2» in front and keep the rest.",
            "Bind all arguments of «lib».«verb» and write «word2» before them.",
        ),
        decision="pass «word2» to «lib».«verb» first",
        keep="keep «other».«verb»",
        scenes=(
            _with_tests(
                _two_libraries(
                    "«lib».«verb»(key, «n»)",
                    '«lib».«verb»("«word2»", key, «n»)',
                    "«other».«verb»(key, «n2»)",
                    "\n def «verb»(tag, key, size):\n     return tag, key, size\n",
                    "\n def «verb»(key, size):\n     return key, size\n",
                    ("$M.«verb»($$$ARGS)", '$M.«verb»("«word2»", $$$ARGS)'),
                ),
                test_added='self.assertEqual(«mod».label(3), ("«word»", ("«word2»", 3, «n»)))',
                test_kept='self.assertEqual(«mod».run(4), (("«word2»", 4, «n»), (4, «n2»)))',
            ),
        ),
    ),
)
