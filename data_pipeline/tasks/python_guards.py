"""Python rules that add a guard or a default."""

from data_pipeline.tasks.rule import Rule
from data_pipeline.tasks.scenes import python_scene

RULES = (
    Rule(
        name="python-get-default",
        language="python",
        kind="guard",
        pattern="«other».get($K)",
        replacement="«other».get($K, «n»)",
        instructions=(
            "Give `«other».get` the default `«n»` where it has none",
            "Missing keys must count as «n»: add the default to `«other».get(key)`",
            "Add the default `«n»` to one-argument calls of `«other».get`",
            "`«other».get(key)` should fall back to `«n»`",
        ),
        think=(
            "«other».get without a default gives None. Add «n» to one-argument calls; explicit defaults do not match.",
            "Match get with one argument on «other» and append the default «n».",
        ),
        decision="default «other».get to «n»",
        keep="keep explicit defaults",
        scenes=(
            python_scene(
                """
 def «verb»_«noun»(«other»):
-    total = «other».get("«field»") + 1
+    total = «other».get("«field»", «n») + 1
     extra = «other».get("«field2»", 0)
     return total, extra
""",
                test_default="self.assertEqual(«mod».«verb»_«noun»({}), («n» + 1, 0))",
                test_present='self.assertEqual(«mod».«verb»_«noun»({"«field»": 2, "«field2»": 5}), (3, 5))',
                overbroad=("«other».get($K, $$$REST)", "«other».get($K, «n»)"),
            ),
        ),
    ),
    Rule(
        name="python-guard-none",
        language="python",
        kind="guard",
        pattern="return «noun».«field»",
        replacement="return «noun».«field» if «noun» else None",
        instructions=(
            "Return None when `«noun»` is missing instead of reading `«noun».«field»`",
            "Guard `return «noun».«field»` against a missing `«noun»`",
            "`«noun»` may be None: return `«noun».«field»` only if it is there",
            "Make `return «noun».«field»` safe when `«noun»` is None",
        ),
        think=(
            "«noun» may be None, so return «field» only if it is there and None otherwise.",
            "Match the return of «noun».«field» and add a condition on «noun».",
        ),
        decision="guard «noun» against None",
        keep="keep other returns",
        scenes=(
            python_scene(
                """
 def «field»_of(«noun»):
-    return «noun».«field»
+    return «noun».«field» if «noun» else None
 
 
 def «field2»_of(«noun»):
     return «noun».«field2»
""",
                imports="from types import SimpleNamespace",
                test_guard="self.assertIsNone(«mod».«field»_of(None))",
                test_kept=(
                    "with self.assertRaises(AttributeError):\n    «mod».«field2»_of(None)\n"
                    "self.assertEqual(«mod».«field»_of(SimpleNamespace(«field»=«n»)), «n»)"
                ),
                overbroad=("return «noun».$F", "return «noun».$F if «noun» else None"),
            ),
        ),
    ),
    Rule(
        name="python-guard-division",
        language="python",
        kind="guard",
        pattern="return $A / $B",
        replacement="return $A / $B if $B else 0",
        instructions=(
            "Return 0 instead of dividing by zero in `return a / b`",
            "Guard returned divisions: 0 when the divisor is 0",
            "`return a / b` must give 0 when `b` is 0",
            "Make returned quotients `a / b` safe for a zero divisor by returning 0",
        ),
        think=(
            "A zero divisor raises. Bind both operands and return 0 when the divisor is zero.",
            "Match returned true divisions and add a condition on the divisor.",
        ),
        decision="return 0 for zero divisors",
        keep="keep floor divisions",
        difficulty=2,
        scenes=(
            python_scene(
                """
 def «field»_rate(«noun», «noun2»):
-    return «noun» / «noun2»
+    return «noun» / «noun2» if «noun2» else 0
 
 
 def pages(«noun»):
     half = «noun» / 2
     return half // «n»
""",
                test_zero="self.assertEqual(«mod».«field»_rate(«n», 0), 0)",
                test_kept="self.assertEqual((«mod».pages(4 * «n»), «mod».«field»_rate(6, 4)), (2, 1.5))",
                overbroad=("$A / $B", "0"),
            ),
        ),
    ),
    Rule(
        name="python-environ-get",
        language="python",
        kind="guard",
        pattern="os.environ[$K]",
        replacement='os.environ.get($K, "")',
        instructions=(
            'Read `os.environ[name]` with `os.environ.get(name, "")`',
            "Missing environment variables must read as an empty string",
            'Replace `os.environ[k]` by `os.environ.get(k, "")`',
            'Unset variables crash `os.environ[k]`; use `os.environ.get(k, "")`',
        ),
        think=(
            "A missing variable raises KeyError; get with an empty default does not.",
            "Match lookups in os.environ only and give them an empty default.",
        ),
        decision="default environment variables",
        keep="keep other lookups",
        real=r"[=(] ?os\.environ\[",
        scenes=(
            python_scene(
                """
 import os
 
 
 def «verb»_«noun»(«other»):
-    user = os.environ["«NOUN»_USER"]
+    user = os.environ.get("«NOUN»_USER", "")
     return user, «other»["«field»"]
""",
                test_missing='self.assertEqual(«mod».«verb»_«noun»({"«field»": «n»}), ("", «n»))',
                test_kept="with self.assertRaises(KeyError):\n    «mod».«verb»_«noun»({})",
                overbroad=("$D[$K]", '$D.get($K, "")'),
            ),
        ),
    ),
    Rule(
        name="python-next-default",
        language="python",
        kind="guard",
        pattern="next($I)",
        replacement="next($I, None)",
        instructions=(
            "Give `next` the default None where it has none",
            "An empty iterator must give None: `next(it)` becomes `next(it, None)`",
            "Add the default `None` to one-argument calls of `next`",
            "Use `next(it, None)` instead of `next(it)`",
        ),
        think=(
            "next without a default raises on an empty iterator. Add None to one-argument calls.",
            "Match next with one argument and append None; explicit defaults do not match.",
        ),
        decision="default next to None",
        keep="keep explicit defaults",
        real=r"(?<![\w.])next\(\w+\)",
        scenes=(
            python_scene(
                """
 def «verb»_«noun»(rows):
-    head = next(rows)
+    head = next(rows, None)
     second = next(rows, «n»)
     return head, second
""",
                test_empty="self.assertEqual(«mod».«verb»_«noun»(iter([])), (None, «n»))",
                test_kept="self.assertEqual(«mod».«verb»_«noun»(iter([1, 2])), (1, 2))",
                overbroad=("next($I, $$$REST)", "next($I, None)"),
            ),
        ),
    ),
)
