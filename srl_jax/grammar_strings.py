"""The texts inside a trace, as machines that read one character at a time: patterns, replacements, globs, free text.

A machine's state is any hashable value; reading a character gives the next state and an `Effect`, what it does to the
registers that ride beside the automaton. Characters are ASCII ones, or one of two classes that stand for all other
white space and for everything else; `grammar_dfa` spells those out in UTF-8.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple


class Effect(NamedTuple):
    """What an edge (a byte, or a token of several) does to the registers and asks of them.

    The edge exists only if one of the names in the bit mask `needs` is bound (0 asks nothing), and all of those in
    `also`. Then `bound = bound & ~unbinds | binds`, `brackets += opens` and `items += commas`.
    """

    needs: int = 0
    binds: int = 0
    unbinds: int = 0
    opens: int = 0
    commas: int = 0
    also: int = 0


NO_EFFECT = Effect()


def compose(first: Effect, second: Effect) -> Effect | None:
    """The effect of two edges in a row, or None when nothing that is bound before them lets both pass.

    Raises:
      ValueError: when both leave open which of several names they need, and not of the same ones. No text does: where
        a name ends, one is needed, and it is one of those that its beginning left open.
    """
    needs, also = second.needs & ~first.unbinds, second.also & ~first.binds
    if second.needs & first.binds:
        needs = 0
    elif (second.needs and not needs) or also & first.unbinds:
        return None
    also |= first.also
    asked = {mask for mask in (first.needs, needs) if mask and not mask & also}
    if len(asked) == 2:
        smaller, larger = sorted(asked, key=int.bit_count)
        if smaller & larger == smaller:
            asked = {smaller}
        elif smaller.bit_count() == 1:
            also, asked = also | smaller, {larger}
        else:
            raise ValueError(f"{first} then {second}: two choices between names, which one mask cannot hold")
    return Effect(
        needs=asked.pop() if asked else 0,
        binds=(first.binds & ~second.unbinds) | second.binds,
        unbinds=first.unbinds | second.unbinds,
        opens=first.opens + second.opens,
        commas=first.commas + second.commas,
        also=also,
    )


SPACE = "space"  # any non-ASCII white space character
OTHER = "other"  # any other non-ASCII character
Character = str
Step = Callable[[Hashable, Character], tuple[Hashable, Effect] | None]


def is_space(character: Character) -> bool:
    return character == SPACE or (character != OTHER and character.isspace())


def _is_word(character: Character) -> bool:
    """Whether it may be a word character (\\w): non-ASCII ones are taken for such, which never over-binds."""
    return character == OTHER or (len(character) == 1 and (character.isalnum() or character == "_"))


def _is_name(character: Character) -> bool:
    return len(character) == 1 and (character.isdigit() or "A" <= character <= "Z" or character == "_")


# "<state_u" instead of the whole tag saves states in nine places; nobody compares with `state_u...` unspaced.
_FORBIDDEN = ("<think>", "<action>", "<state_u")
_PREFIXES = {text[:length] for text in _FORBIDDEN for length in range(1, len(text))}


def tag_progress(progress: str, character: Character) -> str | None:
    """How much of a tag has been spelled after one more character; None when it is spelled out.

    `</` counts as `<`, so that opening and closing tags share their states.
    """
    if character == "<" or (progress == "<" and character == "/"):
        return "<"
    longer = progress + character
    if not progress or len(character) != 1 or longer not in _PREFIXES:
        return None if longer in _FORBIDDEN else ""
    return longer


@dataclass(frozen=True)
class StringMachine:
    """The content of one kind of JSON string.

    step reads a decoded character. close tells whether (and with what effect) the closing quote may follow.
    escape is the state and effect at a backslash, before the escaped character is read; None forbids escapes.
    expects gives `Place.expects`.
    """

    start: Hashable
    step: Step
    close: Callable[[Hashable], Effect | None]
    escape: Callable[[Hashable], tuple[Hashable, Effect]] | None
    expects: Callable[[Hashable], int] = lambda state: 0


def plain_string() -> StringMachine:
    """One character or more, no tag."""

    def step(state, character):
        progress = tag_progress("" if state == "empty" else state, character)
        return None if progress is None else (progress, NO_EFFECT)

    return StringMachine(
        start="empty",
        step=step,
        close=lambda state: None if state == "empty" else NO_EFFECT,
        escape=lambda state: (state if state == "empty" else "", NO_EFFECT),
    )


def glob_string() -> StringMachine:
    """A relative glob: the state is the path component so far ("", ".", "..", "name"), None before the first."""

    def step(state, character):
        if character in "<\\" or (state is None and (character == "/" or is_space(character))):
            return None
        if len(character) == 1 and character in "/{},":
            return None if state == ".." else ("", NO_EFFECT)
        if character == "." and state in (None, "", "."):
            return (state or "") + ".", NO_EFFECT
        return "name", NO_EFFECT

    return StringMachine(
        start=None, step=step, close=lambda state: None if state in (None, "..") else NO_EFFECT, escape=None
    )


class Names:
    """The known metavariables of one sigil, with their bits."""

    def __init__(self, names: tuple[str, ...], first_bit: int):
        self.bit = {name: 1 << (first_bit + index) for index, name in enumerate(sorted(names))}
        self.reach: dict[str, int] = {"": 0}
        for name, bit in self.bit.items():
            for length in range(len(name) + 1):
                self.reach[name[:length]] = self.reach.get(name[:length], 0) | bit

    @property
    def mask(self) -> int:
        return self.reach[""]


class Dollars(NamedTuple):
    """Inside a run of `$` (1 to 3), `whole` if nothing but white space came before it."""

    count: int
    whole: bool


class Name(NamedTuple):
    """Inside a metavariable's known name, or a prefix of one; `text` None is a name that is not known."""

    sigil: int
    text: str | None
    whole: bool


def pattern_string(names: dict[int, Names]) -> StringMachine:
    """A pattern: not blank, not a bare metavariable; binds the known names as the parser's regex does.

    States: "blank", "bare" (a metavariable, then white space), "word" (after a word character or a `$` that
    starts nothing), a tag's progress ("" after any other character), `Dollars`, `Name`.
    """

    def ended(state) -> tuple[Hashable, Effect]:
        """The state and effect once the next character is known not to be part of a name."""
        if isinstance(state, Name):
            known = names[state.sigil].bit.get(state.text, 0) if state.sigil in names and state.text else 0
            return ("bare" if state.whole else ""), Effect(binds=known)
        if isinstance(state, Dollars):
            return ("bare" if state.whole and state.count == 3 else ""), NO_EFFECT
        return state, NO_EFFECT

    def step(state, character):
        opens = int(character in ("(", "[", "{"))
        if character == "$":
            if isinstance(state, Dollars):
                return (Dollars(state.count + 1, state.whole) if state.count < 3 else "word"), NO_EFFECT
            after, effect = ended(state)
            if isinstance(state, Name) or after == "word" or _ends_in_letter(after):
                return "word", effect  # a `$` after a word character starts no metavariable
            return Dollars(1, after == "blank"), effect
        if _is_name(character):
            if isinstance(state, Dollars) and not character.isdigit():
                text = character if state.count in names and character in names[state.count].reach else None
                # An unknown name is an ordinary word, unless the pattern may turn out to be nothing else.
                return (Name(state.count, text, state.whole) if text or state.whole else "word"), NO_EFFECT
            if isinstance(state, Name):
                longer = None if state.text is None else state.text + character
                text = longer if state.sigil in names and longer in names[state.sigil].reach else None
                return (Name(state.sigil, text, state.whole) if text or state.whole else "word"), NO_EFFECT
        if _is_word(character):  # ends a name without binding it: `$Abc` is no metavariable
            progress = state if isinstance(state, str) and state.startswith("<") else ""
            after = tag_progress(progress, character)
            return None if after is None else (after or "word", NO_EFFECT)
        after, effect = ended(state)
        if is_space(character) and after in ("blank", "bare"):
            return after, effect
        progress = tag_progress(after if after.startswith("<") else "", character)
        return None if progress is None else (progress, effect._replace(opens=opens))

    def close(state):
        after, effect = ended(state)
        return None if after in ("blank", "bare") else effect

    return StringMachine(start="blank", step=step, close=close, escape=lambda state: _before_escape(*ended(state)))


def _ends_in_letter(progress: Hashable) -> bool:
    return isinstance(progress, str) and progress.startswith("<") and progress != "<"


def _before_escape(state: Hashable, effect: Effect) -> tuple[Hashable, Effect]:
    """Escaped characters are neither letters nor part of a tag, so only "blank" and "bare" matter after one."""
    return (state if state in ("blank", "bare") else ""), effect


def replacement_string(names: dict[int, Names]) -> StringMachine:
    """A replacement: after a run of `$`, a capital or `_` must begin a name that the pattern binds.

    Unlike in a pattern the longest `[A-Z0-9_]*` is the name, whatever stands before the `$` or after the name.
    An escape may stand wherever the closing quote could, and ends a name like it does; after an unfinished name it
    leads to a state that reads nothing. States: a tag's progress, `Dollars` (4 stands for more), `Name`, "stuck".
    """

    def step(state, character):
        if state == "stuck":
            return None
        if isinstance(state, Dollars):
            if character == "$":
                return Dollars(min(state.count + 1, 4), False), NO_EFFECT
            if _is_name(character) and not character.isdigit():
                return into(state.count, character)
        if isinstance(state, Name) and _is_name(character):
            return into(state.sigil, state.text + character)
        effect = close(state)
        if effect is None:
            return None
        if character == "$":
            return Dollars(1, False), effect
        progress = tag_progress(state if isinstance(state, str) else "", character)
        return None if progress is None else (progress, effect)

    def into(sigil, text):
        known = names[sigil].reach.get(text, 0) if sigil in names else 0
        return (Name(sigil, text, False), Effect(needs=known)) if known else None

    def close(state):
        if state == "stuck":
            return None
        if not isinstance(state, Name):
            return NO_EFFECT
        bit = names[state.sigil].bit.get(state.text, 0)
        return Effect(needs=bit) if bit else None

    def escape(state):
        effect = close(state)
        return ("stuck", NO_EFFECT) if effect is None else ("", effect)

    def expects(state):
        return names[state.sigil].reach[state.text] if isinstance(state, Name) else 0

    return StringMachine(start="", step=step, close=close, escape=escape, expects=expects)


# Canonical JSON writes these and no others, save for further control characters.
ESCAPES = {'"': '"', "\\": "\\", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
