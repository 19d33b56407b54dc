"""TypeScript rules about types: annotations, type arguments, assertions, imports."""

from data_pipeline.tasks.rule import Rule
from data_pipeline.tasks.scenes import typescript_scene

_ANNOTATIONS = (
    Rule(
        name="typescript-array-shorthand",
        language="typescript",
        kind="types",
        pattern="const $N: Array<$T> = $V;",
        replacement="const $N: $T[] = $V;",
        constraints={"T": {"kind": "predefined_type"}},
        instructions=(
            "Annotate constants with `T[]` instead of `Array<T>` where T is a built-in type",
            "Write `const x: string[]` for `const x: Array<string>`; built-in element types only",
            "Shorten `Array<T>` to `T[]` in annotations of constants whose elements are built-in types",
            "Replace `Array<T>` by `T[]` on constants, but only for simple built-in types",
        ),
        think=(
            "Array<T> of a built-in type reads better as T[]. A constraint on T leaves unions, which need brackets.",
            "Bind name, element type and value of the constant; T must be predefined so that unions stay.",
        ),
        decision="write T[] for Array<T>",
        keep="keep arrays of unions",
        difficulty=3,
        real=r"^\s*const \w+: Array<(string|number|boolean|unknown|any)> = .*;$",
        scenes=(
            typescript_scene(
                """
 export function «verb»«Noun»(«kw»: number): string[] {
-  const rows: Array<string> = ["«word»"];
+  const rows: string[] = ["«word»"];
   const mixed: Array<string | number> = [«kw», «n»];
   return rows.concat(mixed.map(String));
 }
""",
                overbroad=("const $N: Array<$T> = $V;", "const $N: $T[] = $V;"),
            ),
        ),
    ),
    Rule(
        name="typescript-unknown-variable",
        language="typescript",
        kind="types",
        pattern="let $N: any = $V;",
        replacement="let $N: unknown = $V;",
        instructions=(
            "Annotate variables with `unknown` instead of `any`",
            "Replace `let x: any = v` with `let x: unknown = v`",
            "`any` switches checks off: declare `let` variables as `unknown`",
            "Use the type `unknown` for `let` variables that are `any`",
        ),
        think=(
            "any switches the checks off, unknown keeps them. Match let declarations of type any with a value.",
            "Bind name and value of variables declared any and declare them unknown.",
        ),
        decision="declare unknown, not any",
        keep="keep other types",
        scenes=(
            typescript_scene(
                """
 export function «verb»«Noun»(text: string): unknown {
-  let value: any = JSON.parse(text);
+  let value: unknown = JSON.parse(text);
   let «kw»: number = «n»;
   return [value, «kw»];
 }
""",
                overbroad=("let $N: $T = $V;", "let $N: unknown = $V;"),
            ),
        ),
    ),
    Rule(
        name="typescript-infer-number",
        language="typescript",
        kind="types",
        pattern="let $N: number = $V;",
        replacement="let $N = $V;",
        constraints={"V": {"kind": "number"}},
        instructions=(
            "Drop the annotation `number` from variables that start with a number literal",
            "Replace `let x: number = 3` with `let x = 3`",
            "The compiler infers number literals; remove their `number` annotations",
            "Remove `: number` where the value is a literal number",
        ),
        think=(
            "A number literal's type is inferred. A constraint on V takes literals only and leaves computed values.",
            "Bind name and value, demand a number literal as value, and drop the annotation.",
        ),
        decision="infer types of number literals",
        keep="keep types of computed values",
        difficulty=3,
        real=r"^\s*let \w+: number = \d+;$",
        scenes=(
            typescript_scene(
                """
 export function «verb»«Noun»(rows: string[]): number {
-  let «kw»: number = «n»;
+  let «kw» = «n»;
   let size: number = rows.length;
   return «kw» + size;
 }
""",
                overbroad=("let $N: number = $V;", "let $N = $V;"),
            ),
        ),
    ),
    Rule(
        name="typescript-record",
        language="typescript",
        kind="types",
        pattern="const $N: { [key: string]: $T } = $V;",
        replacement="const $N: Record<string, $T> = $V;",
        instructions=(
            "Annotate constants with `Record<string, T>` instead of `{ [key: string]: T }`",
            "Replace the index signature `{ [key: string]: T }` of constants with `Record<string, T>`",
            "Write `Record<string, T>` for constants typed by a string index signature",
            "Use `Record<string, T>` where a constant is typed `{ [key: string]: T }`",
        ),
        think=(
            "Record names what the index signature spells out. Bind the value type and keep it as second argument.",
            "Match constants typed by a string index signature and write Record with the same value type.",
        ),
        decision="write Record for index signatures",
        keep="keep named object types",
        difficulty=2,
        real=r"^\s*const \w+: \{ \[key: string\]: [\w\[\]]+ \} = .*;$",
        scenes=(
            typescript_scene(
                """
 export function «verb»«Noun»(name: string): number {
-  const «noun»: { [key: string]: number } = { «field»: «n» };
+  const «noun»: Record<string, number> = { «field»: «n» };
   const «noun2»: { «field2»: number } = { «field2»: «n2» };
   return «noun»[name] + «noun2».«field2»;
 }
""",
                overbroad=("const $N: { $$$M } = $V;", "const $N: Record<string, number> = $V;"),
            ),
        ),
    ),
    Rule(
        name="typescript-primitive-string",
        language="typescript",
        kind="types",
        pattern="const $N: String = $V;",
        replacement="const $N: string = $V;",
        instructions=(
            "Annotate constants with the primitive `string`, not with `String`",
            "Replace `const x: String = v` with `const x: string = v`",
            "`String` is the wrapper object; use the type `string` for constants",
            "Use lower-case `string` where a constant is typed `String`",
        ),
        think=(
            "String is the wrapper object's type; the value is a primitive string. Match constants typed String.",
            "Bind name and value of constants typed String and annotate string.",
        ),
        decision="use primitive string types",
        keep="keep other types",
        scenes=(
            typescript_scene(
                """
 export function «verb»«Noun»(«field»: string): string {
-  const text: String = «field».trim();
+  const text: string = «field».trim();
   const when: Date = new Date(«n»);
-  const suffix: String = "«word»";
+  const suffix: string = "«word»";
   return text.concat(suffix, when.toISOString());
 }
""",
                overbroad=("const $N: $T = $V;", "const $N: string = $V;"),
            ),
        ),
    ),
    Rule(
        name="typescript-undefined-start",
        language="typescript",
        kind="types",
        pattern="let $N: $T | undefined = undefined;",
        replacement="let $N: $T | undefined;",
        instructions=(
            "Drop the initial value `undefined` from optional variables",
            "Replace `let x: T | undefined = undefined` with `let x: T | undefined`",
            "Variables start as undefined anyway; remove `= undefined`",
            "Declare `let x: T | undefined;` without the value `undefined`",
        ),
        think=(
            "A variable without a value is undefined already. Bind name and type and drop the value undefined.",
            "Match optional variables set to undefined and leave only the declaration with its type.",
        ),
        decision="drop initial undefined values",
        keep="keep null values",
        difficulty=2,
        real=r"^\s*let \w+: \w+ \| undefined = undefined;$",
        scenes=(
            typescript_scene(
                """
 export function «verb»«Noun»(rows: string[]): string | null {
-  let found: string | undefined = undefined;
+  let found: string | undefined;
   let last: string | null = null;
   for (const row of rows) {
     found = row;
     last = found ?? "«word»";
   }
   return last;
 }
""",
                overbroad=("let $N: $T | $U = $V;", "let $N: $T | $U;"),
            ),
        ),
    ),
    Rule(
        name="typescript-type-import",
        language="typescript",
        kind="types",
        pattern='import { $$$NAMES } from "./«lib»";',
        replacement='import type { $$$NAMES } from "./«lib»";',
        instructions=(
            "Import the types of `./«lib»` with `import type`",
            "`./«lib»` only exports types; use `import type` for it",
            "Turn the import from `./«lib»` into a type import",
            'Write `import type { ... } from "./«lib»"` instead of a plain import',
        ),
        think=(
            "«lib» only holds types. Match the named import from that module and add type, keeping every name.",
            "Bind all imported names of «lib» and import them as types; other modules stay.",
        ),
        decision="import types of «lib» as types",
        keep="keep the import from ./«other»",
        scenes=(
            typescript_scene(
                """
-import { «Noun», «Noun2» } from "./«lib»";
+import type { «Noun», «Noun2» } from "./«lib»";
 import { «verb»«Noun» } from "./«other»";
 
 export function run(«noun»: «Noun»): «Noun2» {
   return «verb»«Noun»(«noun», «n»);
 }
""",
                overbroad=('import { $$$NAMES } from "./«other»";', 'import type { $$$NAMES } from "./«other»";'),
            ),
        ),
    ),
    Rule(
        name="typescript-qualified-type",
        language="typescript",
        kind="types",
        pattern="const $N: «Lib».«Noun» = $V;",
        replacement="const $N: «Lib».«Noun2» = $V;",
        instructions=(
            "Annotate constants with `«Lib».«Noun2»` instead of `«Lib».«Noun»`",
            "The type `«Lib».«Noun»` is now `«Lib».«Noun2»`; update constants",
            "Replace the annotation `«Lib».«Noun»` of constants with `«Lib».«Noun2»`",
            "Use the type `«Lib».«Noun2»` where a constant is typed `«Lib».«Noun»`",
        ),
        think=(
            "«Lib».«Noun» was renamed to «Noun2». Match constants of that type and keep name and value.",
            "Bind name and value of constants typed «Lib».«Noun» and write the new type.",
        ),
        decision="type constants «Lib».«Noun2»",
        keep="keep «Other».«Noun»",
        scenes=(
            typescript_scene(
                """
 import { «Lib» } from "./«lib»";
 import { «Other» } from "./«other»";
 
 export function «verb»«Noun»(key: number): number {
-  const «noun»: «Lib».«Noun» = «Lib».«verb»(key);
+  const «noun»: «Lib».«Noun2» = «Lib».«verb»(key);
   const copy: «Other».«Noun» = «Other».«verb»(«n»);
   return «noun».«field» + copy.«field»;
 }
""",
                overbroad=("const $N: $M.«Noun» = $V;", "const $N: $M.«Noun2» = $V;"),
            ),
        ),
    ),
)

_ASSERTIONS = (
    Rule(
        name="typescript-as-unknown",
        language="typescript",
        kind="cast",
        pattern="$X as any",
        replacement="$X as unknown",
        instructions=(
            "Cast to `unknown` instead of `any`",
            "Replace `x as any` with `x as unknown`",
            "`as any` switches checks off; write `as unknown`",
            "Use `as unknown` wherever the code casts with `as any`",
        ),
        think=(
            "A cast to any switches the checks off, one to unknown keeps them. Bind the value and cast it to unknown.",
            "Match casts to any on any value; casts to other types do not match. Write unknown.",
        ),
        decision="cast to unknown",
        keep="keep other casts",
        scenes=(
            typescript_scene(
                """
 export function «verb»«Noun»(«noun»: object, «field»: object): unknown {
-  const raw = «noun» as any;
+  const raw = «noun» as unknown;
   const text = «field» as String;
   return [raw, text, «n»];
 }
""",
                overbroad=("$X as $T", "$X as unknown"),
            ),
        ),
    ),
    Rule(
        name="typescript-as-cast",
        language="typescript",
        kind="cast",
        pattern="<$T>$X",
        replacement="$X as $T",
        instructions=(
            "Write casts as `x as T` instead of `<T>x`",
            "Replace the cast `<T>x` with `x as T`",
            "Angle brackets clash with JSX; cast with `as`",
            "Turn every `<T>x` cast into `x as T`",
        ),
        think=(
            "Angle-bracket casts clash with JSX. Bind type and value and write the cast with as.",
            "Match a type in angle brackets before a value and write value as type; generic calls are no casts.",
        ),
        decision="cast with as",
        keep="keep generic calls",
        difficulty=2,
        real=r"[=(] <(string|number|[A-Z]\w*)>\w+[;.,)]",
        scenes=(
            typescript_scene(
                """
 export function «verb»«Noun»(«noun»: unknown, pick: <T>(value: T) => T): string {
-  const name = <string>«noun»;
+  const name = «noun» as string;
   const same = pick<string>(name);
   return same + «n»;
 }
""",
                overbroad=("$F<$T>($X)", "$X as $T"),
            ),
        ),
    ),
    Rule(
        name="typescript-single-cast",
        language="typescript",
        kind="cast",
        pattern="$X as unknown as $T",
        replacement="$X as $T",
        instructions=(
            "Cast once: `x as T` instead of `x as unknown as T`",
            "Replace `x as unknown as T` with `x as T`",
            "The detour over `unknown` hides errors; cast directly",
            "Drop `unknown` from double casts `x as unknown as T`",
        ),
        think=(
            "The detour over unknown hides real errors. Bind value and type and cast once.",
            "Match a cast to unknown followed by another cast, and keep value and last type.",
        ),
        decision="cast once",
        keep="keep casts over other types",
        difficulty=2,
        real=r"\b[\w.]+ as unknown as [A-Z]\w*[;,)]",
        scenes=(
            typescript_scene(
                """
 export function «verb»«Noun»(«noun»: object, «noun2»: string): Date[] {
-  const first = «noun» as unknown as Date;
+  const first = «noun» as Date;
   const second = «noun2» as string | Date as Date;
   return [first, second, new Date(«n»)];
 }
""",
                overbroad=("$X as $U as $T", "$X as $T"),
            ),
        ),
    ),
    Rule(
        name="typescript-optional-access",
        language="typescript",
        kind="cast",
        pattern="$X!.$P",
        replacement="$X?.$P",
        instructions=(
            "Use optional access `x?.p` instead of asserting `x!.p`",
            "Replace `x!.p` with `x?.p`",
            "`x!.p` crashes on null; read `x?.p`",
            "Turn non-null assertions before a property into optional access",
        ),
        think=(
            "A non-null assertion crashes where the value is missing; optional access gives undefined.",
            "Bind value and property of an asserted access and read it with optional access.",
        ),
        decision="read optional properties",
        keep="keep other assertions",
        difficulty=2,
        scenes=(
            typescript_scene(
                """
 export function «verb»«Noun»(«noun»: «Noun» | null, key: string | null): unknown {
-  const name = «noun»!.«field»;
+  const name = «noun»?.«field»;
-  return [name, key!, «noun»!.«field2», «n»];
+  return [name, key!, «noun»?.«field2», «n»];
 }
""",
                overbroad=("$X!", "$X"),
            ),
        ),
    ),
)

RULES = (*_ANNOTATIONS, *_ASSERTIONS)
