"""Exports load in peft and transformers and say the same."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from srl_jax.model import hf
from srl_jax.model.decoder import Decoder, init_lora, logits, merge_lora
from srl_jax.model.export import ExportError, export_adapter, export_merged
from srl_jax.run import Run
from srl_jax.student import tag_rows
from tests.fakes import perturbed, tiny_config
from tests.peers import greedy, peer
from tests.tiny_tokenizer import tiny_tokenizer

_TEXT = "<think>why</think>\n<action>{}</action>"
_RANK, _ALPHA = 4, 8.0
# Base vocabularies: exactly the tokenizer's, so that tag rows are new; or padded, so that they lie in the padding.
_STUDENTS = {"llama-tied-mha": 0, "qwen2": 10, "llama-untied": 0, "gemma3": 3}


@dataclasses.dataclass
class _Trained:
    base: Path
    decoder: Decoder
    params: dict
    lora: dict
    tokenizer: object

    def logits(self, ids):
        tokens = jnp.asarray([ids])
        positions = jnp.arange(len(ids))[None, :]
        hidden, _ = self.decoder.apply({"params": self.params, "lora": self.lora}, tokens, positions)
        return np.asarray(logits(self.decoder.config, self.params, hidden))


@pytest.fixture(scope="module", params=_STUDENTS)
def trained(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer(300)
    vocabulary = tokenizer.vocab_size - 6 + _STUDENTS[request.param]
    peer(request.param, vocab_size=vocabulary).save_pretrained(base)
    config, params = hf.load_params(base, new_rows=tag_rows(tokenizer))
    decoder = Decoder(config, _RANK, _ALPHA)
    return _Trained(base, decoder, params, perturbed(init_lora(decoder, jax.random.key(0))), tokenizer)


def _their_logits(model, ids):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits.numpy()


# peft 0.21 reads attributes that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_adapter_gives_the_same_logits_in_peft(trained, tmp_path):
    out = tmp_path / "adapter"
    export_adapter(out, trained.decoder, trained.params, trained.lora, trained.tokenizer, base=str(trained.base))
    ids = trained.tokenizer.encode(_TEXT)
    assert set(ids) & set(trained.tokenizer.tag_ids)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    theirs = _their_logits(model, ids)
    ours = trained.logits(ids)[..., : theirs.shape[-1]]  # peft cuts the padding off the vocabulary
    assert theirs.shape[-1] >= trained.tokenizer.vocab_size
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    with model.disable_adapter():  # the adapter is in use at all
        assert np.abs(_their_logits(model, ids) - theirs).max() > 1e-2


def test_the_merged_model_says_the_same_in_transformers(trained, tmp_path):
    out = tmp_path / "merged"
    export_merged(out, trained.decoder, trained.params, trained.lora, trained.tokenizer)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = trained.tokenizer.encode(_TEXT)
    assert tokenizer(_TEXT, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == _TEXT
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    np.testing.assert_allclose(_their_logits(model, ids), trained.logits(ids), atol=1e-4)

    merged = merge_lora(trained.params, trained.lora, _ALPHA / _RANK)
    ours = greedy(trained.decoder.config, merged, np.asarray([ids]), 32)[0].tolist()
    stops = model.generation_config.eos_token_id
    assert stops == [trained.tokenizer.tag_ids[-1], trained.tokenizer.eos_id]
    ends = [i for i, token in enumerate(ours) if token in stops]
    ours = ours[: ends[0] + 1] if ends else ours
    theirs = model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0, len(ids) :].tolist()
    assert trained.tokenizer.decode(theirs) == trained.tokenizer.decode(ours)

    config, params = hf.load_params(out)  # and it is a model for us to train on
    assert config == trained.decoder.config
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_shards_and_bfloat16(trained, tmp_path):
    model = (trained.decoder, trained.params, trained.lora, trained.tokenizer)
    export_merged(tmp_path / "one", *model)
    export_merged(tmp_path / "many", *model, max_shard=20_000)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    assert hf.weights_hash(hf.load_params(tmp_path / "one")[1]) == hf.weights_hash(hf.load_params(tmp_path / "many")[1])
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    export_merged(tmp_path / "half", *model, dtype="bfloat16")
    full, half = (hf.load_params(tmp_path / name)[1]["layers"]["q"]["kernel"] for name in ("one", "half"))
    np.testing.assert_array_equal(np.asarray(full, jnp.bfloat16), np.asarray(half, jnp.bfloat16))


def test_nothing_is_overwritten_and_nothing_half_written_stays(trained, tmp_path, monkeypatch):
    model = (trained.decoder, trained.params, trained.lora, trained.tokenizer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="full"):
        export_merged(tmp_path / "full", *model)

    def fail(directory):
        raise OSError("disk full")

    monkeypatch.setattr(trained.tokenizer, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_merged(tmp_path / "new", *model)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_the_command_exports_a_run(tmp_path):
    config = tiny_config()
    config.eval.execute = True
    workdir = tmp_path / "run"
    with Run(tiny_config(), workdir) as run:
        run.state = run.state._replace(lora=perturbed(run.state.lora))
        run.save(1, {})
        run.wait()
        expected = merge_lora(run.student.params, run.state.lora, run.student.decoder.lora_alpha / config.lora.rank)
    # As of a machine with more devices, a reward server that is gone, and rewards that need executing: none is needed.
    config.mesh.data, config.sandbox.server = 64, "http://127.0.0.1:9"
    config.reward.match_gate, config.reward.execution = 0.5, 0.1
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    root = Path(__file__).parents[1]
    command = [sys.executable, str(root / "launch" / "export.py"), f"--workdir={workdir}", f"--out={tmp_path / 'out'}"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    _, params = hf.load_params(tmp_path / "out")
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert again.returncode == 2 and "exists and is not an empty directory" in again.stderr
