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
