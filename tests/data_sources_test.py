"""Where tasks come from besides the catalogue: a user's own tasks, pinned packages; and what keeps splits apart."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import corpus
from data_pipeline.config import DataSetConfig
from data_pipeline.corpus import Package, packages, unpack
from data_pipeline.duplicates import NearDuplicates, jaccard, shingles
from data_pipeline.errors import DataError
from data_pipeline.journal import Journal
from data_pipeline.offers import quotas, real_candidates
from data_pipeline.splits import SPLITS, split_repositories, split_rules
from data_pipeline.syntax import parse_python
from data_pipeline.tasks.catalogue import CATALOGUE, rule_named
from data_pipeline.tasks.imported import read_user_tasks
from data_pipeline.tasks.real import RealFile
from srl_jax.trace import StateUpdate

# ------------------------------------------------------------------------------------------------- user's tasks

TESTS = {"runner": "unittest", "expected_ids": ["test_store.T.test_fetch"], "files": ["test_store.py"]}


@pytest.fixture
def shop(tmp_path):
    repository = tmp_path / "repos" / "shop"
    repository.mkdir(parents=True)
    (repository / "store.py").write_text("def load(key):\n    return key\n\n\ndef run():\n    return load(3)\n")
    (repository / "test_store.py").write_text("import store\n")
    (repository / "loop").symlink_to(repository)
    (repository / "latin.py").write_bytes(b"# caf\xe9\n")
    with (repository / "huge.py").open("wb") as file:
        file.truncate(50 << 20)

    def write(**changes):
        entry = {
            "instruction": "Rename `load` to `fetch` in store.py",
            "repository": "repos/shop",
            "language": "python",
            **changes,
        }
        text = json.dumps({name: value for name, value in entry.items() if value is not ...})
        (tmp_path / "tasks.jsonl").write_text(f"\n{text}\n")
        return tmp_path / "tasks.jsonl"

    return write


def test_a_users_task_is_read_with_its_repository(shop):
    state = {"decisions": ["a"], "constraints": [], "open_issues": ["b"], "next_focus": []}
    ((repository, draft),) = read_user_tasks(shop(tests=TESTS, prior_state=state), 60)
    task = draft.task
    assert repository == "repos/shop" and draft.rule is None and task.source == "user" and task.slice == "python/user"
    assert task.task_id == "user/000002", "the line's number"
    assert [file.path for file in task.files] == ["store.py", "test_store.py"], "no link, no Latin-1, no 50 MB"
    assert "def load(key):" in task.context[0].text and len(task.context[0].text) <= 60
    assert task.prior_state == StateUpdate(("a",), (), ("b",), ())
    assert task.tests.expected_ids == ("test_store.T.test_fetch",) and task.expected == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction": ...}, "2: instruction is missing"),
        ({"instruction": " "}, "2: instruction must be text"),
        ({"instruction": "Do the washing up"}, "2: instruction speaks of no python file"),
        ({"repository": "repos/none"}, "2: repository .*repos/none is not a directory"),
        ({"repository": "repos"}, None),
        ({"language": "cobol"}, "2: language is 'cobol'"),
        ({"lang": "python"}, "2: lang is no field"),
        ({"tests": {}}, "2: tests must be an object"),
        ({"tests": {**TESTS, "runner": "make"}}, "2: tests.runner is 'make'"),
        ({"tests": {**TESTS, "expected_ids": []}}, "2: tests.expected_ids must be a list"),
        ({"tests": {**TESTS, "files": ["../x.py"]}}, r"2: tests.files names '\.\./x\.py'"),
        ({"prior_state": {"decisions": []}}, "2: prior_state: "),
    ],
)
def test_a_wrong_task_is_named_by_line_and_field(shop, changes, message):
    if message is None:
        assert read_user_tasks(shop(**changes), 60)
        return
    with pytest.raises(DataError, match=f"tasks.jsonl:{message}"):
        read_user_tasks(shop(**changes), 60)


def test_lines_that_are_no_tasks(shop, tmp_path):
    path = shop()
    for data, message in (
        (b'{"instruction": "a", "instruction": "b"}', ":1: the line is not JSON: "),
        (b"[]", ":1: the line is not a JSON object"),
        (b"\xff", ":1: the line is not UTF-8"),
        (b"\n \n", "holds no task"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            read_user_tasks(path, 60)
    with pytest.raises(DataError, match="cannot be read"):
        read_user_tasks(tmp_path, 60)
    (tmp_path / "repos" / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file that can be read"):
        read_user_tasks(shop(repository="repos/empty"), 60)
    many = tmp_path / "repos" / "many"
    many.mkdir()
    for number in range(513):
        (many / f"f{number}.py").write_text("")
    with pytest.raises(DataError, match=r"a repository of 513 files; the sandbox takes at most 512; name a part of it"):
        read_user_tasks(shop(repository="repos/many"), 60)
    for number in range(5):
        (tmp_path / "repos" / "shop" / f"big{number}.txt").write_text("x" * (1 << 20))
    with pytest.raises(DataError, match=r"holds 524\d+ bytes of text, at most 4194304"):
        read_user_tasks(shop(), 60)


# ------------------------------------------------------------------------------------------------------- corpora


def test_the_default_corpus_is_pinned_for_every_language():
    listed = packages("default")
    assert {package.language for package in listed} == {"python", "javascript", "typescript", "java"}
    assert {package.registry for package in listed} == {"pypi", "npm", "debian"}
    assert all(package.licence in ("MIT", "BSD-3-Clause", "Apache-2.0") for package in listed)
    assert len({(package.language, package.repository) for package in listed}) == len(listed)
    with pytest.raises(DataError, match=r"corpus is .nobody.; .* knows default"):
        packages("nobody")


def archives(folder, members):
    """The same members as a wheel and as a tarball."""
    with zipfile.ZipFile(folder / "a.whl", "w") as wheel:
        for name, data in members.items():
            wheel.writestr(name, data)
    with tarfile.open(folder / "a.tar.gz", "w:gz") as bundle:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            bundle.addfile(entry, io.BytesIO(data))
        for name, kind in (
            ("pkg/link.py", tarfile.SYMTYPE),
            ("pkg/hard.py", tarfile.LNKTYPE),
            ("pkg/fifo.py", tarfile.FIFOTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            bundle.addfile(entry)
    return folder / "a.whl", folder / "a.tar.gz"


def test_only_plain_source_files_are_unpacked(tmp_path):
    members = {
        "pkg/a.py": b"x = 1\n",
        "pkg/deep/b.py": b"y = 2\n",
        "pkg/../../evil.py": b"",
        "/pkg/evil.py": b"",
        "pkg/.hidden/c.py": b"",
        "pkg/big.py": b"#" * 20_001,
        "pkg/readme.md": b"",
        "other/d.py": b"",
    }
    for number, archive in enumerate(archives(tmp_path, members)):
        target = tmp_path / f"out{number}"
        unpack(archive, target, "pkg/", (".py",))
        found = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}
        assert found == {"a.py": b"x = 1\n", "deep/b.py": b"y = 2\n"}
    assert not (tmp_path / "evil.py").exists()
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "a.tar.gz").read_bytes()[:60])
    (tmp_path / "cut.whl").write_bytes(b"PK")
    for name in ("cut.tar.gz", "cut.whl"):
        with pytest.raises(DataError, match=f"{name} cannot be unpacked"):
            unpack(tmp_path / name, tmp_path / f"{name}.d", "", (".py",))


def test_an_archive_of_another_hash_is_refused(tmp_path, monkeypatch):
    _, bundle = archives(tmp_path, {"pkg/a.py": b"x = 1\n"})
    served = tmp_path / "served"
    served.mkdir()
    served.joinpath("a.tar.gz").write_bytes(bundle.read_bytes())
    monkeypatch.setattr(corpus, "_DEBIAN", ("file:///nowhere/", f"file://{served}/"))
    monkeypatch.setenv("SRL_JAX_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(bundle.read_bytes()).hexdigest()
    package = Package("a", "python", "debian", "a", "1", "a.tar.gz", digest, "MIT", "pkg/")
    monkeypatch.setattr(corpus, "packages", lambda name: [package])
    (root,) = corpus.corpus_root("default", "python")
    assert (root / "a" / "a.py").read_text() == "x = 1\n" and corpus.corpus_root("default", "java") == []
    served.joinpath("a.tar.gz").unlink()
    assert corpus.corpus_root("default", "python") == [root], "fetched once"
    wrong = Package("a", "python", "debian", "a", "1", "a.tar.gz", "0" * 64, "MIT", "pkg/")
    monkeypatch.setattr(corpus, "packages", lambda name: [wrong])
    with pytest.raises(DataError, match="cannot be fetched from debian"):
        corpus.corpus_root("default", "python")
    served.joinpath("a.tar.gz").write_bytes(bundle.read_bytes())
    with pytest.raises(DataError, match="has SHA-256"):
        corpus.corpus_root("default", "python")
    assert not [path for path in root.parent.rglob("*") if "." in path.name and path.is_dir()], "nothing half done"


# -------------------------------------------------------------------------------------------------------- splits


@given(st.sets(st.text("abcdef", min_size=1, max_size=4), max_size=40), st.integers(0, 99))
def test_a_repository_is_in_one_split(repositories, seed):
    splits = split_repositories(repositories, seed)
    assert set(splits) == repositories and splits == split_repositories(sorted(repositories), seed)
    if len(repositories) >= 3:
        assert set(splits.values()) == set(SPLITS)
    else:
        assert set(splits.values()) <= {"train"}


def test_a_files_repository_decides_its_split():
    rule = rule_named("python-len-zero")
    files = [(RealFile(name, f"{name}/x.py", None), f"{name} = len(x) == 0\n") for name in ("a", "b", "c")]
    rules = {split: [rule] for split in SPLITS}
    found = real_candidates(rules, dict.fromkeys(SPLITS, 9), files, {"a": "train", "b": "dev", "c": "test"})
    assert {split: [path for _, path, _ in tasks] for split, tasks in found.items()} == {
        "train": ["a/x.py"], "dev": ["b/x.py"], "test": ["c/x.py"],
    }  # fmt: skip


def test_a_withheld_language_is_tested_only():
    splits = split_rules(CATALOGUE, 0, "java")
    assert {rule.language for rule in splits["train"] + splits["dev"]} == {"python", "javascript", "typescript"}
    assert sum(rule.language == "java" for rule in splits["test"]) == sum(r.language == "java" for r in CATALOGUE)
    wanted = quotas(DataSetConfig(languages=("python", "java"), withheld_language="java", train=10, dev=2, test=4))
    assert sum(count for (split, name), count in wanted.items() if split == "train" and name.startswith("python")) == 10
    assert {name for (split, name) in wanted if split == "train"} == {
        "python/generated",
        "python/real",
        "python/episodes",
    }
    assert sum(count for (split, name), count in wanted.items() if split == "test" and name.startswith("java")) == 2


# ------------------------------------------------------------------------------------------------ near-duplicates

CODE = "def load(key, limit):\n    row = db.get(key, limit)\n    audit.note(row, key)\n    return [row, limit, key]\n"


def test_near_duplicates_by_hand():
    assert shingles("a b  c\nd e") == shingles("a b c d e") and len(shingles("a b c d e")) == 2
    assert len(shingles("")) == 1 == len(shingles("a b"))
    # runs of four: abcd bcde | abcd bcdf: one of three in common
    assert jaccard(shingles("a b c d e"), shingles("a b c d f")) == pytest.approx(1 / 3)
    near = NearDuplicates()
    assert near.nearest(CODE) == 0.0
    near.add(CODE)
    assert near.nearest(CODE.replace("    ", "\t")) == 1.0, "white space does not count"
    other = CODE.replace("return [row, limit, key]", "return [row, limit, 7]")
    assert near.nearest(other) == jaccard(shingles(CODE), shingles(other)) > 0.8
    assert near.nearest("class Shop:\n    pass\n") == 0.0


def test_minhash_proposes_what_is_near():
    words = [f"w{number}" for number in range(120)]
    near = NearDuplicates()
    for start in range(200):
        near.add(" ".join(f"{word}x{start}" for word in words))
    changed = [" ".join(f"{word}x{start}" for word in (*words[:114], *"abcdef")) for start in range(200)]
    found = [near.nearest(text) for text in changed]
    assert sum(value > 0.85 for value in found) >= 198  # misses are one in 3000 at this index


# ------------------------------------------------------------------------------------------------------- journal


def test_an_answer_is_given_once(tmp_path):
    path = tmp_path / "deep" / "x.journal"
    asked = []
    with Journal(path) as journal:
        assert journal.ask(["a", 1], lambda: asked.append(1) or {"b": 2}) == {"b": 2}
        assert journal.ask(["a", 1], lambda: asked.append(2)) == {"b": 2} and asked == [1]
    with path.open("ab") as file:
        file.write(b'["cut", {"of')  # a kill in the middle of a line
    with Journal(path) as journal:
        assert len(journal) == 1 and journal.ask(["a", 1], lambda: asked.append(3)) == {"b": 2}
        assert journal.ask(["c"], lambda: None) is None
    with Journal(path) as journal:
        assert len(journal) == 2 and journal.ask(["c"], lambda: asked.append(4)) is None
        journal.remove()
    assert not path.exists() and asked == [1]


def test_a_killed_writer_loses_nothing_it_was_told(tmp_path):
    path = tmp_path / "x.journal"
    script = (
        "import sys, pathlib\nfrom data_pipeline.journal import Journal\njournal = Journal(pathlib.Path(sys.argv[1]))\n"
        "for number in range(10**9):\n    journal.ask(number, lambda: 'x' * 1000)\n    print(number, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, env=environment) as writer:
        told = [int(writer.stdout.readline()) for _ in range(50)][-1]
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split(b"\n")[:-1]  # a cut last line was not told
    told = int(rest[-1]) if rest else told
    with Journal(path) as journal:
        assert told < len(journal) <= told + 2
        assert journal.ask(told, lambda: pytest.fail("asked again")) == "x" * 1000


def test_python_is_parsed_by_many_threads_at_once():
    """CPython 3.11 loses count without the lock; a deep tree and a shallow one side by side show it."""
    deep = "x = " + "-" * 60 + "1\n" + "def f():\n    return [" + "(" * 40 + "1" + ")" * 40 + "]\n"
    with ThreadPoolExecutor(8) as pool:
        trees = list(pool.map(lambda n: parse_python(deep * (1 + n % 7)), range(400)))
    assert [len(tree.body) for tree in trees] == [2 * (1 + n % 7) for n in range(400)]
