"""JavaScript rules that swap an idiom, add a guard, delete debug code or tidy promises."""

from data_pipeline.tasks.rule import Rule, Scene
from data_pipeline.tasks.scene_tests import node_test_file


def _scene(
    source: str,
    exports: str,
    *,
    overbroad: tuple[str, str] | tuple[()] = (),
    others: dict[str, str] | None = None,
    setup: str = "",
    **bodies: str,
) -> Scene:
    """A one-module scene that exports the comma-separated names `exports`; `setup` runs before the tests."""
    text = source.rstrip("\n") + f"\n \n module.exports = {{ {exports} }};\n"
    imports = f'const {{ {exports} }} = require("./«mod»");\n{setup}'.rstrip()
    tests = {"«mod».test.js": node_test_file(imports, **bodies)}
    return Scene({"«mod».js": text, **(others or {})}, tests, overbroad)


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
            _scene(
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
            _scene(
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
            _scene(
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
            _scene(
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
            _scene(
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
            _scene(
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
            _scene(
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
            _scene(
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
            _scene(
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
        name="javascript-nullish",
        language="javascript",
        kind="guard",
        pattern="«noun».«field» || $V",
        replacement="«noun».«field» ?? $V",
        instructions=(
            "Zero is a valid `«noun».«field»`: use `??` for its default",
            "Replace `||` with `??` in the default of `«noun».«field»`",
            "`«noun».«field» || x` loses 0; write `«noun».«field» ?? x`",
            "Use `??` instead of `||` after `«noun».«field»`",
        ),
        think=(
            "The or operator replaces zero too; the nullish operator only replaces null. Keep the default value.",
            "Match the default of «noun».«field» and swap the operator for the nullish one.",
        ),
        decision="use ?? for «noun».«field»",
        keep="keep other || defaults",
        scenes=(
            _scene(
                """
 function «verb»«Noun»(«noun») {
-  const «field» = «noun».«field» || «n»;
+  const «field» = «noun».«field» ?? «n»;
   const «field2» = «noun».«field2» || «n2»;
   return [«field», «field2»];
 }
""",
                "«verb»«Noun»",
                zero="assert.deepEqual(«verb»«Noun»({ «field»: 0, «field2»: 0 }), [0, «n2»]);",
                kept="assert.deepEqual(«verb»«Noun»({}), [«n», «n2»]);",
                overbroad=("$A || $V", "$A ?? $V"),
            ),
        ),
    ),
    Rule(
        name="javascript-optional-chain",
        language="javascript",
        kind="guard",
        pattern="$A && $A.$B",
        replacement="$A?.$B",
        instructions=(
            "Replace `a && a.b` with `a?.b`",
            "Use optional chaining instead of `a && a.b`",
            "Read guarded properties with `a?.b`, not `a && a.b`",
            "Shorten `a && a.b` to `a?.b`",
        ),
        think=(
            "Testing an object before reading its property is optional chaining. Both uses must be the same object.",
            "Bind object and property, repeating the object, and write the chain.",
        ),
        decision="use optional chaining",
        keep="keep other && tests",
        difficulty=2,
        real=r"\b(\w+) && \1\.\w+\b",
        scenes=(
            _scene(
                """
 function «verb»«Noun»(«noun», «noun2») {
-  const value = «noun» && «noun».«field»;
+  const value = «noun»?.«field»;
   return [value, «noun» && «noun2».«field2»];
 }
""",
                "«verb»«Noun»",
                missing="assert.deepEqual(«verb»«Noun»(null, {}), [undefined, null]);",
                kept="assert.deepEqual(«verb»«Noun»({ «field»: «n» }, { «field2»: 2 }), [«n», 2]);",
                overbroad=("$A && $C.$B", "$A?.$B"),
            ),
        ),
    ),
    Rule(
        name="javascript-parse-default",
        language="javascript",
        kind="guard",
        pattern="JSON.parse($X)",
        replacement='JSON.parse($X || "{}")',
        instructions=(
            'Parse an empty object when the text is missing: `JSON.parse(x || "{}")`',
            'Replace `JSON.parse(x)` with `JSON.parse(x || "{}")`',
            'Empty text crashes `JSON.parse(x)`; fall back to `"{}"`',
            'Add the fallback `|| "{}"` inside one-argument `JSON.parse` calls',
        ),
        think=(
            "Missing text makes the parser throw. Fall back to an empty object; calls with a reviver stay.",
            "Match JSON.parse with one argument and add the empty-object fallback.",
        ),
        decision="parse missing text as {}",
        keep="keep calls with a reviver",
        real=r"JSON\.parse\([\w.]+\)",
        scenes=(
            _scene(
                """
 function «verb»«Noun»(text) {
-  return JSON.parse(text);
+  return JSON.parse(text || "{}");
 }
 
 function strict(text) {
   return JSON.parse(text, (key, value) => value);
 }
""",
                "«verb»«Noun», strict",
                empty='assert.deepEqual(«verb»«Noun»(""), {});',
                kept='assert.throws(() => strict(""));\nassert.equal(«verb»«Noun»("«n»"), «n»);',
                overbroad=("JSON.parse($X, $$$REST)", 'JSON.parse($X || "{}")'),
            ),
        ),
    ),
    Rule(
        name="javascript-guard-null",
        language="javascript",
        kind="guard",
        pattern="return «noun».«field»;",
        replacement="return «noun» ? «noun».«field» : null;",
        instructions=(
            "Return null when `«noun»` is missing instead of reading `«noun».«field»`",
            "Guard `return «noun».«field»;` against a missing `«noun»`",
            "`«noun»` may be null: return `«noun».«field»` only if it is there",
            "Make `return «noun».«field»;` safe when `«noun»` is null",
        ),
        think=(
            "«noun» may be null, so return «field» only if it is there and null otherwise.",
            "Match the return of «noun».«field» and add a condition on «noun».",
        ),
        decision="guard «noun» against null",
        keep="keep other returns",
        scenes=(
            _scene(
                """
 function «field»Of(«noun») {
-  return «noun».«field»;
+  return «noun» ? «noun».«field» : null;
 }
 
 function «field2»Of(«noun») {
   return «noun».«field2»;
 }
""",
                "«field»Of, «field2»Of",
                guarded="assert.equal(«field»Of(undefined), null);",
                kept="assert.throws(() => «field2»Of(null));\nassert.equal(«field»Of({ «field»: «n» }), «n»);",
                overbroad=("return «noun».$F;", "return «noun» ? «noun».$F : null;"),
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
            _scene(
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
            _scene(
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
            _scene(
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
            _scene(
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
            _scene(
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
            _scene(
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
            _scene(
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
            _scene(
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
    Rule(
        name="javascript-await-call",
        language="javascript",
        kind="promise",
        pattern="const $N = «lib».«verb»($$$ARGS);",
        replacement="const $N = await «lib».«verb»($$$ARGS);",
        instructions=(
            "`«lib».«verb»` is asynchronous now; await it where it is assigned",
            "Await the result of `«lib».«verb»` in `const` declarations",
            "Add `await` to `const x = «lib».«verb»(...);`",
            "`const x = «lib».«verb»(...)` gets a promise; await it",
        ),
        think=(
            "«lib».«verb» returns a promise now, so await it. Calls already awaited do not match.",
            "Bind name and arguments of the declaration and await the call of «lib».«verb».",
        ),
        decision="await «lib».«verb»",
        keep="keep «other».«verb»",
        difficulty=2,
        scenes=(
            _scene(
                """
 async function «verb»«Noun»(«lib», «other», key) {
-  const value = «lib».«verb»(key, «n»);
+  const value = await «lib».«verb»(key, «n»);
   const pending = «other».«verb»(key);
   return { value, pending };
 }
""",
                "«verb»«Noun»",
                setup="const «lib» = { «verb»: async (a, b) => a + b };",
                awaited="assert.equal((await «verb»«Noun»(«lib», «lib», 3)).value, 3 + «n»);",
                kept="assert.ok((await «verb»«Noun»(«lib», «lib», 3)).pending instanceof Promise);",
                overbroad=("const $N = $M.«verb»($$$ARGS);", "const $N = await $M.«verb»($$$ARGS);"),
            ),
        ),
    ),
    Rule(
        name="javascript-all-settled",
        language="javascript",
        kind="promise",
        pattern="Promise.all($X)",
        replacement="Promise.allSettled($X)",
        instructions=(
            "One failure must not stop the rest: use `Promise.allSettled`",
            "Replace `Promise.all(x)` with `Promise.allSettled(x)`",
            "Wait for all promises with `Promise.allSettled` instead of `Promise.all`",
            "Use `Promise.allSettled(x)` where the code calls `Promise.all(x)`",
        ),
        think=(
            "Promise.all rejects at the first failure; allSettled waits for every promise.",
            "Match Promise.all with its one argument and call allSettled.",
        ),
        decision="use Promise.allSettled",
        keep="keep Promise.race",
        scenes=(
            _scene(
                """
 async function «verb»«Noun»(jobs) {
-  const results = await Promise.all(jobs);
+  const results = await Promise.allSettled(jobs);
   const first = await Promise.race([jobs[0], «n»]);
   return [results.length, first];
 }
""",
                "«verb»«Noun»",
                failure="assert.equal((await «verb»«Noun»([Promise.resolve(1), Promise.reject(new Error())]))[0], 2);",
                kept="assert.deepEqual(await «verb»«Noun»([7]), [1, 7]);",
                overbroad=("Promise.$F($X)", "Promise.allSettled($X)"),
            ),
        ),
    ),
    Rule(
        name="javascript-catch-report",
        language="javascript",
        kind="promise",
        pattern="$P.catch(() => {})",
        replacement="$P.catch(«lib».report)",
        instructions=(
            "Report swallowed errors: pass `«lib».report` to `catch`",
            "Replace `p.catch(() => {})` with `p.catch(«lib».report)`",
            "Empty catch handlers hide errors; use `«lib».report`",
            "Use `«lib».report` instead of the empty function in `catch`",
        ),
        think=(
            "An empty handler hides the error. Keep the promise and pass «lib».report to catch.",
            "Match catch with an empty arrow function and give it «lib».report.",
        ),
        decision="report errors with «lib».report",
        keep="keep other handlers",
        scenes=(
            _scene(
                """
 async function «verb»«Noun»(«lib», job) {
-  await job(«n»).catch(() => {});
+  await job(«n»).catch(«lib».report);
   return job(«n2»).catch(() => "«word»");
 }
""",
                "«verb»«Noun»",
                setup="const fail = async (value) => {\n  throw value;\n};",
                reported=(
                    "const seen = [];\nawait «verb»«Noun»({ report: (x) => seen.push(x) }, fail);\n"
                    "assert.deepEqual(seen, [«n»]);"
                ),
                kept='assert.equal(await «verb»«Noun»({ report: () => 0 }, fail), "«word»");',
                overbroad=("$P.catch($F)", "$P.catch(«lib».report)"),
            ),
        ),
    ),
    Rule(
        name="javascript-sleep",
        language="javascript",
        kind="promise",
        pattern="new Promise((r) => setTimeout(r, $MS))",
        replacement="«lib».sleep($MS)",
        instructions=(
            "Wait with `«lib».sleep(ms)` instead of a promise around `setTimeout`",
            "Replace `new Promise((r) => setTimeout(r, ms))` with `«lib».sleep(ms)`",
            "Use the helper `«lib».sleep` for the hand-written timeout promise",
            "Call `«lib».sleep(ms)` where a promise wraps `setTimeout`",
        ),
        think=(
            "The promise around setTimeout is a sleep. Bind the delay and pass it to «lib».sleep.",
            "Match the whole promise with its delay and call «lib».sleep.",
        ),
        decision="wait with «lib».sleep",
        keep="keep other promises",
        difficulty=2,
        scenes=(
            _scene(
                """
 async function «verb»«Noun»(«lib», value) {
-  await new Promise((r) => setTimeout(r, «n»));
+  await «lib».sleep(«n»);
   return new Promise((r) => setImmediate(r, value));
 }
""",
                "«verb»«Noun»",
                slept=(
                    "const seen = [];\nawait «verb»«Noun»({ sleep: async (x) => seen.push(x) }, 1);\n"
                    "assert.deepEqual(seen, [«n»]);"
                ),
                kept='assert.equal(await «verb»«Noun»({ sleep: async () => 0 }, "«word»"), "«word»");',
                overbroad=("new Promise($F)", "«lib».sleep(0)"),
            ),
        ),
    ),
)
