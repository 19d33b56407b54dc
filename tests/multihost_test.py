"""Two processes on one mesh, speaking through jax.distributed, sample and update as one process does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def _start(processes: int, number: int, port: int, out: Path) -> subprocess.Popen:
    devices = 2 if processes > 1 else 1
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    arguments = [f"localhost:{port}", str(processes), str(number), str(out)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.multihost_worker", *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


# Gathers of any size: what a CPU computes on the calling thread and what it hands to another fail differently.
_GATHERS = """
import sys
from srl_jax import hosts
hosts.join(sys.argv[1], 2, int(sys.argv[2]))
try:
    with hosts.together():
        while True:
            hosts.share([bytes(int(sys.argv[3]))])
            print("met", file=sys.stderr, flush=True)
except hosts.HostLost as error:
    hosts.ends_in_order()
    print(error, flush=True)
    import os
    os._exit(5)
"""


@pytest.mark.parametrize("size", [1, 1 << 22])
def test_a_gather_with_a_killed_host_is_named(size):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", _GATHERS, address, str(number), str(size)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        for process in pair:
            assert any(line == "met\n" for line in process.stderr), "it did not get to the first gather"
        pair[1].kill()
        out, err = pair[0].communicate(timeout=120)
        assert pair[0].returncode == 5, err
        assert out.splitlines()[-1].startswith("host 0 of 2 lost another one (") and "start all hosts again" in out
        assert "host 1 of 2 was ended, by a kill or by JAX" in pair[1].communicate(timeout=120)[1]
    finally:
        for process in pair:
            process.kill()
            process.communicate()


def _finish(process: subprocess.Popen) -> None:
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, output[-4000:]


def _read(out: Path) -> tuple[dict, dict[str, np.ndarray]]:
    return json.loads(out.read_text()), dict(np.load(out.with_suffix(".npz")))


def test_two_hosts_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    outs = [tmp_path / "0.json", tmp_path / "1.json"]
    processes = [_start(2, number, port, out) for number, out in enumerate(outs)]
    try:
        for process in processes:
            _finish(process)
    finally:
        for process in processes:
            process.kill()
    _finish(_start(1, 0, port, tmp_path / "alone.json"))
    alone, alone_arrays = _read(tmp_path / "alone.json")
    assert alone["devices"] == 1
    for out in outs:
        report, arrays = _read(out)
        assert report["devices"] == 4 and report["hash"] == alone["hash"]
        np.testing.assert_array_equal(arrays.pop("tokens"), alone_arrays["tokens"])
        for name in ("loss", "entropy", "grad_norm", "ratio_mean"):
            assert report["metrics"][name] == pytest.approx(alone["metrics"][name], abs=1e-5), name
        assert report["metrics"]["logprob_gap"] < 1e-5 and report["metrics"]["grad_norm"] > 1e-4
        for name, array in arrays.items():
            np.testing.assert_allclose(array, alone_arrays[name], atol=1e-5, err_msg=name)
        assert report["shared"] == [[[3, "65"]], [[3000, "61"], [0, ""], [1, "01"]]]
        assert report["spread"] == ["a0", "b0", "c1", "d1", "e1"] and report["none"] == []
        assert report["first"] == {"number": 0, "half": 0.5} and report["greatest"] == 7
        assert report["same"] is None and report["left"] == []
        assert "the data: set 1 on host 1, set 0 on host 0" in report["differs"]
        assert "is not the same directory on host 1 as on host 0; put it on shared storage" in report["apart"]
