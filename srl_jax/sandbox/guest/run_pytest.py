"""The child of run_tests.py for pytest: run the named test files, report each test over descriptor 3.

stdin: the nonce and the test files relative to /repo, NUL between them
An id is pytest's node id.  A test passed when its call did and neither its set-up nor its teardown failed; skips,
expected failures and unexpected passes are no evidence and count as skipped.  Installed plugins are not loaded;
the repository's own conftest.py and settings are, since no action may edit them.
"""

import json
import os
import sys

RESULT_FD = 3


class Reporter:
    """Bound before the repository's first line runs, so that patching json or os afterwards changes nothing here."""

    def __init__(self, nonce, write=os.write, encode=json.dumps):
        def report(**record):
            write(RESULT_FD, (encode({"nonce": nonce, **record}) + "\n").encode())

        self.report = report

    def pytest_collectreport(self, report):
        if report.failed:
            self.report(id=report.nodeid, outcome="failed")

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.report(id=report.nodeid, outcome="failed")
        elif report.skipped or hasattr(report, "wasxfail"):
            self.report(id=report.nodeid, outcome="skipped")
        elif report.when == "call":
            self.report(id=report.nodeid, outcome="passed")


def main(leave=os._exit):
    nonce, *files = sys.stdin.read().split("\0")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.append("/guest/site")
    import pytest

    reporter = Reporter(nonce)
    sys.path.insert(0, "/repo")
    sys.argv = ["pytest"]
    options = ["-p", "no:cacheprovider", "--rootdir=/repo", "-q", "--color=no"]
    code = pytest.main([*options, "--", *files], plugins=[reporter])
    for stream in (sys.__stdout__, sys.__stderr__):
        stream.flush()
    reporter.report(end=True)
    leave(int(code))  # without the exit handlers that the repository may have left


main()
