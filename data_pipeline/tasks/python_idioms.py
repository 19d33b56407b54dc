"""Python rules that swap one idiom for a better one."""

from data_pipeline.tasks.rule import Rule
from data_pipeline.tasks.scenes import python_scene

RULES = (
    Rule(
        name="python-len-zero",
        language="python",
        kind="idiom",
        pattern="len($X) == 0",
        replacement="not $X",
        instructions=(
            "Replace `len(x) == 0` with `not x`",
            "Test emptiness by truth value instead of `len(x) == 0`",
            "Use `not x` where the code compares `len(x)` with 0",
            "Emptiness checks `len(x) == 0` fail on None; write `not x`",
        ),
        think=(
            "An empty or missing collection is false, so len of x equal to zero becomes not x.",
            "Match len compared with exactly zero and use the truth value; other lengths stay.",
        ),
        decision="test emptiness with not",
        keep="keep other length checks",
        real=r"\blen\(\w[\w.]*\) == 0",
        scenes=(
            python_scene(
                """
 def «verb»_«noun»(items):
-    if len(items) == 0:
+    if not items:
         return "«word»"
     if len(items) == 1:
         return items[0]
     return len(items)
""",
                test_none='self.assertEqual(«mod».«verb»_«noun»(None), "«word»")',
                test_kept='self.assertEqual([«mod».«verb»_«noun»(["a"]), «mod».«verb»_«noun»("abc")], ["a", 3])',
                overbroad=("len($X) == $N", "not $X"),
            ),
            python_scene(
                """
 def «verb»_all(«noun», «noun2»):
-    empty = len(«noun») == 0
+    empty = not «noun»
     single = len(«noun2») == 1
     return empty, single
""",
                test_none='self.assertEqual(«mod».«verb»_all(None, "ab"), (True, False))',
                test_kept='self.assertEqual(«mod».«verb»_all([«n»], "a"), (False, True))',
                overbroad=("len($X) == $N", "not $X"),
            ),
        ),
    ),
    Rule(
        name="python-equals-none",
        language="python",
        kind="idiom",
        pattern="$X == None",
        replacement="$X is None",
        instructions=(
            "Compare with None by identity: use `is None` instead of `== None`",
            "Replace `x == None` with `x is None`",
            "Use `is None` where the code says `== None`",
            "`== None` calls `__eq__`; write `is None`",
        ),
        think=(
            "Equality calls user code while None is a single object, so compare with is None.",
            "Match equality with None only and use identity; other comparisons keep their operator.",
        ),
        decision="compare None by identity",
        keep="keep other comparisons",
        real=r"\w == None\b",
        scenes=(
            python_scene(
                """
 def «verb»_«noun»(«noun», «field»):
-    if «noun» == None:
+    if «noun» is None:
         return «n»
     return «noun» == «field»
""",
                imports=("\n\nclass Same:\n    def __eq__(self, other):\n        return True\n\n    __hash__ = None"),
                test_identity="self.assertIs(«mod».«verb»_«noun»(Same(), 1), True)",
                test_kept="self.assertEqual(«mod».«verb»_«noun»(None, 1), «n»)",
                overbroad=("$X == $Y", "$X is $Y.real"),
            ),
        ),
    ),
    Rule(
        name="python-not-equals-none",
        language="python",
        kind="idiom",
        pattern="$X != None",
        replacement="$X is not None",
        instructions=(
            "Use `is not None` instead of `!= None`",
            "Replace `x != None` with `x is not None`",
            "Compare with None by identity: `!= None` becomes `is not None`",
            "`!= None` calls `__ne__`; write `is not None`",
        ),
        think=(
            "Inequality calls user code while None is a single object, so use is not None.",
            "Match inequality with None only and use identity; other comparisons stay.",
        ),
        decision="compare None by identity",
        keep="keep other comparisons",
        real=r"\w != None\b",
        scenes=(
            python_scene(
                """
 def «verb»_«noun»(«noun», «field»):
-    if «noun» != None:
+    if «noun» is not None:
         return «noun» != «field»
     return «n»
""",
                imports=(
                    "\n\nclass Odd:\n    def __ne__(self, other):\n        return other == «n»\n\n    __hash__ = None"
                ),
                test_identity="self.assertIs(«mod».«verb»_«noun»(Odd(), «n»), True)",
                test_kept="self.assertEqual([«mod».«verb»_«noun»(a, [1]) for a in (None, [1])], [«n», False])",
                overbroad=("$X != $Y", "$X is not $Y"),
            ),
        ),
    ),
    Rule(
        name="python-dict-get",
        language="python",
        kind="idiom",
        pattern="$D[$K] if $K in $D else $V",
        replacement="$D.get($K, $V)",
        instructions=(
            "Replace `d[k] if k in d else v` with `d.get(k, v)`",
            "Use `d.get(k, v)` instead of a membership test and a lookup",
            "Simplify `d[k] if k in d else v` to one `get` call",
            "Look the key up once: `d.get(k, v)` for `d[k] if k in d else v`",
        ),
        think=(
            "The conditional looks the key up twice; get with a default does it once.",
            "Bind mapping, key and default, then write one get call.",
        ),
        decision="look up with get",
        keep="keep plain lookups",
        difficulty=2,
        real=r"\[\w+\] if \w+ in \w+ else",
        scenes=(
            python_scene(
                """
 def «verb»_«noun»(«other», key):
-    return «other»[key] if key in «other» else «n»
+    return «other».get(key, «n»)
 
 
 def strict(«other», key):
     return «other»[key]
""",
                imports=(
                    "\n\nclass Box:\n    __contains__ = None\n"
                    "\n    def get(self, key, default):\n        return [key, default]\n"
                    "\n    def __getitem__(self, key):\n        return key"
                ),
                test_get='self.assertEqual(«mod».«verb»_«noun»(Box(), "k"), ["k", «n»])',
                test_kept='self.assertEqual(«mod».strict(Box(), "k"), "k")',
                overbroad=("$A if $B else $V", "«other».get(key)"),
            ),
        ),
    ),
    Rule(
        name="python-isinstance",
        language="python",
        kind="idiom",
        pattern="type($X) == $T",
        replacement="isinstance($X, $T)",
        constraints={"T": {"kind": "identifier"}},
        instructions=(
            "Replace `type(x) == T` with `isinstance(x, T)`",
            "Check types with `isinstance`, not `type(x) == T`",
            "Use `isinstance(x, T)` where the code compares `type(x)` with a class name",
            "Subclasses must pass: write `isinstance(x, T)` for `type(x) == T`",
        ),
        think=(
            "Comparing type rejects subclasses; isinstance accepts them. Require the right side to be a class name.",
            "Bind value and class, with the class an identifier, and call isinstance.",
        ),
        decision="check types with isinstance",
        keep="keep comparisons of two types",
        difficulty=3,
        real=r"type\(\w+\) == [A-Za-z]\w*\b(?!\()",
        scenes=(
            python_scene(
                """
 def «verb»_«noun»(a, b):
     same = type(a) == type(b)
-    if type(a) == int:
+    if isinstance(a, int):
         return "«word»", same
-    return type(b) == dict, same
+    return isinstance(b, dict), same
""",
                test_subclass='self.assertEqual(«mod».«verb»_«noun»(True, 1), ("«word»", False))',
                test_kept='self.assertEqual(«mod».«verb»_«noun»("a", {}), (True, False))',
                overbroad=("type($X) == $T", "isinstance($X, $T)"),
            ),
        ),
    ),
    Rule(
        name="python-list-keys",
        language="python",
        kind="idiom",
        pattern="list($D.keys())",
        replacement="list($D)",
        instructions=(
            "Replace `list(d.keys())` with `list(d)`",
            "Drop the needless `.keys()` in `list(d.keys())`",
            "Write `list(d)` instead of `list(d.keys())`",
            "`list(d.keys())` should be `list(d)`",
        ),
        think=(
            "Iterating a mapping yields its keys, so the keys call inside list is needless.",
            "Bind the mapping and pass it to list directly; other views stay.",
        ),
        decision="iterate the mapping itself",
        keep="keep values and items",
        real=r"list\(\w+\.keys\(\)\)",
        scenes=(
            python_scene(
                """
 def «verb»_«noun»(«other»):
-    return list(«other».keys())
+    return list(«other»)
 
 
 def values(«other»):
     return list(«other».values())
""",
                test_iterates="self.assertEqual(«mod».«verb»_«noun»((«n», «n2»)), [«n», «n2»])",
                test_kept='self.assertEqual(«mod».values({"a": «n»}), [«n»])',
                overbroad=("list($D.$M())", "list($D)"),
            ),
        ),
    ),
    Rule(
        name="python-sorted-reverse",
        language="python",
        kind="idiom",
        pattern="reversed(sorted($X))",
        replacement="sorted($X, reverse=True)",
        instructions=(
            "Replace `reversed(sorted(x))` with `sorted(x, reverse=True)`",
            "Sort in reverse directly: `sorted(x, reverse=True)` for `reversed(sorted(x))`",
            "Callers need a list: use `sorted(x, reverse=True)`, not `reversed(sorted(x))`",
            "Use the `reverse=True` argument instead of `reversed(sorted(x))`",
        ),
        think=(
            "reversed gives an iterator; sorted with reverse=True gives the list in one call.",
            "Bind what is sorted and ask sorted for reverse order.",
        ),
        decision="sort with reverse=True",
        keep="keep other reversed calls",
        real=r"reversed\(sorted\(\w+\)\)",
        scenes=(
            python_scene(
                """
 def «verb»_«noun»(items):
-    return reversed(sorted(items))
+    return sorted(items, reverse=True)
 
 
 def backwards(items):
     return list(reversed(items))
""",
                test_list="self.assertEqual(«mod».«verb»_«noun»([1, «n», 5]), [«n», 5, 1])",
                test_kept="self.assertEqual(«mod».backwards([1, «n», 5]), [5, «n», 1])",
                overbroad=("reversed($X)", "sorted($X, reverse=True)"),
            ),
        ),
    ),
    Rule(
        name="python-open-encoding",
        language="python",
        kind="arguments",
        pattern="open($P)",
        replacement='open($P, encoding="utf-8")',
        instructions=(
            'Give `open(path)` an explicit `encoding="utf-8"`',
            'Add `encoding="utf-8"` to calls of `open` with one argument',
            'Files must be read as UTF-8: `open(p)` becomes `open(p, encoding="utf-8")`',
            'Pass `encoding="utf-8"` where `open` gets only a path',
        ),
        think=(
            "Without an encoding open uses the locale. Add utf-8 to one-argument calls; binary opens do not match.",
            "A one-argument pattern finds text opens; append the utf-8 encoding.",
        ),
        decision="open files as utf-8",
        keep="keep binary opens",
        real=r"(?<![\w.])open\(\w+\)",
        scenes=(
            python_scene(
                """
 def «verb»_«noun»(path):
-    with open(path) as file:
+    with open(path, encoding="utf-8") as file:
         return file.read()
 
 
 def raw(path):
     with open(path, "rb") as file:
         return file.read()
""",
                imports="from unittest.mock import mock_open, patch",
                test_encoding=(
                    'with patch("builtins.open", mock_open(read_data="«word»")) as opened:\n'
                    '    self.assertEqual(«mod».«verb»_«noun»("a.txt"), "«word»")\n'
                    'self.assertEqual(opened.call_args.kwargs, {"encoding": "utf-8"})'
                ),
                test_kept=(
                    'with patch("builtins.open", mock_open(read_data=b"«word»")) as opened:\n'
                    '    «mod».raw("a.bin")\n'
                    'self.assertEqual((opened.call_args.args, opened.call_args.kwargs), (("a.bin", "rb"), {}))'
                ),
                overbroad=("open($P, $$$REST)", 'open($P, encoding="utf-8")'),
            ),
        ),
    ),
    Rule(
        name="python-utcnow",
        language="python",
        kind="idiom",
        pattern="datetime.datetime.utcnow()",
        replacement="datetime.datetime.now(datetime.timezone.utc)",
        instructions=(
            "Replace `datetime.datetime.utcnow()` with `datetime.datetime.now(datetime.timezone.utc)`",
            "Make UTC times aware: `datetime.datetime.now(datetime.timezone.utc)` for `datetime.datetime.utcnow()`",
            "`datetime.datetime.utcnow()` is deprecated; use `datetime.datetime.now(datetime.timezone.utc)`",
            "Use `datetime.datetime.now(datetime.timezone.utc)` instead of `datetime.datetime.utcnow()`",
        ),
        think=(
            "utcnow returns a naive time and is deprecated; now with the UTC zone is aware.",
            "The call has no arguments, so match it literally and pass the UTC zone to now.",
        ),
        decision="use aware UTC times",
        keep="keep local times",
        real=r"datetime\.datetime\.utcnow\(\)",
        scenes=(
            python_scene(
                """
 import datetime
 
 
 def «verb»_«noun»():
-    return {"«field»": datetime.datetime.utcnow()}
+    return {"«field»": datetime.datetime.now(datetime.timezone.utc)}
 
 
 def local():
     return datetime.datetime.now()
""",
                test_aware='self.assertIsNotNone(«mod».«verb»_«noun»()["«field»"].tzinfo)',
                test_kept="self.assertIsNone(«mod».local().tzinfo)",
                overbroad=("datetime.datetime.$F()", "datetime.datetime.now(datetime.timezone.utc)"),
            ),
        ),
    ),
    Rule(
        name="python-monotonic",
        language="python",
        kind="idiom",
        pattern="time.time()",
        replacement="time.monotonic()",
        instructions=(
            "Measure durations with `time.monotonic()` instead of `time.time()`",
            "Replace `time.time()` with `time.monotonic()`",
            "Clock changes break `time.time()`; use `time.monotonic()`",
            "Use `time.monotonic()` where the code calls `time.time()`",
        ),
        think=(
            "time.time jumps when the clock is set; time.monotonic does not. Match the call literally.",
            "A duration needs a clock that never goes back, so call time.monotonic.",
        ),
        decision="measure with time.monotonic",
        keep="keep time.sleep",
        real=r"\btime\.time\(\)",
        scenes=(
            python_scene(
                """
 import time
 
 
 def «verb»_«noun»(job):
-    start = time.time()
+    start = time.monotonic()
     job(«n»)
     time.sleep(0)
-    return time.time() - start
+    return time.monotonic() - start
""",
                imports="from unittest.mock import patch",
                test_monotonic=(
                    'with patch("time.monotonic", side_effect=[1.0, 4.0]):\n'
                    "    self.assertEqual(«mod».«verb»_«noun»(str), 3.0)"
                ),
                test_kept=(
                    'with patch("time.sleep") as sleep:\n    «mod».«verb»_«noun»(str)\nsleep.assert_called_once_with(0)'
                ),
                overbroad=("time.$F($$$A)", "time.monotonic()"),
            ),
        ),
    ),
    Rule(
        name="python-startswith-tuple",
        language="python",
        kind="idiom",
        pattern="$X.startswith($A) or $X.startswith($B)",
        replacement="$X.startswith(($A, $B))",
        instructions=(
            "Merge `x.startswith(a) or x.startswith(b)` into one call with a tuple",
            "Replace `x.startswith(a) or x.startswith(b)` with `x.startswith((a, b))`",
            "Call `startswith` once with both prefixes",
            "Use a tuple of prefixes instead of two `startswith` calls joined by `or`",
        ),
        think=(
            "startswith accepts a tuple, so two tests of the same string become one call.",
            "Bind the string once and both prefixes, then pass the prefixes as a tuple.",
        ),
        decision="merge prefixes into a tuple",
        keep="keep single prefix tests",
        difficulty=2,
        real=r"\.startswith\(.+\) or \w+\.startswith\(",
        scenes=(
            python_scene(
                """
 def «verb»_«noun»(text):
-    return text.startswith("«word»") or text.startswith("«word2»")
+    return text.startswith(("«word»", "«word2»"))
 
 
 def hidden(text):
     return text.startswith(".") or text == "«noun»"
""",
                imports=(
                    "\n\nclass Once(str):\n    calls = 0\n\n    def startswith(self, prefix):\n"
                    "        Once.calls += 1\n        return str.startswith(self, prefix)"
                ),
                test_one_call='«mod».«verb»_«noun»(Once("zzz"))\nself.assertEqual(Once.calls, 1)',
                test_kept='self.assertTrue(«mod».hidden("«noun»") and «mod».hidden(".a"))',
                overbroad=("$A or $B", 'text.startswith(("«word»", "«word2»"))'),
            ),
        ),
    ),
)
