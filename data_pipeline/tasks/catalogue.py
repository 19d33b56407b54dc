"""The catalogue: every rewrite rule the project knows, by language and theme."""

from data_pipeline.tasks import (
    java_calls,
    java_guards,
    java_idioms,
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
    typescript_calls,
    typescript_types,
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
    *typescript_types.RULES,
    *typescript_calls.RULES,
    *java_calls.RULES,
    *java_idioms.RULES,
    *java_guards.RULES,
)


def rule_named(name: str) -> Rule:
    """The rule called `name`. KeyError when the catalogue has none."""
    return {rule.name: rule for rule in CATALOGUE}[name]
