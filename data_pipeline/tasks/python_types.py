"""Python rules that modernise type hints."""

from data_pipeline.tasks.rule import Rule
from data_pipeline.tasks.scenes import python_scene

RULES = (
    Rule(
        name="python-optional-hint",
        language="python",
        kind="types",
        pattern="$N: Optional[$T] = $V",
        replacement="$N: $T | None = $V",
        instructions=(
            "Write `T | None` instead of `Optional[T]` in annotated assignments",
            "Modernise `x: Optional[T] = v` to `x: T | None = v`",
            "Replace `Optional[T]` with `T | None` in variable annotations",
            "`Optional` is gone from the imports; annotate with `T | None`",
        ),
        think=(
            "Optional of T is T or None. Bind name, type and value of the annotated assignment.",
            "Match the whole annotated assignment and write its type with a bar.",
        ),
        decision="write hints as T | None",
        keep="keep other annotations",
        difficulty=2,
        real=r"^ *\w+: Optional\[",
        scenes=(
            python_scene(
                """
 class «Noun»:
-    «field»: Optional[int] = «n»
-    «field2»: Optional[str] = None
+    «field»: int | None = «n»
+    «field2»: str | None = None
     rows: list[int] = [«n2»]
""",
                test_hints=(
                    'self.assertEqual(«mod».«Noun».__annotations__["«field»"], int | None)\n'
                    'self.assertEqual(«mod».«Noun».__annotations__["«field2»"], str | None)'
                ),
                test_kept='self.assertEqual(«mod».«Noun».__annotations__["rows"], list[int])',
                overbroad=("$N: $T = $V", "$N: int | None = $V"),
            ),
        ),
    ),
    Rule(
        name="python-list-hint",
        language="python",
        kind="types",
        pattern="List[$T]",
        replacement="list[$T]",
        instructions=(
            "Use the builtin `list[T]` instead of `List[T]` in type aliases",
            "Replace `List[T]` with `list[T]`",
            "Modernise the alias `List[T]` to `list[T]`",
            "`typing.List` is deprecated; write `list[T]`",
        ),
        think=(
            "The builtin list takes a type since Python 3.9, so List of T becomes list of T.",
            "Bind the element type and use the builtin list.",
        ),
        decision="use builtin list hints",
        keep="keep ordinary indexing",
        real=r"= List\[",
        scenes=(
            python_scene(
                """
-«Noun»Ids = List[int]
-«Noun»Names = List[str]
+«Noun»Ids = list[int]
+«Noun»Names = list[str]
 TABLE = [«n», «n2»]
 LAST = TABLE[1]
""",
                test_alias="self.assertEqual((«mod».«Noun»Ids, «mod».«Noun»Names), (list[int], list[str]))",
                test_kept="self.assertEqual(«mod».LAST, «n2»)",
                overbroad=("$A[$T]", "list[$T]"),
            ),
        ),
    ),
    Rule(
        name="python-dict-hint",
        language="python",
        kind="types",
        pattern="Dict[$K, $V]",
        replacement="dict[$K, $V]",
        instructions=(
            "Use the builtin `dict[K, V]` instead of `Dict[K, V]` in type aliases",
            "Replace `Dict[K, V]` with `dict[K, V]`",
            "Modernise the alias `Dict[K, V]` to `dict[K, V]`",
            "`typing.Dict` is deprecated; write `dict[K, V]`",
        ),
        think=(
            "The builtin dict takes types since Python 3.9, so Dict becomes dict.",
            "Bind key and value type and use the builtin dict.",
        ),
        decision="use builtin dict hints",
        keep="keep ordinary indexing",
        real=r"= Dict\[",
        scenes=(
            python_scene(
                """
-«Noun»Map = Dict[str, int]
-«Noun»Names = Dict[int, str]
+«Noun»Map = dict[str, int]
+«Noun»Names = dict[int, str]
 GRID = {(1, 2): «n»}
 CORNER = GRID[1, 2]
""",
                test_alias="self.assertEqual((«mod».«Noun»Map, «mod».«Noun»Names), (dict[str, int], dict[int, str]))",
                test_kept="self.assertEqual(«mod».CORNER, «n»)",
                overbroad=("$A[$K, $V]", "dict[$K, $V]"),
            ),
        ),
    ),
    Rule(
        name="python-union-hint",
        language="python",
        kind="types",
        pattern="Union[$A, $B]",
        replacement="$A | $B",
        instructions=(
            "Write `A | B` instead of `Union[A, B]` in type aliases",
            "Replace `Union[A, B]` with `A | B`",
            "Modernise the alias `Union[A, B]` to `A | B`",
            "`Union` is gone from the imports; join two types with `|`",
        ),
        think=(
            "A union of two types is written with a bar since Python 3.10.",
            "Bind the two types and join them with a bar.",
        ),
        decision="write unions as A | B",
        keep="keep ordinary indexing",
        real=r"= Union\[",
        scenes=(
            python_scene(
                """
-«Noun»Key = Union[int, str]
-«Noun»Size = Union[int, float]
+«Noun»Key = int | str
+«Noun»Size = int | float
 GRID = {(1, 2): «n»}
 CORNER = GRID[1, 2]
""",
                test_alias="self.assertEqual((«mod».«Noun»Key, «mod».«Noun»Size), (int | str, int | float))",
                test_kept="self.assertEqual(«mod».CORNER, «n»)",
                overbroad=("$A[$K, $V]", "$K | $V"),
            ),
        ),
    ),
)
