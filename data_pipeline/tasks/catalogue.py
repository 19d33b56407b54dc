"""The catalogue: every rewrite rule the project knows, by language and theme."""

from data_pipeline.tasks import (
    javascript_calls,
    javascript_cleanup,
    javascript_guards,
    javascript_idioms,
    python_assertions,
    python_calls,
    python_cleanup,
    python_guards,
    python_idioms,
    python_types,
)
from data_pipeline.tasks.rule import Rule

CATALOGUE: tuple[Rule, ...] = (
    *python_calls.RULES,
    *python_idioms.RULES,
    *python_guards.RULES,
    *python_types.RULES,
    *python_cleanup.RULES,
    *python_assertions.RULES,
    *javascript_calls.RULES,
    *javascript_idioms.RULES,
    *javascript_guards.RULES,
    *javascript_cleanup.RULES,
)


def rule_named(name: str) -> Rule:
    """The rule called `name`. KeyError when the catalogue has none."""
    return {rule.name: rule for rule in CATALOGUE}[name]
