"""What a rewrite rule is, and the small template language rules are written in.

Two notations keep the catalogue readable:

* ``«name»`` stands for a value drawn from the vocabulary (`vocabulary.draw`). Guillemets occur in no
  pattern, so ast-grep metavariables (``$X``) and braces need no escaping.
* A scene's source is written once, as a diff body: the first column of every line is a space (unchanged), ``-``
  (only before the rewrite) or ``+`` (only after). The file before *and* the file expected after come from that one
  text without running ast-grep, so executing the rule in the sandbox really tests it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from srl_jax.records import Task

PLACEHOLDER = re.compile("«([a-zA-Z0-9_]*)»")


def fill(template: str, names: Mapping[str, str]) -> str:
    """`template` with each ``«name»`` replaced; ``«»`` is the empty string. KeyError on an unknown name."""
    return PLACEHOLDER.sub(lambda match: names[match[1]] if match[1] else "", template)


def before_and_after(source: str) -> tuple[str, str]:
    """Splits a scene's diff body into (text before, text after). ValueError on a line without a marker."""
    before, after = [], []
    for line in source.strip("\n").split("\n"):
        marker, text = line[:1] or " ", line[1:]
        if marker not in " -+":
            raise ValueError(f"scene line must start with ' ', '-' or '+': {line!r}")
        if marker in " -":
            before.append(text)
        if marker in " +":
            after.append(text)
    return "\n".join(before) + "\n", "\n".join(after) + "\n"


@dataclass(frozen=True)
class Scene:
    """One small repository around a rule. Keys of `sources` and `tests` are path templates.

    The first source is the one to rewrite and the one the prompt shows. `tests` fail before the rewrite, pass
    after it, and fail after `overbroad`, a (pattern, replacement) that takes the neighbouring call along
    ("" when the rule has no plausible wider pattern). Without `tests` only the expected files decide: what
    differs in types alone cannot be executed. `stands_before` is False where the sources do not compile before the
    rewrite, which in a compiled language breaks every test of the repository.
    """

    sources: Mapping[str, str]
    tests: Mapping[str, str]
    overbroad: tuple[str, str] | tuple[()] = ()
    stands_before: bool = True


@dataclass(frozen=True)
class Rule:
    """A kind of rewrite: its action, its words and its scenes. All strings are templates.

    `kind` groups rules that ask for the same sort of edit; splits hold out some rules of a kind and train on others.
    `keep` is the constraint the rule adds to the state: what must stay as it is.
    `real` is a regular expression a real source file must match before the rule is tried on it; its named
    groups override the vocabulary. "" keeps the rule off real code (unsafe there, or tied to a scene).
    """

    name: str
    language: str
    kind: str
    pattern: str
    replacement: str
    instructions: tuple[str, ...]
    think: tuple[str, ...]
    decision: str
    keep: str
    scenes: tuple[Scene, ...]
    constraints: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    difficulty: int = 1
    real: str = ""


@dataclass(frozen=True)
class Draft:
    """A task together with what only its author knows: the rule, its names, and the words for the trace.

    A user's task has no rule: its author is not the catalogue.
    """

    task: Task
    rule: Rule | None
    names: Mapping[str, str]
    think: str
    keep: str
