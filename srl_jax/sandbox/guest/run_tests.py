"""Run a test program over /repo and report which test ids passed: runs inside the sandbox.

job: {"runner", "files", "wall_s", "cpu_s", "nonce", "programs"}
programs: {"python", "node", "java", "java_runner": arguments that make java run RunJava}
answer: {"ended": "exit"|"timeout"|"output_limit", "exit_code", "finished": whether the runner reached its end,
         "passed": [ids], "failed": [ids], "skipped": [ids], "output": the last of stdout and stderr}

The tests run in a child process, since the code under test is hostile: its outputs are drained, and bounded; its
results come over a pipe of their own.  This process is the namespace's init, which nothing inside can kill or stop, and
makes itself undumpable, so that the child, though of the same uid, cannot reach its memory or descriptors through
/proc.  A record counts when it carries the run's nonce.
"""

# What a run imports it pays for: json 10 ms on top of the interpreter's 7, selectors and signal 4 each.

import _signal
import ctypes
import os
import resource
import select
import sys
import time

PR_SET_DUMPABLE = 4
TAIL, RESULTS_CAP = 4000, 4 << 20
MOST_OUTPUT = 256 << 20  # reading on would cost as much processor time as the child has for writing
RESULT_FD = 3
# What the virtual machine reserves must fit under the limit on address space; the file of performance data, which
# it would map from /tmp, is for tools that are not here.
JAVA_OPTIONS = (
    "-Xmx512m", "-Xss2m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:ReservedCodeCacheSize=64m",
    "-XX:CompressedClassSpaceSize=128m", "-XX:-UsePerfData", "-Xshare:auto", "-ea", "--add-modules=jdk.compiler",
)  # fmt: skip


def command(job):
    """The child's program, arguments and which descriptor carries its records."""
    if job["runner"] == "java":
        return [job["programs"]["java"], *JAVA_OPTIONS, *job["programs"]["java_runner"]], 1
    if job["runner"] != "node":
        python = job["programs"]["python"]
        return [python, "-I", "-S", "-B", f"/guest/run_{job['runner']}.py"], RESULT_FD
    reporter = ["--test-reporter=/guest/node_reporter.mjs", "--test-reporter-destination=stdout"]
    return [job["programs"]["node"], "--test", *reporter, *job["files"]], 1


def instructions(job):
    """What the child reads on stdin: the nonce and the files, NUL between them, which paths do not hold."""
    return "\0".join([job["nonce"], *job["files"]]).encode()


def start(job):
    """Start the child, with a bound on its processor time; returns (pid, results, output, stdin), our ends of pipes."""
    arguments, result_fd = command(job)
    results_in, results_out = os.pipe()
    output_in, output_out = os.pipe()
    stdin_in, stdin_out = os.pipe()
    redirect = {0: stdin_in, 1: output_out, 2: output_out, result_fd: results_out}
    # Pipe ends are close-on-exec; dup2's are not.  Lift the sources out of the way of the targets first.
    lifted = {target: os.dup(source) for target, source in redirect.items()}
    pid = os.fork()
    if pid == 0:
        try:
            for target, source in lifted.items():
                os.dup2(source, target)
            resource.setrlimit(resource.RLIMIT_CPU, (job["cpu_s"], job["cpu_s"] + 1))
            os.execve(arguments[0], arguments, dict(os.environ))
        finally:
            os._exit(127)
    for fd in (results_out, output_out, stdin_in, *lifted.values()):
        os.close(fd)
    return pid, results_in, output_in, stdin_out


def reap(pid):
    """Collect every process that has ended (orphans are init's, ours); the exit code of `pid` if it is among them."""
    code = None
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == pid:
                code = os.waitstatus_to_exitcode(ended[1])
    except ChildProcessError:
        pass  # no child is left
    return code


def collect(pid, results, output, deadline):
    """Drain both pipes until the child is gone; returns (ended, exit code, records, tail of the output)."""
    collected, tail, read = bytearray(), bytearray(), 0
    ended, code, grace = "exit", None, None
    poll, still = select.poll(), {results, output}
    for fd in still:
        os.set_blocking(fd, False)
        poll.register(fd, select.POLLIN)
    while still:
        for fd, _ in poll.poll(10):
            chunk = os.read(fd, 1 << 16)
            read += len(chunk)
            if not chunk:
                poll.unregister(fd)
                still.remove(fd)
            elif fd == results:
                collected += chunk[: RESULTS_CAP - len(collected)]
            else:
                tail = (tail + chunk[-TAIL:])[-TAIL:]
        now = time.monotonic()
        if code is None:
            code = reap(pid)
            if code is not None:
                grace = now + 0.25
            elif now > deadline or read > MOST_OUTPUT:
                ended = "timeout" if now > deadline else "output_limit"
                os.kill(pid, _signal.SIGKILL)
                os.waitpid(pid, 0)
                code, grace = -_signal.SIGKILL, now
        elif now > grace:
            break  # a descendant of the child still holds a pipe; it dies with the namespace
    if code is None:
        # Both pipes were closed by a child that is still running.
        while (code := reap(pid)) is None:
            if time.monotonic() > deadline:
                os.kill(pid, _signal.SIGKILL)
                ended = "timeout"
            time.sleep(0.005)
    return ended, code, bytes(collected), bytes(tail)


def outcomes(records, nonce, loads):
    """Ids by outcome (an id passed when every record of it says so), and whether the end record came last."""
    seen, finished = {}, False
    for line in records.splitlines():
        try:
            record = loads(line.decode())
            if record["nonce"] != nonce:
                continue
            if record.get("end"):
                finished = True
            else:
                seen.setdefault(str(record["id"]), set()).add(str(record["outcome"]))
        except (ValueError, KeyError, TypeError):
            continue  # not a record of the runner
    passed = sorted(name for name, outcome in seen.items() if outcome == {"passed"})
    skipped = sorted(name for name, outcome in seen.items() if outcome == {"skipped"})
    failed = sorted(set(seen) - set(passed) - set(skipped))
    return passed, failed, skipped, finished


def main(job, loads):
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    os.chdir("/repo")
    deadline = time.monotonic() + job["wall_s"]
    os.environ["SRL_NONCE"] = job["nonce"] if job["runner"] == "node" else ""
    pid, results, output, stdin = start(job)
    try:
        os.write(stdin, instructions(job))
    except BrokenPipeError:
        print("the test program did not start", file=sys.stderr)
    os.close(stdin)
    ended, code, records, tail = collect(pid, results, output, deadline)
    passed, failed, skipped, finished = outcomes(records, job["nonce"], loads)
    return {
        "ended": ended,
        "exit_code": code,
        "finished": finished and ended == "exit",
        "passed": passed,
        "failed": failed,
        "skipped": skipped,
        "output": tail.decode("utf-8", "replace"),
    }
