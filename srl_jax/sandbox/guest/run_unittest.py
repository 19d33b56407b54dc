"""The child of run_tests.py for unittest: load the named test files, report each test over descriptor 3.

stdin: the nonce and the test files relative to /repo, NUL between them
Everything the reporter needs is bound before the repository's first line runs, so that patching builtins or os
afterwards changes nothing here.
"""

# What a run imports it pays for: json takes 10 ms on top of the interpreter's 7, its C part nothing.

import os
import sys
import traceback
import unittest
from _json import encode_basestring_ascii

RESULT_FD = 3


def reporter(nonce, write=os.write, quoted=encode_basestring_ascii):
    begin = f'{{"nonce": {quoted(nonce)}, '.encode()

    def report(id, outcome):
        write(RESULT_FD, begin + f'"id": {quoted(id)}, "outcome": {quoted(outcome)}}}\n'.encode())

    def end():
        write(RESULT_FD, begin + b'"end": true}\n')

    return report, end


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
    report, end = reporter(nonce)
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
    end()
    leave(0 if outcome.wasSuccessful() else 1)  # without the exit handlers that the repository may have left


main()
