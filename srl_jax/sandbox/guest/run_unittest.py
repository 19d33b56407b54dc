"""The child of run_tests.py for unittest: load the named test files, report each test over descriptor 3.

stdin: the nonce and the test files relative to /repo, NUL between them
Everything the reporter needs is bound before the repository's first line runs, so that patching builtins, json or os
afterwards changes nothing here.
"""

import json
import os
import sys
import traceback
import unittest

RESULT_FD = 3


def reporter(nonce, write=os.write, encode=json.dumps):
    def report(**record):
        write(RESULT_FD, (encode({"nonce": nonce, **record}) + "\n").encode())

    return report


def result_class(report):
    class Result(unittest.TextTestResult):
        def addSuccess(self, test):
            super().addSuccess(test)
            report(id=test.id(), outcome="passed")

        def addFailure(self, test, err):
            super().addFailure(test, err)
            report(id=test.id(), outcome="failed")

        def addError(self, test, err):
            super().addError(test, err)
            report(id=test.id(), outcome="failed")

        def addSubTest(self, test, subtest, err):
            super().addSubTest(test, subtest, err)
            if err is not None:
                report(id=test.id(), outcome="failed")

        def addSkip(self, test, reason):
            super().addSkip(test, reason)
            report(id=test.id(), outcome="skipped")

        def addExpectedFailure(self, test, err):
            super().addExpectedFailure(test, err)
            report(id=test.id(), outcome="skipped")

        def addUnexpectedSuccess(self, test):
            super().addUnexpectedSuccess(test)
            report(id=test.id(), outcome="failed")

    return Result


def main(leave=os._exit):
    nonce, *files = sys.stdin.read().split("\0")
    report = reporter(nonce)
    runner = unittest.TextTestRunner(stream=sys.stderr, resultclass=result_class(report), warnings="ignore")
    loader = unittest.TestLoader()
    sys.argv = ["unittest"]
    sys.path.insert(0, "/repo")
    suite = unittest.TestSuite()
    for file in files:
        name = file.removesuffix(".py").replace("/", ".")
        try:
            suite.addTest(loader.loadTestsFromName(name))
        except Exception:  # whatever importing foreign code raises: the file has no tests, and the others still run
            traceback.print_exc()
            report(id=name, outcome="failed")
    outcome = runner.run(suite)
    for stream in (sys.__stdout__, sys.__stderr__):
        stream.flush()
    report(end=True)
    leave(0 if outcome.wasSuccessful() else 1)  # without the exit handlers that the repository may have left


main()
