"""The trace grammar once more, as text for another engine: an oracle that shares no code with `srl_jax.grammar*`.

Written from the rules (`trace.parse_trace`'s, and the narrowings that `grammar_dfa` documents) as whole regular
expressions with intersection and complement, which llguidance takes and our automaton is not made from. What a
replacement or a constraint may use is said as an implication over the whole action: either it does not use this name,
or the pattern binds it. Lengths and the number of brackets are left out; the number of items in a list is in.
"""

import re
import sys
from collections.abc import Sequence

from srl_jax.trace import LANGUAGES, MAX_FILES, MAX_STATE_ITEMS, STATE_FIELDS, TAGS

SPACE = "".join(rf"\x{{{code:x}}}" for code in range(sys.maxunicode + 1) if chr(code).isspace())


def trace_lark(singles: Sequence[str], multis: Sequence[str], tag_ids: Sequence[int]) -> str:
    """Lark text in llguidance's dialect. `tag_ids` in the order of `TAGS`; none: tags are plain text."""
    names = {(1, name): rf"\${name}" for name in singles} | {(3, name): rf"\$\$\${name}" for name in multis}
    if tag_ids:
        think, unthink, act, unact, state, unstate = (f"<[{token}]>" for token in tag_ids)
        start = rf'start: {think} THINK {unthink} "\n" {act} ACTION {unact} "\n" {state} STATE {unstate}'
    else:
        think, unthink, act, unact, state, unstate = (f'"{tag}"' for tag in TAGS)
        start = (
            "start: TRACE\n"
            rf'TRACE: {think} THINK {unthink} "\n" {act} ACTION {unact} "\n" {state} STATE {unstate}'
        )
    implied = [f"({_unused(sigil, name)} | {_bound(names[sigil, name])})" for sigil, name in names]
    lists = " ".join(rf'/{"," if i else "[{]"}"{name}":/ ITEMS' for i, name in enumerate(STATE_FIELDS))
    return rf"""
%llguidance {{"no_forcing": true}}
{start}

THINK: /[^{SPACE}]((?s:.*)[^{SPACE}])?/ & ~TAGGED
ACTION: (HEAD PATTERN MIDDLE REPLACEMENT FILES CONSTRAINTS? /\}}/) & ~TAGGED & {" & ".join(implied)}
STATE: ({lists} /\}}/) & ~TAGGED

// A tag's text, with any number of slashes; of the last pair no more is needed than this.
TAGGED: /(?s:.*)<\/*(think>|action>|state_u)(?s:.*)/
ANYTHING: /(?s:.*)/
// One character of a JSON string as it is written.
UNIT: /[^"\\\x00-\x1f]|\\["\\bfnrt]/
STRING: UNIT+

HEAD: /\{{"language":"({"|".join(LANGUAGES)})","pattern":"/
BLANK: /([{SPACE}]|\\[nrtf])*/
BARE: BLANK /\$\$?\$?[A-Z_][A-Z0-9_]*|\$\$\$/ BLANK
PATTERN: UNIT+ & ~BLANK & ~BARE
MIDDLE: /","replacement":"/
// A run of dollars and the longest name behind it, other than the known ones.
USE: /\$+[A-Z_][A-Z0-9_]*/ & ~/{"|".join(names.values())}/
REPLACEMENT: UNIT* & ~((UNIT* NO_DOLLAR)? USE (NO_NAME UNIT*)?)
NO_DOLLAR: UNIT & ~/\$/
NO_NAME: UNIT & ~/[A-Z0-9_]/

FILES: /","files":\[/ GLOB (/,/ GLOB){{0,{MAX_FILES - 1}}} /\]/
GLOB: /"/ (/[^"\\<\x00-\x1f]+/ & ~/[{SPACE}\/](?s:.*)/ & ~/((?s:.*)[\/{{}},])?\.\.([\/{{}},](?s:.*))?/) /"/

CONSTRAINTS: /,"constraints":\{{/ ({_sorted_rules(sorted(singles))}) /\}}/
RULE: /:\{{"(regex|kind)":"/ STRING /"\}}/

ITEMS: /\[/ (/"/ STRING /"/ (/,"/ STRING /"/){{0,{MAX_STATE_ITEMS - 1}}})? /\]/

// What may stand before a pattern's metavariable, and behind it: nothing that could belong to the name.
BEFORE: /[^"\\\x00-\x1f\w$\x{{80}}-\x{{10ffff}}]|[{SPACE}]|\\["\\bfnrt]/
BEHIND: /[^"\\\x00-\x1f\w\x{{80}}-\x{{10ffff}}]|\\["\\bfnrt]/
"""


def _bound(spelled: str) -> str:
    return rf"HEAD (UNIT* BEFORE)? /{spelled}/ (BEHIND UNIT*)? /\"/ ANYTHING"


def _unused(sigil: int, name: str) -> str:
    used = rf"(HEAD UNIT* MIDDLE (UNIT* NO_DOLLAR)? /{re.escape('$' * sigil)}{name}/ (NO_NAME UNIT*)? /\"/ ANYTHING)"
    if sigil == 1:
        used = rf"({used} | /(?s:.*)[{{,]\"{name}\":\{{(?s:.*)/)"
    return f"~{used}"


def _sorted_rules(names: list[str]) -> str:
    """Rules for some of `names`, at least one, in this order."""
    text = ""
    for name in reversed(names):
        rest = f" (/,/ ({text}))?" if text else ""
        text = rf'/"{name}"/ RULE{rest}' + (f" | {text}" if text else "")
    return text
