"""JavaScript rules that rename a call or change its arguments."""

from data_pipeline.tasks.rule import Rule, Scene
from data_pipeline.tasks.scenes import node_test_file


def _two_libraries(
    old_call: str, new_call: str, kept_call: str, lib: str, other: str, overbroad: tuple[str, str], **bodies: str
) -> Scene:
    """A module that calls «lib» (to rewrite) and «other» (to keep); `lib` and `other` are the libraries' code."""
    source = f"""
 const «lib» = require("./«lib»");
 const «other» = require("./«other»");
 
 function run(key) {{
-  const value = {old_call};
+  const value = {new_call};
   return [value, {kept_call}];
 }}
 
 function label(key) {{
-  return ["«word»", {old_call}];
+  return ["«word»", {new_call}];
 }}
 
 module.exports = {{ run, label }};
"""
    tests = {"«mod».test.js": node_test_file('const { run, label } = require("./«mod»");', **bodies)}
    return Scene({"«mod».js": source, "«lib».js": lib, "«other».js": other}, tests, overbroad)


RULES = (
    Rule(
        name="javascript-rename-module-call",
        language="javascript",
        kind="rename",
        pattern="«lib».«verb»«Noun»($$$ARGS)",
        replacement="«lib».«verb2»«Noun»($$$ARGS)",
        instructions=(
            "Rename calls of `«lib».«verb»«Noun»` to `«lib».«verb2»«Noun»`",
            "`«lib».«verb»«Noun»` is now called `«lib».«verb2»«Noun»`; update its callers",
            "Replace `«lib».«verb»«Noun»(...)` with `«lib».«verb2»«Noun»(...)`",
            "Use `«lib».«verb2»«Noun»` wherever `«lib».«verb»«Noun»` is called",
        ),
        think=(
            "«lib».«verb»«Noun» was renamed. Match only that module's calls and keep every argument.",
            "Rename the call to «verb2»«Noun»; the module in the pattern protects «other».",
        ),
        decision="use «verb2»«Noun»",
        keep="keep «other».«verb»«Noun»",
        scenes=(
            _two_libraries(
                "«lib».«verb»«Noun»(key)",
                "«lib».«verb2»«Noun»(key)",
                "«other».«verb»«Noun»(key)",
                '\n exports.«verb2»«Noun» = (key) => ["«noun»", key];\n',
                '\n exports.«verb»«Noun» = (key) => ["kept", key];\n',
                ("$M.«verb»«Noun»($$$ARGS)", "$M.«verb2»«Noun»($$$ARGS)"),
                renamed='assert.deepEqual(label(3), ["«word»", ["«noun»", 3]]);',
                kept='assert.deepEqual(run(4), [["«noun»", 4], ["kept", 4]]);',
            ),
        ),
    ),
    Rule(
        name="javascript-rename-method",
        language="javascript",
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
            "Any receiver may call «verb»«Noun», so bind it; the plain function has none.",
        ),
        decision="use method «verb2»«Noun»",
        keep="keep the plain function",
        scenes=(
            Scene(
                sources={
                    "«mod».js": """
 const { «verb»«Noun» } = require("./helpers");
 
 function run(«lib», «other») {
-  const first = «lib».«verb»«Noun»(«n»);
-  const second = «other».«verb»«Noun»(«n2», "fast");
+  const first = «lib».«verb2»«Noun»(«n»);
+  const second = «other».«verb2»«Noun»(«n2», "fast");
   return [first, second, «verb»«Noun»(«n»)];
 }
 
 module.exports = { run };
""",
                    "helpers.js": '\n exports.«verb»«Noun» = (value) => ["helper", value];\n',
                },
                tests={
                    "«mod».test.js": node_test_file(
                        'const { run } = require("./«mod»");\nconst store = { «verb2»«Noun»: (...args) => args };',
                        renamed='assert.deepEqual(run(store, store).slice(0, 2), [[«n»], [«n2», "fast"]]);',
                        kept='assert.deepEqual(run(store, store)[2], ["helper", «n»]);',
                    )
                },
                overbroad=("«verb»«Noun»($$$ARGS)", "«lib».«verb2»«Noun»($$$ARGS)"),
            ),
        ),
    ),
    Rule(
        name="javascript-rename-property",
        language="javascript",
        kind="rename",
        pattern="$OBJ.«field»",
        replacement="$OBJ.«field2»",
        instructions=(
            "Rename the property `«field»` to `«field2»`",
            "Property `.«field»` is now `.«field2»`; update every access",
            "Read `.«field2»` instead of `.«field»` on all objects",
            "Replace accesses of `.«field»` with `.«field2»`",
        ),
        think=(
            "«field» is now «field2» on every object. Match any receiver; object keys do not match.",
            "Match property access on any object and rename it to «field2». The object key stays.",
        ),
        decision="rename property «field» to «field2»",
        keep="keep the key «field»",
        scenes=(
            Scene(
                sources={
                    "«mod».js": """
 function run(«noun», «noun2») {
-  const value = «noun».«field» + «noun2».«field»;
+  const value = «noun».«field2» + «noun2».«field2»;
   return { «field»: value };
 }
 
 module.exports = { run };
""",
                },
                tests={
                    "«mod».test.js": node_test_file(
                        'const { run } = require("./«mod»");',
                        renamed="assert.deepEqual(run({ «field2»: 1 }, { «field2»: «n» }), { «field»: 1 + «n» });",
                        text='assert.deepEqual(run({ «field2»: "a" }, { «field2»: "b" }), { «field»: "ab" });',
                    )
                },
                overbroad=("{ «field»: $V }", "{ «field2»: $V }"),
            ),
        ),
    ),
    Rule(
        name="javascript-rename-option",
        language="javascript",
        kind="rename",
        pattern="«lib».«verb»($X, { «kw»: $V })",
        replacement="«lib».«verb»($X, { «kw2»: $V })",
        instructions=(
            "`«lib».«verb»` renamed its option `«kw»` to `«kw2»`; update the calls",
            "Pass the option `«kw2»` instead of `«kw»` to `«lib».«verb»`",
            "Rename the option `«kw»` to `«kw2»` in calls of `«lib».«verb»`",
            "In `«lib».«verb»(...)` replace the option `«kw»` by `«kw2»`",
        ),
        think=(
            "The option «kw» of «lib».«verb» became «kw2». Keep the value and the first argument as they are.",
            "Only «lib».«verb» takes «kw2», so name the module and carry the value over.",
        ),
        decision="rename option «kw» to «kw2»",
        keep="keep «other».«verb»",
        difficulty=2,
        scenes=(
            _two_libraries(
                "«lib».«verb»(key, { «kw»: «n» })",
                "«lib».«verb»(key, { «kw2»: «n» })",
                "«other».«verb»(key, { «kw»: «n2» })",
                "\n exports.«verb» = (key, options) => [key, options.«kw2»];\n",
                "\n exports.«verb» = (key, options) => [options.«kw», key];\n",
                ("$M.«verb»($X, { «kw»: $V })", "$M.«verb»($X, { «kw2»: $V })"),
                renamed='assert.deepEqual(label(3), ["«word»", [3, «n»]]);',
                kept="assert.deepEqual(run(4), [[4, «n»], [«n2», 4]]);",
            ),
        ),
    ),
    Rule(
        name="javascript-rename-class",
        language="javascript",
        kind="rename",
        pattern="new «lib».«Noun»($$$ARGS)",
        replacement="new «lib».«Noun»«Verb»er($$$ARGS)",
        instructions=(
            "Build `«lib».«Noun»«Verb»er` instead of `«lib».«Noun»`",
            "Class `«lib».«Noun»` is now `«lib».«Noun»«Verb»er`; update where it is built with `new`",
            "Replace `new «lib».«Noun»(...)` with `new «lib».«Noun»«Verb»er(...)`",
            "Rename the class `«lib».«Noun»` to `«lib».«Noun»«Verb»er` in `new` expressions",
        ),
        think=(
            "«lib».«Noun» is now «lib».«Noun»«Verb»er. Match its construction only and keep the arguments.",
            "Rename the class to «Noun»«Verb»er. The module in the pattern protects the other class.",
        ),
        decision="rename «Noun» to «Noun»«Verb»er",
        keep="keep «other».«Noun»",
        scenes=(
            _two_libraries(
                "new «lib».«Noun»(key).value",
                "new «lib».«Noun»«Verb»er(key).value",
                "new «other».«Noun»(key).value",
                "\n exports.«Noun»«Verb»er = class {\n   constructor(value) {\n     this.value = value;\n   }\n };\n",
                "\n exports.«Noun» = class {\n   constructor(value) {\n     this.value = [value];\n   }\n };\n",
                ("new $M.«Noun»($$$ARGS)", "new $M.«Noun»«Verb»er($$$ARGS)"),
                renamed='assert.deepEqual(label(3), ["«word»", 3]);',
                kept="assert.deepEqual(run(4), [4, [4]]);",
            ),
        ),
    ),
    Rule(
        name="javascript-add-option",
        language="javascript",
        kind="arguments",
        pattern="«lib».«verb»($X)",
        replacement="«lib».«verb»($X, { «kw»: «n» })",
        instructions=(
            "Pass `{ «kw»: «n» }` to every one-argument call of `«lib».«verb»`",
            "`«lib».«verb»` now needs a «kw»; add `{ «kw»: «n» }` where it is missing",
            "Add the option `{ «kw»: «n» }` to calls `«lib».«verb»(x)`",
            "Calls of `«lib».«verb»` with one argument must also give `{ «kw»: «n» }`",
        ),
        think=(
            "Add «kw» «n» after the single argument of «lib».«verb». Calls that already pass options do not match.",
            "A one-argument pattern finds the calls that lack «kw»; append the option to them.",
        ),
        decision="pass «kw» «n» to «lib».«verb»",
        keep="keep explicit «kw» values",
        scenes=(
            _two_libraries(
                "«lib».«verb»(key)",
                "«lib».«verb»(key, { «kw»: «n» })",
                "«lib».«verb»(key, { «kw»: «n2» })",
                "\n exports.«verb» = (key, options) => [key, options.«kw»];\n",
                "\n exports.unused = true;\n",
                ("«lib».«verb»($X, $$$REST)", "«lib».«verb»($X, { «kw»: «n» })"),
                added='assert.deepEqual(label(3), ["«word»", [3, «n»]]);',
                kept="assert.deepEqual(run(4), [[4, «n»], [4, «n2»]]);",
            ),
        ),
    ),
    Rule(
        name="javascript-drop-argument",
        language="javascript",
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
            _two_libraries(
                "«lib».«verb»(key, «n»)",
                "«lib».«verb»(key)",
                "«other».«verb»(key, «n»)",
                "\n exports.«verb» = (...args) => args;\n",
                "\n exports.«verb» = (key, size) => ({ key, size });\n",
                ("$M.«verb»($X, «n»)", "$M.«verb»($X)"),
                dropped='assert.deepEqual(label(3), ["«word»", [3]]);',
                kept="assert.deepEqual(run(4), [[4], { key: 4, size: «n» }]);",
            ),
        ),
    ),
    Rule(
        name="javascript-swap-arguments",
        language="javascript",
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
            _two_libraries(
                "«lib».«verb»(key, «n»)",
                "«lib».«verb»(«n», key)",
                "«other».«verb»(key, «n2»)",
                "\n exports.«verb» = (size, key) => size - key;\n",
                "\n exports.«verb» = (key, size) => size - key;\n",
                ("$M.«verb»($A, $B)", "$M.«verb»($B, $A)"),
                swapped='assert.deepEqual(label(3), ["«word»", «n» - 3]);',
                kept="assert.deepEqual(run(4), [«n» - 4, «n2» - 4]);",
            ),
        ),
    ),
    Rule(
        name="javascript-name-argument",
        language="javascript",
        kind="arguments",
        pattern="«lib».«verb»($X, $V)",
        replacement="«lib».«verb»($X, { «kw»: $V })",
        instructions=(
            "Pass the second argument of `«lib».«verb»` as the option `«kw»`",
            "`«lib».«verb»` takes an options object now; write the second argument as `{ «kw»: ... }`",
            "Turn the second argument of `«lib».«verb»` into `{ «kw»: ... }`",
            "Name the second argument in `«lib».«verb»` calls: `{ «kw»: ... }`",
        ),
        think=(
            "«lib».«verb» takes an options object now. Bind the second argument and pass it as «kw».",
            "Keep the first argument of «lib».«verb» and give the second one its name «kw».",
        ),
        decision="pass «kw» as an option",
        keep="keep «other».«verb»",
        scenes=(
            _two_libraries(
                "«lib».«verb»(key, «n»)",
                "«lib».«verb»(key, { «kw»: «n» })",
                "«other».«verb»(key, «n2»)",
                "\n exports.«verb» = (key, options) => [key, options.«kw»];\n",
                "\n exports.«verb» = (key, size) => size - key;\n",
                ("$M.«verb»($X, $V)", "$M.«verb»($X, { «kw»: $V })"),
                named='assert.deepEqual(label(3), ["«word»", [3, «n»]]);',
                kept="assert.deepEqual(run(4), [[4, «n»], «n2» - 4]);",
            ),
        ),
    ),
    Rule(
        name="javascript-wrap-argument",
        language="javascript",
        kind="arguments",
        pattern="«lib».«verb»($X)",
        replacement="«lib».«verb»(String($X))",
        instructions=(
            "Convert the argument of `«lib».«verb»` with `String`",
            "`«lib».«verb»` only accepts strings now; wrap its argument in `String(...)`",
            "Wrap what is passed to `«lib».«verb»` in `String()`",
            "Pass `String(x)` instead of `x` to `«lib».«verb»`",
        ),
        think=(
            "«lib».«verb» only accepts strings now. Bind its argument and wrap it in String.",
            "Wrap the single argument of «lib».«verb» in String; the other module gets the raw value.",
        ),
        decision="wrap the argument in String",
        keep="keep «other».«verb»",
        scenes=(
            _two_libraries(
                "«lib».«verb»(key)",
                "«lib».«verb»(String(key))",
                "«other».«verb»(key)",
                "\n exports.«verb» = (text) => text.length;\n",
                "\n exports.«verb» = (number) => number + «n»;\n",
                ("$M.«verb»($X)", "$M.«verb»(String($X))"),
                wrapped='assert.deepEqual(label(300), ["«word»", 3]);',
                kept="assert.deepEqual(run(4), [1, 4 + «n»]);",
            ),
        ),
    ),
    Rule(
        name="javascript-change-constant",
        language="javascript",
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
            _two_libraries(
                "«lib».«verb»(key, «n»)",
                "«lib».«verb»(key, «n2»)",
                "«lib».«verb»(key, «n3»)",
                "\n exports.«verb» = (key, size) => [key, size];\n",
                "\n exports.unused = true;\n",
                ("«lib».«verb»($X, $N)", "«lib».«verb»($X, «n2»)"),
                changed='assert.deepEqual(label(3), ["«word»", [3, «n2»]]);',
                kept="assert.deepEqual(run(4), [[4, «n2»], [4, «n3»]]);",
            ),
        ),
    ),
    Rule(
        name="javascript-prepend-argument",
        language="javascript",
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
            _two_libraries(
                "«lib».«verb»(key, «n»)",
                '«lib».«verb»("«word2»", key, «n»)',
                "«other».«verb»(key, «n2»)",
                "\n exports.«verb» = (tag, key, size) => [tag, key, size];\n",
                "\n exports.«verb» = (key, size) => [key, size];\n",
                ("$M.«verb»($$$ARGS)", '$M.«verb»("«word2»", $$$ARGS)'),
                added='assert.deepEqual(label(3), ["«word»", ["«word2»", 3, «n»]]);',
                kept='assert.deepEqual(run(4), [["«word2»", 4, «n»], [4, «n2»]]);',
            ),
        ),
    ),
)
