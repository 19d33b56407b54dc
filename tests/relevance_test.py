"""Which files an instruction speaks of."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.tasks.catalogue import CATALOGUE
from data_pipeline.tasks.rule import fill
from data_pipeline.tasks.vocabulary import draw
from srl_jax.relevance import holds_a_marked_name, language_of, relevant_places

FILES = {
    "app/db.py": "import os\n\n\ndef load(key):\n    return get_row(key)\n",
    "app/web.py": "import os\nfrom app.db import load\n\n\ndef page(key):\n    return str(load(key))\n",
    "app/log.py": "import os\n# the log\nprint('start')\n",
    "web/main.js": "const x = getRow(1);\n",
    "README.md": "get_row is old\n",
}


def found(instruction, **options):
    return [(place.path, place.line) for place in relevant_places(instruction, FILES, **options)]


def test_a_marked_name_finds_its_line():
    assert found("Rename `get_row` to `load_row`.")[0] == ("app/db.py", 5)
    assert found("Rename `getRow(...)` to `loadRow`.") == [("web/main.js", 1)]


def test_code_like_words_need_no_marks():
    assert found("get_row became load_row")[0] == ("app/db.py", 5)


def test_names_of_the_code_are_found_in_any_language():
    assert found("把get_row改成load_row。")[0] == ("app/db.py", 5)
    assert found("修改web/main.js中的getRow", limit=1) == [("web/main.js", 1)]
    assert found("Замени get_row на load_row")[0] == ("app/db.py", 5)
    assert found("把它改成另一个") == []
    accents = {"a.py": "größe = 1\n", "b.py": "gr = 2\n"}
    assert relevant_places("Benenne größe um", accents)[0].path == "a.py"


@pytest.mark.parametrize(
    ("instruction", "code", "held"),
    [
        ("Rename `_irregular` to `_add`.", "$X.upper()\n$X.capitalize()", False),
        ("Rename `_irregular` to `_add`.", "_irregular($A)\n$A", True),
        ("Rename `_irregular` to `_add`.", "add_irregular($A)\n$A", False),  # a part of a longer name
        ("Replace `callable(x)` by `hasattr(x, '__call__')`.", "callable($A)\nf($A)", True),
        ("Replace `fetch(DATA)`.", "get($DATA)\nget()", False),  # a metavariable is no name
        ("Replace `x.size() == 0` by `x.isEmpty()`.", "$X.size() == 0\n$X.isEmpty()", True),
        ("Replace `f(x)` by `g(x)`.", "f($X)\ng($X)", True),  # too short to be held to
        ("Use f-strings, not `%`.", '"$S" % $A\nf($S)', True),
        ("Remove debugging.", "print($X)\n", True),  # nothing is marked
        ("Tidy `app/db.py` and what is below `src/`.", "print($X)\n", True),  # nor here, but paths
    ],
)
def test_an_action_is_held_to_the_names_that_are_marked(instruction, code, held):
    assert holds_a_marked_name(instruction, code) is held


def test_rare_words_outweigh_common_ones():
    assert found("import os and print")[0] == ("app/log.py", 3)


def test_a_named_file_comes_first_whatever_it_holds():
    assert found("In web.py, replace get_row.", limit=2) == [("app/web.py", 1), ("app/db.py", 5)]
    assert found("Clean up log.py")[0][0] == "app/log.py"
    assert ("app/log.py", 1) not in found("Clean up catalog.py")


def test_words_are_whole_words():
    assert found("Replace `get_ro`.") == []


def test_languages_and_limit():
    assert found("`os` and `getRow`", languages=("javascript",)) == [("web/main.js", 1)]
    assert len(found("import os", limit=2)) == 2
    assert found("import os", limit=3) == found("import os", limit=3)


def test_only_files_the_engine_can_edit():
    assert language_of("a/b.tsx") == "tsx" and language_of("x.pyi") == "python" and language_of("README.md") is None


@given(st.text(max_size=200))
def test_any_instruction_is_taken(instruction):
    for place in relevant_places(instruction, FILES):
        assert 1 <= place.line <= FILES[place.path].count("\n")
    assert holds_a_marked_name(instruction, instruction)


def test_no_rule_of_the_catalogue_is_off_its_own_instruction():
    names = draw(random.Random(0))
    for rule in CATALOGUE:
        action = fill(f"{rule.pattern}\n{rule.replacement}", names)
        for instruction in rule.instructions:
            assert holds_a_marked_name(fill(instruction, names), action), (rule.name, instruction)
