"""A directory of code: what is read, when writing is refused, and that nothing outside is ever touched."""

import os
import subprocess
from pathlib import Path

import pytest

from srl_jax import worktree
from srl_jax.trace import StateUpdate
from srl_jax.worktree import DirectoryError, check_writable, load_state, read_directory, save_state, write_edits


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", "-C", root, *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture
def plain(tmp_path):
    root = tmp_path / "project"
    (root / "src").mkdir(parents=True)
    (root / "src" / "a.py").write_bytes(b"x = 1\r\ny = 2\n")
    (root / "b.py").write_text("print('é')\n", encoding="utf-8")
    return root


@pytest.fixture
def tree(plain):
    git(plain, "init", "-q")
    git(plain, "add", "-A")
    git(plain, "commit", "-qm", "first")
    return plain


def test_texts_come_byte_for_byte(plain):
    assert read_directory(plain) == {"b.py": "print('é')\n", "src/a.py": "x = 1\r\ny = 2\n"}


def test_what_is_no_source_is_left_out(plain):
    (plain / "latin.py").write_bytes("é".encode("latin-1"))
    (plain / "big.py").write_text("#" * (worktree.MAX_FILE_BYTES + 1))
    for folder in (".hidden", "node_modules", "__pycache__", "env"):
        (plain / folder).mkdir()
        (plain / folder / "c.py").write_text("")
    (plain / "env" / "pyvenv.cfg").write_text("")
    assert set(read_directory(plain)) == {"b.py", "src/a.py"}


def test_names_that_no_glob_can_speak_of_are_left_out(plain):
    (plain / "a\\b.py").write_text("")
    (plain / os.fsdecode(b"caf\xe9.py")).write_text("")
    assert set(read_directory(plain)) == {"b.py", "src/a.py"}
    git(plain, "init", "-q")
    assert set(read_directory(plain)) == {"b.py", "src/a.py"}


def test_git_says_which_files_count(tree):
    (tree / ".gitignore").write_text("out/\n")
    (tree / "out").mkdir()
    (tree / "out" / "made.py").write_text("")
    (tree / "new.py").write_text("")
    (tree / "b.py").unlink()  # still in the index
    assert set(read_directory(tree)) == {".gitignore", "new.py", "src/a.py"}
    assert set(read_directory(tree / "src")) == {"a.py"}


@pytest.mark.parametrize("link", ["file", "folder"])
def test_links_are_not_followed(tree, tmp_path, link):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.py").write_text("s = 1\n")
    if link == "file":
        (tree / "secret.py").symlink_to(outside / "secret.py")
    else:
        (tree / "more").symlink_to(outside)
    assert set(read_directory(tree)) == {"b.py", "src/a.py"}
    path = "secret.py" if link == "file" else "more/secret.py"
    with pytest.raises(DirectoryError, match="changed since it was read"):
        write_edits(tree, {path: "s = 1\n"}, {path: "s = 2\n"})
    assert (outside / "secret.py").read_text() == "s = 1\n"


def test_a_directory_reached_by_a_link_is_itself(tree, tmp_path):
    (tmp_path / "alias").symlink_to(tree)
    files = read_directory(tmp_path / "alias")
    assert set(files) == {"b.py", "src/a.py"}
    assert write_edits(tmp_path / "alias", files, {**files, "b.py": "pass\n"}) == ["b.py"]
    assert (tree / "b.py").read_text() == "pass\n"


def test_a_directory_that_is_none(tmp_path):
    with pytest.raises(DirectoryError, match="not a directory"):
        read_directory(tmp_path / "gone")


def test_a_clean_tree_may_be_written_a_dirty_one_not(tree):
    check_writable(tree)
    (tree / "b.py").write_text("changed\n")
    with pytest.raises(DirectoryError, match=r"uncommitted changes \(b.py\).*--force"):
        check_writable(tree)
    check_writable(tree / "src")  # what is dirty lies elsewhere
    git(tree, "checkout", "-q", "b.py")
    (tree / "new.py").write_text("")
    with pytest.raises(DirectoryError, match=r"new\.py"):
        check_writable(tree)


def test_without_git_nothing_could_be_undone(plain):
    with pytest.raises(DirectoryError, match=r"not in a git tree.*\(not a git repository.*--force"):
        check_writable(plain)


def test_a_hooks_variables_do_not_point_elsewhere(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    check_writable(tree)


def test_looking_runs_no_program_of_the_tree(tree, tmp_path):
    marker = tmp_path / "ran"
    spy = tmp_path / "spy.sh"
    spy.write_text(f"#!/bin/sh\ntouch {marker}\n")
    spy.chmod(0o755)
    git(tree, "config", "core.fsmonitor", str(spy))
    check_writable(tree)
    read_directory(tree)
    assert not marker.exists()
    git(tree, "status")  # the same without our care does run it
    assert marker.exists()


@pytest.mark.parametrize("kind", ["clean", "process"])
def test_looking_runs_no_filter_of_the_trees_own_configuration(tree, tmp_path, kind):
    marker = tmp_path / "ran"
    (tree / ".gitattributes").write_text("*.py filter=x=y\n")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "second")
    git(tree, "config", f"filter.x=y.{kind}", f"touch {marker}; cat")
    git(tree, "config", "filter.x=y.required", "true")
    (tree / "b.py").touch()  # the index no longer knows it, as after unpacking an archive
    os.utime(tree / "b.py", (1, 1))
    check_writable(tree)
    read_directory(tree)
    assert not marker.exists()
    subprocess.run(["git", "-C", tree, "status"], capture_output=True, check=False)  # without our care it does run
    assert marker.exists()


def test_a_loop_of_links_is_no_file(tree):
    (tree / "loop.py").symlink_to("loop.py")
    assert set(read_directory(tree)) == {"b.py", "src/a.py"}


def test_an_edit_keeps_mode_and_line_ends(tree):
    (tree / "src" / "a.py").chmod(0o755)
    files = read_directory(tree)
    after = {**files, "src/a.py": "x = 7\r\ny = 2\n"}
    assert write_edits(tree, files, after) == ["src/a.py"]
    assert (tree / "src" / "a.py").read_bytes() == b"x = 7\r\ny = 2\n"
    assert (tree / "src" / "a.py").stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in (tree / "src").iterdir()) == ["a.py"]


def test_a_file_changed_meanwhile_stops_everything(tree):
    files = read_directory(tree)
    (tree / "src" / "a.py").write_text("somebody else\n")
    with pytest.raises(DirectoryError, match="changed since it was read"):
        write_edits(tree, files, {"b.py": "pass\n", "src/a.py": "pass\n"})
    assert (tree / "b.py").read_text(encoding="utf-8") == "print('é')\n"


def test_a_failure_before_the_first_replacement_leaves_all_files(tree, monkeypatch):
    files = read_directory(tree)
    calls = iter([None, OSError("disk full")])

    def fsync(descriptor):
        if (error := next(calls)) is not None:
            raise error

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="disk full"):
        write_edits(tree, files, dict.fromkeys(files, "pass\n"))
    assert read_directory(tree) == files  # and no temporary file is left, or it would be listed


def test_the_state_is_kept_out_of_version_control(tree):
    assert load_state(tree) is None
    state = StateUpdate(("use log",), ("small diff",), (), ("run the tests",))
    save_state(tree, state)
    save_state(tree, state)
    assert load_state(tree) == state
    check_writable(tree)
    assert set(read_directory(tree)) == {"b.py", "src/a.py"}


def test_a_damaged_state_is_named(tree):
    save_state(tree, StateUpdate.empty())
    (tree / ".srl_jax" / "state.json").write_text('{"decisions": 3}')
    with pytest.raises(DirectoryError, match=r"state\.json: not a planner's state.*delete it"):
        load_state(tree)


def test_a_linked_state_folder_is_refused(tree, tmp_path):
    (tmp_path / "outside").mkdir()
    (tree / ".srl_jax").symlink_to(tmp_path / "outside")
    with pytest.raises(DirectoryError, match="is a link"):
        save_state(tree, StateUpdate.empty())
    with pytest.raises(DirectoryError, match="is a link"):
        load_state(tree)
    assert not list((tmp_path / "outside").iterdir())


def test_links_that_wait_in_the_state_folder_lead_nowhere(tree, tmp_path):
    (tmp_path / "precious").write_text("precious")
    save_state(tree, StateUpdate.empty())
    for name in (".gitignore", "state.json", ".gitignore.tmp", "state.json.tmp"):
        (tree / ".srl_jax" / name).unlink(missing_ok=True)
        (tree / ".srl_jax" / name).symlink_to(tmp_path / "precious")
    with pytest.raises(DirectoryError, match=r"state\.json: is a link"):
        load_state(tree)
    save_state(tree, StateUpdate.empty())
    assert (tmp_path / "precious").read_text() == "precious"
    assert load_state(tree) == StateUpdate.empty()


def test_a_state_folder_that_is_a_file_is_refused(tree):
    (tree / ".srl_jax").write_text("")
    for attempt in (load_state, lambda root: save_state(root, StateUpdate.empty())):
        with pytest.raises(DirectoryError, match="is not a folder"):
            attempt(tree)
