"""The words generated repositories are made of. A seed draws one consistent set of names per task."""

import random
from collections.abc import Sequence

NOUNS = (
    "order", "user", "invoice", "ticket", "room", "parcel", "recipe", "song", "player", "course", "coupon",
    "device", "flight", "garden", "hotel", "image", "letter", "market", "meal", "member", "message", "movie",
    "page", "patient", "payment", "photo", "plan", "planet", "post", "price", "product", "profile", "project",
    "receipt", "record", "review", "route", "seat", "sensor", "shop", "signal", "student", "survey", "task", "team",
    "token", "trip", "vendor", "video", "wallet", "zone", "account", "badge", "banner", "basket", "batch", "book",
    "branch", "bucket", "camera", "card", "cargo", "chart",
)  # fmt: skip
VERBS = (
    "load", "fetch", "find", "read", "send", "save", "build", "parse", "count", "check", "make", "pick", "get",
    "store", "open", "sync", "draw", "list", "scan", "move",
)  # fmt: skip
MODULES = (
    "app", "service", "report", "jobs", "views", "main", "worker", "checkout", "billing", "portal", "console",
    "intake",
)  # fmt: skip
LIBRARIES = (
    "db", "api", "client", "repo", "backend", "gateway", "registry", "catalog", "ledger", "archive", "depot",
)  # fmt: skip
OTHERS = (
    "cache", "index", "audit", "mirror", "mailer", "shadow", "relay", "broker",
)  # fmt: skip
FIELDS = (
    "name", "title", "size", "total", "status", "color", "weight", "level", "owner", "label", "amount", "city",
    "score", "rank", "email", "phase",
)  # fmt: skip
KEYWORDS = (
    "limit", "depth", "width", "timeout", "retries", "count", "offset", "page", "speed", "rate",
)  # fmt: skip
WORDS = (
    "blue", "red", "north", "south", "alpha", "delta", "gold", "silver", "small", "large", "fast", "slow", "open",
    "closed", "draft", "final",
)  # fmt: skip


def _distinct(rng: random.Random, pool: Sequence[str], prefix: str, count: int) -> dict[str, str]:
    drawn = rng.sample(pool, count)
    return {prefix + ("" if i == 0 else str(i + 1)): word for i, word in enumerate(drawn)}


def draw(rng: random.Random) -> dict[str, str]:
    """One set of names; numbers are distinct positive integers as text.

    ``Noun``, ``Mod`` and the like are words capitalised, ``NOUN`` and ``WORD`` in capitals; ``mod``, ``lib`` and
    ``other`` are module names that shadow nothing in the standard library; ``n``..``n3`` are numbers of two digits.
    """
    names = {
        **_distinct(rng, NOUNS, "noun", 2),
        **_distinct(rng, VERBS, "verb", 3),
        **_distinct(rng, MODULES, "mod", 2),
        **_distinct(rng, LIBRARIES, "lib", 2),
        **_distinct(rng, OTHERS, "other", 2),
        **_distinct(rng, FIELDS, "field", 2),
        **_distinct(rng, KEYWORDS, "kw", 2),
        **_distinct(rng, WORDS, "word", 2),
        **_distinct(rng, [str(number) for number in range(11, 100)], "n", 3),
    }
    for key in ("noun", "noun2", "verb", "verb2", "mod", "lib", "other"):
        names[key.capitalize()] = names[key].capitalize()
    for key in ("noun", "word"):
        names[key.upper()] = names[key].upper()
    return names
