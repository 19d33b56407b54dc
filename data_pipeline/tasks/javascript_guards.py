"""JavaScript rules that add a guard or a default, or tidy promises."""

from data_pipeline.tasks.rule import Rule
from data_pipeline.tasks.scenes import javascript_scene

RULES = (
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
            javascript_scene(
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
            javascript_scene(
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
            javascript_scene(
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
            javascript_scene(
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
            javascript_scene(
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
            javascript_scene(
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
            javascript_scene(
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
            javascript_scene(
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
