"""The Java runner: what passes, what does not, and that Java code is held like any other."""

from __future__ import annotations

import os
import shutil
import subprocess
import textwrap

import pytest

from srl_jax.records import TestSpec
from srl_jax.sandbox import Limits, Sandbox, SandboxConfig, Status, toolchain
from srl_jax.trace import Action
from tests.sandbox_isolation_test import let_others_in

pytestmark = pytest.mark.skipif(shutil.which("javac") is None, reason="there is no JDK: Java tests are left out")

SHOP = """\
package app;

public class Shop {
    public static int total(int... prices) {
        return add(prices);
    }
    static int add(int... prices) {
        return 0;
    }
    static int sum(int... prices) {
        return java.util.Arrays.stream(prices).sum();
    }
}
"""
SHOP_TEST = """\
package tests;

import app.Shop;

public class ShopTest {
    private int state = 0;
    public void testTotal() { assert Shop.total(1, 2) == 3; }
    public void testState() { state++; if (state != 1) throw new IllegalStateException("shared"); }
    public void testAgain() { testState(); }
    public void helper() { throw new IllegalStateException("not a test"); }
    public void testArgument(int x) { throw new IllegalStateException("not a test"); }
    public static void main(String[] arguments) {
        System.out.println("standard output is not the results: {\\"end\\": true}");
        if (arguments.length != 0) throw new AssertionError();
    }
}
"""
FILES = {"app/Shop.java": SHOP, "tests/ShopTest.java": SHOP_TEST}
IDS = tuple(f"tests/ShopTest.java::{name}" for name in ("main", "testAgain", "testState", "testTotal"))
SPEC = TestSpec("java", IDS, ("tests/ShopTest.java",))
RIGHT = Action("java", "return add($$$A);", "return sum($$$A);", ("app/*.java",))


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(SandboxConfig(slots=2, test_limits=Limits(wall_s=60.0, cpu_s=20))) as opened:
        yield opened


def run(sandbox, *members, name="AttackTest", **more):
    body = textwrap.indent("\n".join(members), "    ")
    files = {f"{name}.java": f"import java.io.*;\nimport java.net.*;\nimport java.nio.file.*;\npublic class {name} {{\n"
             f"{body}\n}}\n", **more}  # fmt: skip
    return sandbox.run_tests(files, TestSpec("java", (), (f"{name}.java",)))


def test_an_edit_makes_the_tests_pass(sandbox):
    report = sandbox.execute(RIGHT, FILES, tests=SPEC, expected={"app/Shop.java": SHOP.replace("n add", "n sum")})
    assert report.success, report
    assert report.tests_passed == IDS


def test_before_the_edit_one_fails_and_says_why(sandbox):
    outcome = sandbox.run_tests(FILES, SPEC)
    assert outcome.failed == ("tests/ShopTest.java::testTotal",)
    assert outcome.ended == "finished"
    assert "AssertionError" in outcome.output


def test_a_repository_that_does_not_compile_fails_whole(sandbox):
    outcome = sandbox.run_tests({**FILES, "app/Other.java": 'class Other { int x = "text"; }\n'}, SPEC)
    assert (outcome.ended, outcome.passed, outcome.failed) == ("finished", (), ("tests/ShopTest.java",))
    assert "incompatible types" in outcome.output


@pytest.mark.parametrize(
    "member",
    [
        "static { System.exit(0); } public void testX() {}",
        "public void testX() { Runtime.getRuntime().halt(0); }",
        'public void testX() { System.out.println("{\\"id\\": \\"x\\", \\"end\\": true}"); System.exit(0); }',
    ],
    ids=["exit at load", "halt", "forged end"],
)
def test_leaving_early_passes_nothing(sandbox, member):
    outcome = run(sandbox, member)
    assert (outcome.ended, outcome.passed) == ("cut", ())


def held(name, body):
    """A test that passes when `body` throws, and fails with ESCAPED when it comes to its end."""
    return (
        f"public void test{name}() throws Throwable {{\n    try {{ {body} }}\n"
        f'    catch (Exception | Error held) {{ return; }}\n    throw new AssertionError("ESCAPED");\n}}'
    )


ATTACKS = {
    "ReadShadow": 'Files.readString(Path.of("/etc/shadow"));',
    "WriteRoot": 'Files.writeString(Path.of("/escaped"), "x");',
    "WriteRepository": 'Files.writeString(Path.of("/repo/AttackTest.java"), "x");',
    "DeleteRepository": 'Files.delete(Path.of("/repo/AttackTest.java"));',
    "WriteGuest": 'Files.writeString(Path.of("/guest/RunJava.java"), "x");',
    "WriteSettings": 'Files.writeString(Path.of(System.getProperty("java.home") + "/conf/x"), "x");',
    "Connect": 'new Socket("127.0.0.1", 80);',
    "Listen": "new ServerSocket(0);",
    "Resolve": 'InetAddress.getByName("example.com");',
    "Secret": 'if (System.getenv("SRL_SECRET") == null) throw new IOException();',
    "SupervisorMemory": 'new RandomAccessFile("/proc/" + ProcessHandle.current().parent().get().pid() + "/mem", "rw");',
    "Root": 'if (new ProcessBuilder("su", "-c", "id").start().waitFor() != 0) throw new IOException();',
    "Namespace": 'if (new ProcessBuilder("unshare", "-Ur", "true").start().waitFor() != 0) throw new IOException();',
    "FillDisk": 'var f = new FileOutputStream("/tmp/x"); for (int i = 0; i < 200; i++) f.write(new byte[1 << 20]);',
    "FillHeap": "var all = new java.util.ArrayList<byte[]>(); while (all.size() < 100) all.add(new byte[64 << 20]);",
    "Recursion": "recurse();",
}


def test_java_is_held_too(sandbox, monkeypatch):
    monkeypatch.setenv("SRL_SECRET", "hunter2")
    recurse = "static void recurse() { recurse(); }"
    outcome = run(sandbox, recurse, *(held(name, body) for name, body in ATTACKS.items()))
    assert outcome.ended == "finished", outcome
    assert "ESCAPED" not in outcome.output
    assert set(outcome.passed) == {f"AttackTest.java::test{name}" for name in ATTACKS}, outcome


def test_an_attack_that_gets_through_would_be_seen(sandbox):
    outcome = run(sandbox, held("Allowed", 'Files.writeString(Path.of("/tmp/mine"), "x");'))
    assert outcome.failed == ("AttackTest.java::testAllowed",)
    assert "ESCAPED" in outcome.output


def test_what_never_ends_is_stopped():
    with Sandbox(SandboxConfig(test_limits=Limits(wall_s=8.0, cpu_s=3))) as hasty:
        outcome = run(hasty, "public void testX() { while (true); }")
    assert outcome.ended in ("timeout", "cut")
    assert outcome.passed == ()


def test_the_tests_are_protected(sandbox):
    action = Action("java", "assert $A == $B;", ";", ("tests/*.java",))
    assert sandbox.execute(action, FILES, tests=SPEC).status is Status.PATH_DENIED


class TestStagedRunner:
    def test_the_machine_accepts_the_archive_and_does_without_it(self, tmp_path):
        found = toolchain.find_toolchain()
        archived = [option for option in found.java_runner if option.startswith("-XX:SharedArchiveFile=")]
        (tmp_path / "T.java").write_text("public class T { public void testIt() {} }")
        for options in (["-Xshare:on", *found.java_runner], [o for o in found.java_runner if o not in archived]):
            command = [found.java, *toolchain.JAVA_OPTIONS, *options[:-1], f"-Drepository={tmp_path}"]
            command += [f"-Djava.io.tmpdir={tmp_path}", options[-1]]
            done = subprocess.run(command, input="n\0T.java", capture_output=True, text=True, timeout=60, check=True)
            assert '"id": "T.java::testIt", "outcome": "passed"' in done.stdout, done.stderr
        assert archived

    def test_a_jdk_that_cannot_compile_the_runner_is_none(self, tmp_path, monkeypatch):
        monkeypatch.setenv(toolchain.CACHE_VARIABLE, str(tmp_path / "cache"))
        (tmp_path / "bin").mkdir()
        for name, code in (("java", 0), ("javac", 1)):
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\nexit {code}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        let_others_in(tmp_path, 0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        with Sandbox() as without:
            assert "java" not in without.runners
