"""TypeScript rules about typed calls: type arguments, renamed generic functions and classes, enums."""

from data_pipeline.tasks.rule import Rule
from data_pipeline.tasks.scenes import typescript_scene

RULES = (
    Rule(
        name="typescript-type-argument",
        language="typescript",
        kind="arguments",
        pattern="«lib».«verb»($X)",
        replacement="«lib».«verb»<«Noun»>($X)",
        instructions=(
            "Pass the type argument `«Noun»` to `«lib».«verb»`",
            "`«lib».«verb»` is generic now; write `«lib».«verb»<«Noun»>(x)`",
            "Add `<«Noun»>` to calls of `«lib».«verb»`",
            "Turn `«lib».«verb»(x)` into `«lib».«verb»<«Noun»>(x)`",
        ),
        think=(
            "«lib».«verb» is generic now. Match its one-argument calls and add the type argument «Noun».",
            "Match «verb» on «lib» only, keep its argument and name the type «Noun».",
        ),
        decision="name the type of «lib».«verb»",
        keep="keep «other».«verb»",
        scenes=(
            typescript_scene(
                """
 import { «lib» } from "./«lib»";
 import { «other» } from "./«other»";
 
 export function run(key: string): unknown[] {
-  const value = «lib».«verb»(key);
+  const value = «lib».«verb»<«Noun»>(key);
   const kept = «other».«verb»(key);
   return [value, kept, «n»];
 }
""",
                overbroad=("$M.«verb»($X)", "$M.«verb»<«Noun»>($X)"),
            ),
        ),
    ),
    Rule(
        name="typescript-empty-map",
        language="typescript",
        kind="arguments",
        pattern="new Map()",
        replacement="new Map<string, «Noun»>()",
        instructions=(
            "Give empty maps the type arguments `<string, «Noun»>`",
            "Replace `new Map()` with `new Map<string, «Noun»>()`",
            "`new Map()` is a map of any; write `new Map<string, «Noun»>()`",
            "Name the types of empty maps: string keys, `«Noun»` values",
        ),
        think=(
            "An untyped empty Map holds any. Match the creation without arguments and name string and «Noun».",
            "Match new Map without arguments and add the type arguments string and «Noun».",
        ),
        decision="type empty maps",
        keep="keep sets",
        scenes=(
            typescript_scene(
                """
 export function «verb»«Noun»(rows: «Noun»[]): [unknown, unknown] {
-  const known = new Map();
+  const known = new Map<string, «Noun»>();
   const seen = new Set();
   for (const row of rows) {
     known.set(row.«field», row);
     seen.add(row.«field2»);
   }
   return [known, seen];
 }
""",
                overbroad=("new $C()", "new Map<string, «Noun»>()"),
            ),
        ),
    ),
    Rule(
        name="typescript-void-promise",
        language="typescript",
        kind="arguments",
        pattern="new Promise($F)",
        replacement="new Promise<void>($F)",
        instructions=(
            "Give promises without a value the type argument `void`",
            "Replace `new Promise(f)` with `new Promise<void>(f)`",
            "`new Promise(f)` is a promise of unknown; write `new Promise<void>(f)`",
            "Name the type of new promises: `void`",
        ),
        think=(
            "A Promise made without a type argument holds unknown. Bind the executor and name void.",
            "Match new Promise with its executor and add the type argument void; typed promises do not match.",
        ),
        decision="type promises as void",
        keep="keep typed promises",
        # Only files in which every untyped promise is one that waits: the others have a value.
        real=r"(?s)\A(?!.*\bnew Promise\((?!\(?\w+\)? => setTimeout\(\w+, )).*\bnew Promise\(",
        scenes=(
            typescript_scene(
                """
 export async function «verb»«Noun»(«kw»: number): Promise<number> {
-  await new Promise((done) => setTimeout(done, «kw»));
+  await new Promise<void>((done) => setTimeout(done, «kw»));
   const later = new Promise<number>((done) => done(«n»));
   return later;
 }
""",
                overbroad=("new Promise<$T>($F)", "new Promise<void>($F)"),
            ),
        ),
    ),
    Rule(
        name="typescript-rename-generic",
        language="typescript",
        kind="rename",
        pattern="«verb»«Noun»<$T>($$$ARGS)",
        replacement="«verb2»«Noun»<$T>($$$ARGS)",
        instructions=(
            "Rename calls of `«verb»«Noun»<T>` to `«verb2»«Noun»<T>`",
            "The generic `«verb»«Noun»` is now `«verb2»«Noun»`; update its typed calls",
            "Replace `«verb»«Noun»<T>(...)` with `«verb2»«Noun»<T>(...)`",
            "Use `«verb2»«Noun»<T>` wherever `«verb»«Noun»<T>` is called",
        ),
        think=(
            "The generic «verb»«Noun» was renamed. Match calls with a type argument and keep type and arguments.",
            "Rename typed calls to «verb2»«Noun»; calls without a type argument do not match.",
        ),
        decision="use «verb2»«Noun»",
        keep="keep calls without a type",
        scenes=(
            typescript_scene(
                """
 import { «verb»«Noun», «verb2»«Noun» } from "./«lib»";
 
 export function run(key: string): unknown[] {
-  const typed = «verb»«Noun»<string>(key, «n»);
+  const typed = «verb2»«Noun»<string>(key, «n»);
   const plain = «verb»«Noun»(key);
   return [typed, plain];
 }
""",
                overbroad=("«verb»«Noun»($$$ARGS)", "«verb2»«Noun»($$$ARGS)"),
            ),
        ),
    ),
    Rule(
        name="typescript-rename-class",
        language="typescript",
        kind="rename",
        pattern="new «Noun»Store<$T>($$$ARGS)",
        replacement="new «Noun»Cache<$T>($$$ARGS)",
        instructions=(
            "Create `«Noun»Cache<T>` objects instead of `«Noun»Store<T>` objects",
            "The generic class `«Noun»Store` is now `«Noun»Cache`; update where it is created",
            "Replace `new «Noun»Store<T>(...)` with `new «Noun»Cache<T>(...)`",
            "Use `new «Noun»Cache<T>(...)` wherever a `«Noun»Store<T>` is made",
        ),
        think=(
            "«Noun»Store became «Noun»Cache. Match its creation and keep type argument and arguments.",
            "Match new «Noun»Store with a type argument and create a «Noun»Cache of the same type.",
        ),
        decision="create «Noun»Cache",
        keep="keep «Noun2»Store",
        scenes=(
            typescript_scene(
                """
 import { «Noun»Cache, «Noun2»Store } from "./«lib»";
 
 export function run(«kw»: number): unknown[] {
-  const first = new «Noun»Store<string>(«kw»);
+  const first = new «Noun»Cache<string>(«kw»);
   const second = new «Noun2»Store<number>(«n»);
   return [first, second];
 }
""",
                overbroad=("new $C<$T>($$$ARGS)", "new «Noun»Cache<$T>($$$ARGS)"),
            ),
        ),
    ),
    Rule(
        name="typescript-const-enum",
        language="typescript",
        kind="idiom",
        pattern="enum «Noun» { $$$BODY }",
        replacement="const enum «Noun» { $$$BODY }",
        instructions=(
            "Make the enum `«Noun»` a `const enum`",
            "Inline the enum `«Noun»`: declare it `const enum`",
            "Turn `enum «Noun»` into `const enum «Noun»`",
            "Declare `«Noun»` as `const enum`",
        ),
        think=(
            "A const enum is inlined. Match the declaration of «Noun», keep its members and add const.",
            "Match enum «Noun» with any members and declare the same one const.",
        ),
        decision="inline enum «Noun»",
        keep="keep enum «Noun2»",
        scenes=(
            typescript_scene(
                """
-enum «Noun» { «Verb», «Verb2» }
+const enum «Noun» { «Verb», «Verb2» }
 enum «Noun2» { «Verb», «Verb2» }
 
 export function «verb»«Noun»(): number[] {
   return [«Noun».«Verb», «Noun2».«Verb2», «n»];
 }
""",
                overbroad=("enum $E { $$$BODY }", "const enum $E { $$$BODY }"),
            ),
        ),
    ),
    Rule(
        name="typescript-nullish",
        language="typescript",
        kind="idiom",
        pattern="$A !== undefined ? $A : $B",
        replacement="$A ?? $B",
        instructions=(
            "Replace `a !== undefined ? a : b` with `a ?? b`",
            "Use `??` for the default of an undefined value",
            "Write `a ?? b` where a conditional compares `a` with undefined",
            "Shorten `a !== undefined ? a : b` to `a ?? b`",
        ),
        think=(
            "The conditional only supplies a default for undefined. Bind value and default and join them by ??.",
            "The same value stands twice in the pattern, so only true defaults for undefined match.",
        ),
        decision="default with ??",
        keep="keep other conditionals",
        difficulty=2,
        real=r"\b([\w.]+) !== undefined \? \1 :",
        scenes=(
            typescript_scene(
                """
 export function «verb»«Noun»(«kw»?: number, «field»?: string): unknown[] {
-  const chosen = «kw» !== undefined ? «kw» : «n»;
+  const chosen = «kw» ?? «n»;
   const shown = «field» !== undefined ? "«word»" : "none";
   return [chosen, shown];
 }
""",
                overbroad=("$A !== undefined ? $C : $B", "$A ?? $B"),
            ),
        ),
    ),
)
