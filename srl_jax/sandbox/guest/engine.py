"""Apply one ast-grep rule to texts: runs inside the sandbox; `apply_edits` is also the host's.

job: {"program", "rule": inline rules, "extension", "texts": {path: text}, "python": whether Python's
      own parser should be asked too, "max_matches", "wall_s", "cpu_s"}
answer: {"status", "detail", "edits": {path: [[start, end, replacement], ...] in byte offsets}, "matches": {path: n},
         "overlaps": n, "broken": [paths that parse worse after the edit]}

One ast-grep process reads all the files, which lie in a fresh folder under names of our own: the repository's
names, ignore files, hidden folders and sgconfig.yml have no say.
"""

# What a run imports it pays for: pathlib 5 ms, ast and signal, which build enumerations, 4 ms.
# ruff: noqa: PTH102, PTH123

import _ast
import _signal
import os
import resource
import time

IN, AFTER, OUT, ERR = "/tmp/in", "/tmp/after", "/tmp/out.jsonl", "/tmp/err.txt"
REJECTED = 8  # ast-grep's exit code for a rule it refuses


def select_edits(found):
    """Drop edits that overlap an earlier or wider one; returns (kept in order, number dropped).

    `found` holds (start, end, replacement).  ast-grep's own --update-all resolves nested matches the same way:
    the outermost is rewritten, what lies inside it is left to a second pass.
    """
    kept, dropped, reached = [], 0, 0
    previous = None
    for start, end, replacement in sorted(found, key=lambda edit: (edit[0], -edit[1])):
        if start < reached or (start, end) == previous:
            dropped += 1
            continue
        kept.append((start, end, replacement))
        reached, previous = end, (start, end)
    return kept, dropped


def apply_edits(text, edits):
    """`text` with ordered, disjoint byte-offset edits applied; ValueError when they are not, or split a character."""
    source = text.encode("utf-8")
    parts, reached = [], 0
    for start, end, replacement in edits:
        if not reached <= start <= end <= len(source):
            raise ValueError(f"edit [{start}, {end}) is out of order or outside {len(source)} bytes")
        parts += [source[reached:start], replacement.encode("utf-8")]
        reached = end
    return b"".join([*parts, source[reached:]]).decode("utf-8")


class EngineStop(Exception):
    """The engine's answer is a status other than ok."""

    def __init__(self, status, detail=""):
        super().__init__(status)
        self.status, self.detail = status, detail


def scan(job, rule, folder, deadline, loads):
    """Run ast-grep over `folder`; yields its matches, read by `loads`."""
    arguments = [job["program"], "scan", "--inline-rules", rule, "--json=stream", "--no-ignore", "hidden", folder]
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, OUT, flags, 0o600),
        (os.POSIX_SPAWN_OPEN, 2, ERR, flags, 0o600),
    ]
    # A fixed pool size: by default ast-grep starts a thread per core, which a process limit may not allow.
    pid = os.posix_spawn(job["program"], [*arguments, "--threads", "2"], {"HOME": "/tmp"}, file_actions=actions)
    resource.prlimit(pid, resource.RLIMIT_CPU, (job["cpu_s"], job["cpu_s"] + 1))
    status = None
    while status is None:
        done, raw = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(raw)
        elif time.monotonic() > deadline:
            os.kill(pid, _signal.SIGKILL)
            os.waitpid(pid, 0)
            raise EngineStop("timeout", "ast-grep ran out of wall time")
        else:
            time.sleep(0.001)
    if status == REJECTED:
        with open(ERR, "rb") as said:
            raise EngineStop("engine_reject", said.read(2000).decode("utf-8", "replace"))
    if status == -_signal.SIGXCPU:
        raise EngineStop("timeout", "ast-grep ran out of CPU time")
    if status == -_signal.SIGXFSZ:
        raise EngineStop("too_many", "ast-grep's output is over the file-size limit")
    if status not in (0, 1):  # 1: matches of severity error, which our rules do not have
        with open(ERR, "rb") as said:
            raise EngineStop("crash", f"ast-grep ended with {status}: " + said.read(500).decode("utf-8", "replace"))
    with open(OUT, encoding="utf-8") as lines:
        for line in lines:
            yield loads(line)


def write_all(folder, texts, extension):
    """Write the texts as 0.py, 1.py, ...; returns {file name: path}."""
    os.mkdir(folder)
    names = {}
    for i, (path, text) in enumerate(texts.items()):
        name = f"{folder}/{i}.{extension}"
        names[name] = path
        with open(name, "w", encoding="utf-8", newline="") as file:
            file.write(text)
    return names


def python_parses(text):
    try:
        compile(text, "<text>", "exec", _ast.PyCF_ONLY_AST, dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def run(job, loads):
    deadline = time.monotonic() + job["wall_s"]
    texts = job["texts"]
    names = write_all(IN, texts, job["extension"])
    found, broken_before = {path: [] for path in texts}, dict.fromkeys(texts, 0)
    total = 0
    for match in scan(job, job["rule"], IN, deadline, loads):
        path = names[match["file"]]
        if match["ruleId"] != "edit":
            broken_before[path] += 1
            continue
        total += 1
        if total > job["max_matches"]:
            raise EngineStop("too_many", f"more than {job['max_matches']} matches")
        at = match["replacementOffsets"]
        found[path].append((at["start"], at["end"], match["replacement"]))
    edits, dropped = {}, 0
    for path, matches in found.items():
        if matches:
            edits[path], overlaps = select_edits(matches)
            dropped += overlaps
    after = {path: apply_edits(texts[path], kept) for path, kept in edits.items()}
    after = {path: text for path, text in after.items() if text != texts[path]}
    broken = set()
    if after:
        names = write_all(AFTER, after, job["extension"])
        worse = dict.fromkeys(after, 0)
        for match in scan(job, job["broken_rule"], AFTER, deadline, loads):
            worse[names[match["file"]]] += 1
        broken = {path for path, count in worse.items() if count > broken_before[path]}
        if job["python"]:
            broken |= {p for p, text in after.items() if python_parses(texts[p]) and not python_parses(text)}
    return {
        "status": "ok",
        "detail": "",
        "edits": edits,
        "matches": {path: len(matches) for path, matches in found.items() if matches},
        "overlaps": dropped,
        "broken": sorted(broken),
    }


def main(job, loads):
    try:
        return run(job, loads)
    except EngineStop as stop:
        return {"status": stop.status, "detail": stop.detail}
