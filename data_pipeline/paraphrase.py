"""Rationales in other words: an option against a student that copies one teacher's phrases.

Only the rationale changes; action and state stay to the letter. A paraphrase that drops a name of the code, or that is
no rationale at all, is not used, and the teacher's own words stand: nothing is patched.
"""

import hashlib
import re
from dataclasses import replace

from data_pipeline.endpoint import EndpointTeacher
from data_pipeline.tasks.rule import Draft
from data_pipeline.teacher import Answer, NoAnswer, Teacher
from srl_jax.trace import TAGS, Trace, TraceError, parse_trace, render_trace

VERSION = "srl-paraphrase/1"
_SYSTEM = (
    "Say a rationale for a code edit in other words. Keep its meaning, every name of the code exactly as it is "
    "written, and about its length. Answer with <think>the new words</think> and nothing else."
)
# What is code in a sentence: names with an underscore, a dot, a digit, a dollar or a capital inside, and calls.
_NAME = re.compile(r"[$A-Za-z_][\w$]*(?:\.[\w$]+)*\(?")
_CODE = re.compile(r"[_.$\d(]|[a-z][A-Z]")


class ParaphrasingTeacher:
    """`inner`'s answers, of which a `share`, drawn by the task, has its rationale rewritten by `writer`."""

    def __init__(self, inner: Teacher, writer: EndpointTeacher, share: float) -> None:
        self._inner, self._writer, self._share = inner, writer, share
        parts = f"{VERSION}\n{inner.version}\n{writer.version}\n{share}\n{_SYSTEM}"
        self.version = hashlib.sha256(parts.encode()).hexdigest()
        self.name = f"{inner.name}~{writer.name}"
        self.concurrency = writer.concurrency
        self.pinned = {**inner.pinned, "paraphrase": {"by": dict(writer.pinned), "share": share, "version": VERSION}}

    def request(self, draft: Draft) -> str:
        return self._inner.request(draft)

    def answer(self, draft: Draft) -> Answer:
        first = replace(self._inner.answer(draft), teacher=self.name)
        drawn = int.from_bytes(hashlib.sha256(f"{VERSION}/{draft.task.task_id}".encode()).digest()[:8], "big")
        if drawn >= self._share * 2**64:
            return first
        try:
            trace = parse_trace(first.text)
        except TraceError:
            return first
        asked = f"{TAGS[0]}{trace.think}{TAGS[1]}"
        try:
            said = self._writer.ask(
                [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": asked}], TAGS[:2]
            )
        except NoAnswer as failure:  # paid for, but the answer itself stands
            wasted = first.wasted_tokens + failure.wasted_tokens
            return replace(first, wasted_tokens=wasted, cost_usd=first.cost_usd + failure.cost_usd)
        spent = replace(
            first,
            prompt_tokens=first.prompt_tokens + said.prompt_tokens,
            completion_tokens=first.completion_tokens + said.completion_tokens,
            wasted_tokens=first.wasted_tokens + said.wasted_tokens,
            cost_usd=first.cost_usd + said.cost_usd,
        )
        think = "" if said.cut else said.text.strip().removeprefix(TAGS[0]).removesuffix(TAGS[1]).strip()
        if not says(think, trace):
            return spent
        return replace(spent, text=render_trace(Trace(think, trace.action, trace.state)), original=first.text)


def says(think: str, trace: Trace) -> bool:
    """Whether `think` may stand for the rationale of `trace`: not empty, no copy, every name of the code in it."""
    names = {name for name in _NAME.findall(trace.think) if _CODE.search(name)}
    changed = " ".join(think.split()) != " ".join(trace.think.split())
    return bool(think) and changed and all(name in think for name in names)
