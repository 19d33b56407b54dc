"""JavaScript rules that swap one idiom for a better one."""

from data_pipeline.tasks.rule import Rule
from data_pipeline.tasks.scenes import javascript_scene

RULES = (
    Rule(
        name="javascript-strict-equal",
        language="javascript",
        kind="idiom",
        pattern="$A == $B",
        replacement="$A === $B",
        constraints={"B": {"regex": "^[^n]"}},
        instructions=(
            "Use `===` instead of `==`, except against null",
            "Replace `==` with `===` unless the right side is null",
            "Loose equality converts types; write `===` but leave `== null`",
            "Turn `a == b` into `a === b`, leaving comparisons with null",
        ),
        think=(
            "Loose equality converts types, so use strict equality. A constraint on B leaves null comparisons.",
            "Bind both sides and compare strictly; the right side must not be null.",
        ),
        decision="compare strictly",
        keep="keep comparisons with null",
        difficulty=3,
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(value, key) {
   const missing = value == null;
-  const same = value == «n»;
+  const same = value === «n»;
-  return [missing, same, key == "«word»"];
+  return [missing, same, key === "«word»"];
 }
""",
                "«verb»«Noun»",
                strict='assert.deepEqual(«verb»«Noun»("«n»", ["«word»"]), [false, false, false]);',
                kept='assert.deepEqual(«verb»«Noun»(undefined, "«word»"), [true, false, true]);',
                overbroad=("$A == $B", "$A === $B"),
            ),
        ),
    ),
    Rule(
        name="javascript-strict-unequal",
        language="javascript",
        kind="idiom",
        pattern="$A != $B",
        replacement="$A !== $B",
        constraints={"B": {"regex": "^[^n]"}},
        instructions=(
            "Use `!==` instead of `!=`, except against null",
            "Replace `!=` with `!==` unless the right side is null",
            "Loose inequality converts types; write `!==` but leave `!= null`",
            "Turn `a != b` into `a !== b`, leaving comparisons with null",
        ),
        think=(
            "Loose inequality converts types, so use the strict one. A constraint on B leaves null comparisons.",
            "Bind both sides and compare strictly; the right side must not be null.",
        ),
        decision="compare strictly",
        keep="keep comparisons with null",
        difficulty=3,
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(value, key) {
   const present = value != null;
-  const other = value != «n»;
+  const other = value !== «n»;
-  return [present, other, key != "«word»"];
+  return [present, other, key !== "«word»"];
 }
""",
                "«verb»«Noun»",
                strict='assert.deepEqual(«verb»«Noun»("«n»", ["«word»"]), [true, true, true]);',
                kept='assert.deepEqual(«verb»«Noun»(undefined, "«word»"), [false, true, false]);',
                overbroad=("$A != $B", "$A !== $B"),
            ),
        ),
    ),
    Rule(
        name="javascript-parse-radix",
        language="javascript",
        kind="arguments",
        pattern="parseInt($X)",
        replacement="parseInt($X, 10)",
        instructions=(
            "Give `parseInt` the radix 10 where it has none",
            "Add the radix: `parseInt(x)` becomes `parseInt(x, 10)`",
            "Pass 10 as the second argument of one-argument `parseInt` calls",
            "Use `parseInt(x, 10)` instead of `parseInt(x)`",
        ),
        think=(
            "Without a radix parseInt guesses from the prefix. Add 10 to one-argument calls; other radixes stay.",
            "Match parseInt with one argument and append the radix 10.",
        ),
        decision="pass radix 10 to parseInt",
        keep="keep explicit radixes",
        real=r"\bparseInt\([\w.]+\)",
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(«field», «field2») {
-  const total = parseInt(«field») + «n»;
+  const total = parseInt(«field», 10) + «n»;
   return [total, parseInt(«field2», 16)];
 }
""",
                "«verb»«Noun»",
                radix='assert.deepEqual(«verb»«Noun»("0x11", "11"), [«n», 17]);',
                kept='assert.deepEqual(«verb»«Noun»("8", "ff"), [8 + «n», 255]);',
                overbroad=("parseInt($X, $$$REST)", "parseInt($X, 10)"),
            ),
        ),
    ),
    Rule(
        name="javascript-includes",
        language="javascript",
        kind="idiom",
        pattern="$A.indexOf($B) !== -1",
        replacement="$A.includes($B)",
        instructions=(
            "Replace `a.indexOf(b) !== -1` with `a.includes(b)`",
            "Use `includes` instead of comparing `indexOf` with -1",
            "Test membership with `a.includes(b)`, not `a.indexOf(b) !== -1`",
            "`a.indexOf(b) !== -1` misses NaN; write `a.includes(b)`",
        ),
        think=(
            "includes says what is meant and finds NaN. Match indexOf compared with -1; other positions stay.",
            "Bind list and member of the indexOf comparison and call includes.",
        ),
        decision="test membership with includes",
        keep="keep other indexOf calls",
        difficulty=2,
        real=r"\.indexOf\([^()]+\) !== -1",
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(items, value) {
-  const found = items.indexOf(value) !== -1;
+  const found = items.includes(value);
   const first = items.indexOf(value) !== 0;
   return [found, first, «n»];
 }
""",
                "«verb»«Noun»",
                nan="assert.deepEqual(«verb»«Noun»([1, NaN], NaN), [true, true, «n»]);",
                kept="assert.deepEqual(«verb»«Noun»([5], 5), [true, false, «n»]);",
                overbroad=("$A.indexOf($B) !== $C", "$A.includes($B)"),
            ),
        ),
    ),
    Rule(
        name="javascript-not-includes",
        language="javascript",
        kind="idiom",
        pattern="$A.indexOf($B) === -1",
        replacement="!$A.includes($B)",
        instructions=(
            "Replace `a.indexOf(b) === -1` with `!a.includes(b)`",
            "Use `!a.includes(b)` instead of comparing `indexOf` with -1",
            "Test absence with `!a.includes(b)`, not `a.indexOf(b) === -1`",
            "`a.indexOf(b) === -1` misses NaN; write `!a.includes(b)`",
        ),
        think=(
            "A negated includes says what is meant and finds NaN. Match indexOf equal to -1; other positions stay.",
            "Bind list and member of the indexOf comparison and negate includes.",
        ),
        decision="test absence with includes",
        keep="keep other indexOf calls",
        difficulty=2,
        real=r"\.indexOf\([^()]+\) === -1",
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(items, value) {
-  const missing = items.indexOf(value) === -1;
+  const missing = !items.includes(value);
   const first = items.indexOf(value) === 0;
   return [missing, first, «n»];
 }
""",
                "«verb»«Noun»",
                nan="assert.deepEqual(«verb»«Noun»([1, NaN], NaN), [false, false, «n»]);",
                kept="assert.deepEqual(«verb»«Noun»([5], 5), [false, true, «n»]);",
                overbroad=("$A.indexOf($B) === $C", "!$A.includes($B)"),
            ),
        ),
    ),
    Rule(
        name="javascript-has-own",
        language="javascript",
        kind="idiom",
        pattern="$A.hasOwnProperty($K)",
        replacement="Object.hasOwn($A, $K)",
        instructions=(
            "Replace `a.hasOwnProperty(k)` with `Object.hasOwn(a, k)`",
            "Use `Object.hasOwn(a, k)` instead of the `hasOwnProperty` method",
            "Objects without a prototype lack `hasOwnProperty`; call `Object.hasOwn(a, k)`",
            "Call `Object.hasOwn` wherever `hasOwnProperty` is called on an object",
        ),
        think=(
            "Objects may lack or override hasOwnProperty; Object.hasOwn always works. Pass object and key.",
            "Bind object and key of hasOwnProperty and hand both to Object.hasOwn.",
        ),
        decision="use Object.hasOwn",
        keep="keep the in operator",
        real=r"\b\w+\.hasOwnProperty\(",
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(«noun», key) {
-  const own = «noun».hasOwnProperty(key);
+  const own = Object.hasOwn(«noun», key);
   return [own, key in «noun», «noun».toString === undefined];
 }
""",
                "«verb»«Noun»",
                bare='assert.deepEqual(«verb»«Noun»(Object.create(null), "«field»"), [false, false, true]);',
                kept='assert.deepEqual(«verb»«Noun»({ «field»: «n» }, "toString"), [false, true, false]);',
                overbroad=("$K in $A", "Object.hasOwn($A, $K)"),
            ),
        ),
    ),
    Rule(
        name="javascript-number-isnan",
        language="javascript",
        kind="idiom",
        pattern="isNaN($X)",
        replacement="Number.isNaN($X)",
        instructions=(
            "Use `Number.isNaN` instead of the global `isNaN`",
            "Replace `isNaN(x)` with `Number.isNaN(x)`",
            "The global `isNaN` converts its argument; call `Number.isNaN`",
            "Call `Number.isNaN(x)` where the code calls `isNaN(x)`",
        ),
        think=(
            "The global isNaN converts strings to numbers first; Number.isNaN does not.",
            "Match the plain function isNaN and call the one on Number.",
        ),
        decision="use Number.isNaN",
        keep="keep «lib».isNaN",
        real=r"(?<![.\w])isNaN\(",
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(value, «lib») {
-  if (isNaN(value)) {
+  if (Number.isNaN(value)) {
     return «n»;
   }
   return «lib».isNaN(value);
 }
""",
                "«verb»«Noun»",
                text='assert.equal(«verb»«Noun»("«word»", { isNaN: () => "other" }), "other");',
                kept=(
                    'assert.deepEqual([«verb»«Noun»(NaN), «verb»«Noun»(1, { isNaN: () => "other" })], [«n», "other"]);'
                ),
                overbroad=("$A.isNaN($X)", "Number.isNaN($X)"),
            ),
        ),
    ),
    Rule(
        name="javascript-number-isfinite",
        language="javascript",
        kind="idiom",
        pattern="isFinite($X)",
        replacement="Number.isFinite($X)",
        instructions=(
            "Use `Number.isFinite` instead of the global `isFinite`",
            "Replace `isFinite(x)` with `Number.isFinite(x)`",
            "The global `isFinite` converts its argument; call `Number.isFinite`",
            "Call `Number.isFinite(x)` where the code calls `isFinite(x)`",
        ),
        think=(
            "The global isFinite converts strings to numbers first; Number.isFinite does not.",
            "Match the plain function isFinite and call the one on Number.",
        ),
        decision="use Number.isFinite",
        keep="keep «lib».isFinite",
        real=r"(?<![.\w])isFinite\(",
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(value, «lib») {
-  if (isFinite(value)) {
+  if (Number.isFinite(value)) {
     return value + «n»;
   }
   return «lib».isFinite(value);
 }
""",
                "«verb»«Noun»",
                text='assert.equal(«verb»«Noun»("7", { isFinite: () => "other" }), "other");',
                kept="assert.deepEqual([«verb»«Noun»(1), «verb»«Noun»(NaN, { isFinite: () => 0 })], [1 + «n», 0]);",
                overbroad=("$A.isFinite($X)", "Number.isFinite($X)"),
            ),
        ),
    ),
    Rule(
        name="javascript-slice-substr",
        language="javascript",
        kind="idiom",
        pattern="$S.substr($N)",
        replacement="$S.slice($N)",
        instructions=(
            "Replace the deprecated `s.substr(n)` with `s.slice(n)`",
            "Use `slice` where `substr` gets one argument",
            "`substr` is deprecated; `s.substr(n)` becomes `s.slice(n)`",
            "Call `s.slice(n)` instead of `s.substr(n)`",
        ),
        think=(
            "substr is deprecated and slice does the same with one argument. Two-argument calls differ and stay.",
            "Match substr with one argument on any string and call slice.",
        ),
        decision="use slice for substr",
        keep="keep two-argument substr",
        real=r"\.substr\([\w.]+\)",
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(text) {
-  const tail = text.substr(2);
+  const tail = text.slice(2);
   return [tail, text.substr(1, «n»)];
 }
""",
                "«verb»«Noun»",
                list='assert.deepEqual(«verb»«Noun»({ slice: () => "tail", substr: () => "mid" }), ["tail", "mid"]);',
                kept='assert.deepEqual(«verb»«Noun»("«word»"), ["«word»".slice(2), "«word»".slice(1, «n» + 1)]);',
                overbroad=("$S.substr($N, $$$REST)", "$S.slice($N)"),
            ),
        ),
    ),
    Rule(
        name="javascript-throw-error",
        language="javascript",
        kind="idiom",
        pattern="throw $X;",
        replacement="throw new Error($X);",
        constraints={"X": {"kind": "string"}},
        instructions=(
            "Throw `Error` objects instead of plain strings",
            "Wrap thrown strings in `new Error(...)`",
            'Replace `throw "text";` with `throw new Error("text");`',
            "Thrown strings have no stack; throw `new Error(text)`",
        ),
        think=(
            "A thrown string has no stack trace. Wrap it in Error; the constraint leaves thrown objects.",
            "Match throw of a string, by kind, and wrap the string in Error.",
        ),
        decision="throw Error objects",
        keep="keep thrown objects",
        difficulty=3,
        real=r"throw ['\"]",
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(value, failure) {
   if (value > «n») {
-    throw "«word»";
+    throw new Error("«word»");
   }
   throw failure;
 }
""",
                "«verb»«Noun»",
                error='assert.throws(() => «verb»«Noun»(«n» + 1), { name: "Error", message: "«word»" });',
                kept="const failure = new TypeError();\nassert.throws(() => «verb»«Noun»(0, failure), TypeError);",
                overbroad=("throw $X;", "throw new Error($X);"),
            ),
        ),
    ),
    Rule(
        name="javascript-const-var",
        language="javascript",
        kind="idiom",
        pattern="var $N = $V;",
        replacement="const $N = $V;",
        instructions=(
            "Declare with `const` instead of `var`",
            "Replace `var x = v;` with `const x = v;`",
            "`var` leaks out of the loop; use `const`",
            "Use `const` where a variable is declared with `var` and a value",
        ),
        think=(
            "var is shared by all closures of the loop; const makes one per turn. Keep name and value.",
            "Bind name and value of the var statement and declare it with const.",
        ),
        decision="declare with const",
        keep="keep let declarations",
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(items) {
   const calls = [];
   for (let i = 0; i < items.length; i += 1) {
-    var value = items[i] + «n»;
+    const value = items[i] + «n»;
     calls.push(() => value);
   }
   return calls.map((call) => call());
 }
""",
                "«verb»«Noun»",
                closures="assert.deepEqual(«verb»«Noun»([1, 2]), [1 + «n», 2 + «n»]);",
                empty="assert.deepEqual(«verb»«Noun»([]), []);",
                overbroad=("let $N = $V;", "const $N = $V;"),
            ),
        ),
    ),
    Rule(
        name="javascript-spread-assign",
        language="javascript",
        kind="idiom",
        pattern="Object.assign($X, $Y)",
        replacement="({ ...$X, ...$Y })",
        instructions=(
            "Merge with spread instead of `Object.assign(x, y)`",
            "Replace `Object.assign(x, y)` with `({ ...x, ...y })`",
            "`Object.assign(x, y)` changes `x`; write `({ ...x, ...y })`",
            "Use `({ ...x, ...y })` where the code calls `Object.assign(x, y)`",
        ),
        think=(
            "Object.assign changes its first object; spreading both makes a new one.",
            "Bind both objects and spread them into a new object.",
        ),
        decision="merge with spread",
        keep="keep Object.keys",
        scenes=(
            javascript_scene(
                """
 function «verb»«Noun»(«noun», «noun2») {
-  const merged = Object.assign(«noun», «noun2»);
+  const merged = ({ ...«noun», ...«noun2» });
   return [merged, Object.keys(«noun»)];
 }
""",
                "«verb»«Noun»",
                unchanged='assert.deepEqual(«verb»«Noun»({ a: 1 }, { b: «n» }), [{ a: 1, b: «n» }, ["a"]]);',
                same='assert.deepEqual(«verb»«Noun»({ a: 1 }, { a: 2 }), [{ a: 2 }, ["a"]]);',
                overbroad=("Object.$F($X)", "({ ...$X })"),
            ),
        ),
    ),
)
