"""The decoder against transformers, against itself uncached and unshared, and against damaged files."""

import dataclasses
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from srl_jax import assets
from srl_jax.model import families, hf, shapes
from srl_jax.model.attention import attend, attend_causal
from srl_jax.model.decoder import (
    Decoder,
    completion_hidden,
    init_lora,
    logits,
    merge_lora,
)
from tests.peers import CASES, greedy
from tests.peers import peer as make_peer


def _positions(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)


def _full_logits(config, params, tokens):
    hidden, _ = Decoder(config).apply({"params": params}, tokens, _positions(tokens))
    return np.asarray(logits(config, params, hidden))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_text_agree_with_transformers(name, tmp_path):
    peer = make_peer(name)
    peer.save_pretrained(tmp_path)
    config, params = hf.load_params(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 70))
    with torch.no_grad():
        expected = peer(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(_full_logits(config, params, tokens), expected, atol=1e-4)
    assert sum(x.size for x in jax.tree.leaves(params)) == config.parameters

    with torch.no_grad():
        theirs = peer.generate(torch.tensor(tokens[:, :8]), max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert greedy(config, params, tokens[:, :8], 64).tolist() == theirs[:, 8:].tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_smollm2_from_gguf_agrees_with_transformers():
    path = assets.fetch("smollm2-135m-instruct")
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()
    config, params = hf.load_params(path)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 48))
    with torch.no_grad():
        expected = peer(torch.tensor(tokens)).logits.numpy()
    assert np.abs(_full_logits(config, params, tokens) - expected).max() < 1e-3


def _write_gguf(peer, path, factors=None):
    """A GGUF file of a transformers model by llama.cpp's own package and names, Llama's q and k permuted as there."""
    config = peer.config
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
    names = gguf.get_tensor_name_map(arch[config.model_type], config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if head_dim := config.to_dict().get("head_dim"):
        writer.add_key_length(head_dim)
    for name, tensor in peer.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
        if config.model_type == "llama" and (n := heads.get(name.split(".", 4)[-1])):
            tensor = tensor.reshape(n, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["llama-untied", "llama-tied-mha", "qwen2", "qwen3-wide-heads"])
def test_a_gguf_file_gives_the_model_of_the_safetensors(name, tmp_path):
    peer = make_peer(name)
    peer.save_pretrained(tmp_path)
    _write_gguf(peer, tmp_path / "model.gguf")
    config, params = hf.load_params(tmp_path)
    from_gguf, same = hf.load_params(tmp_path / "model.gguf")
    assert from_gguf.norm_eps == pytest.approx(config.norm_eps)  # stored in single precision
    assert dataclasses.replace(from_gguf, norm_eps=config.norm_eps) == config
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_gguf_file_of_llama_3_carries_its_rope_scaling(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    peer = make_peer("llama-untied", rope_parameters=rope, head_dim=64)
    plain = 1 / 5e5 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    factors = (plain / peer.model.rotary_emb.inv_freq).numpy()
    _write_gguf(peer, tmp_path / "model.gguf", factors)
    peer.save_pretrained(tmp_path)
    assert hf.read_config(tmp_path / "model.gguf").rope_scaling == hf.read_config(tmp_path).rope_scaling
    _write_gguf(peer, tmp_path / "odd.gguf", factors[::-1].copy())
    with pytest.raises(families.UnsupportedModel, match=r"rope_freqs\.weight is not Llama 3's"):
        hf.read_config(tmp_path / "odd.gguf")


def _adapted(config):
    decoder = Decoder(config, lora_rank=4, lora_alpha=8.0)
    params = hf.random_params(config, seed=1)
    lora = init_lora(decoder, jax.random.key(2))
    lora = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(3), x.shape), lora)
    return decoder, params, lora


@pytest.fixture(scope="module")
def small():
    return _adapted(shapes.tiny(101))


# What Gemma adds, at once. The first layer's window ends inside the prompts of `_ragged` for early completion tokens
# and inside the completion for late ones.
_GEMMA = {
    "post_norms": True,
    "activation": "gelu_tanh",
    "embed_scale": 8.0,
    "query_scale": 0.2,
    "attention_softcap": 1.0,
    "final_softcap": 2.0,
    "windows": (4, 0),
    "local_rope_theta": 50.0,
}


def _ragged(seed=0, groups=3, length=9):
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, 101, (2, 12)).astype(np.int32)
    return prompts, np.asarray([12, 7], np.int32), rng.integers(0, 101, (2, groups, length)).astype(np.int32)


@pytest.mark.parametrize("extra", [{}, _GEMMA], ids=["llama", "gemma"])
def test_shared_prompt_equals_rows_of_their_own_in_values_and_gradients(extra):
    decoder, params, lora = _adapted(dataclasses.replace(shapes.tiny(101), **extra))
    prompts, lengths, completions = _ragged()
    weights = np.random.default_rng(5).standard_normal((2, 3, 9, decoder.config.d_model)).astype(np.float32)

    def shared(lora):
        variables = {"params": params, "lora": lora}
        return completion_hidden(decoder, variables, jnp.asarray(prompts), jnp.asarray(lengths), completions)

    def apart(lora):
        rows = []
        for p in range(2):
            for g in range(3):
                row = np.concatenate([prompts[p, : lengths[p]], completions[p, g]])[None]
                hidden, _ = decoder.apply({"params": params, "lora": lora}, row, _positions(row))
                rows.append(hidden[0, lengths[p] - 1 : -1])
        return jnp.stack(rows).reshape(2, 3, 9, -1)

    np.testing.assert_allclose(jax.jit(shared)(lora), jax.jit(apart)(lora), atol=1e-5)
    grads = [jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(x) * weights)))(lora) for f in (shared, apart)]
    for one, other in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("length", [3, 128, 129, 300, 700])
@pytest.mark.parametrize("window", [None, 40])
def test_attention_in_blocks_of_queries_is_attention(length, window):
    """One block, one and a bit, several of the least size, four larger ones; with a prompt that windows may hide."""
    rng = np.random.default_rng(length)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q, k, v = draw(4, length, 6, 8), draw(4, 2, length, 8), draw(4, 2, length, 8)
    prefix = draw(2, 2, 50, 8), draw(2, 2, 50, 8)
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    seen = lambda distance: (distance >= 0) & (distance < (window or 10_000))
    before = np.broadcast_to(np.arange(50)[None, None, None] < np.asarray([50, 9])[:, None, None, None], (2, 1, 1, 50))
    if window:
        before = before & seen(50 + np.arange(length)[:, None] - np.arange(50)[None, :])
    weights = draw(*q.shape)

    def run(way):
        def total(q, k, v, prefix):
            out = way(q, k, v, seen(distance)[None], prefix, before, scale=0.3, softcap=5.0)
            return jnp.sum(out * weights), out

        grads, out = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, prefix)
        return out, grads

    for one, other in zip(*map(jax.tree.leaves, (run(attend_causal), run(attend))), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_window_ends_where_it_says():
    config = dataclasses.replace(shapes.tiny(101), windows=(4, 4))
    decoder, params = Decoder(config), hf.random_params(config, seed=1)
    prompt, after = np.arange(12)[None], np.arange(20, 29)[None, None]
    lengths = jnp.asarray([12])

    def hidden(tokens):
        return np.asarray(completion_hidden(decoder, {"params": params}, tokens, lengths, after))[0, 0]

    # The row that predicts completion token i stands at position 11 + i and sees 4 positions a layer: with two layers
    # nothing before position 5 + i. So a change at prompt position 7 reaches rows 0, 1 and 2 and no other.
    changed = prompt.copy()
    changed[0, 7] = 99
    moved = np.abs(hidden(prompt) - hidden(changed)).max(-1) > 0
    assert moved.tolist() == [True] * 3 + [False] * 6


def test_padding_and_neighbours_do_not_leak(small):
    decoder, params, lora = small
    prompts, lengths, completions = _ragged()
    variables = {"params": params, "lora": lora}
    before = completion_hidden(decoder, variables, jnp.asarray(prompts), jnp.asarray(lengths), completions)
    prompts[1, 7:] = 55  # padding of the second prompt
    completions[:, 2] = 3  # a sibling
    after = completion_hidden(decoder, variables, jnp.asarray(prompts), jnp.asarray(lengths), completions)
    np.testing.assert_array_equal(before[:, :2], after[:, :2])


def test_a_token_sees_only_what_comes_before_it(small):
    decoder, params, _ = small
    tokens = jnp.asarray(_ragged()[0][:1])
    embedding = params["embedding"]

    def hidden_at_5(rows):
        # Each position gets an embedding row of its own, so that a gradient names the position.
        own = {**params, "embedding": embedding.at[:12].set(rows)}
        out, _ = decoder.apply({"params": own}, jnp.arange(12)[None, :], _positions(tokens))
        return out[0, 5].sum()

    grads = np.abs(jax.grad(hidden_at_5)(embedding[:12])).sum(-1)
    assert (grads[:6] > 0).all() and (grads[6:] == 0).all()


def test_merged_adapters_equal_applied_ones(small):
    decoder, params, lora = small
    tokens = jnp.asarray(_ragged()[0])
    applied, _ = decoder.apply({"params": params, "lora": lora}, tokens, _positions(tokens))
    merged, _ = decoder.apply({"params": merge_lora(params, lora, 2.0)}, tokens, _positions(tokens))
    base, _ = decoder.apply({"params": params}, tokens, _positions(tokens))
    np.testing.assert_allclose(applied, merged, atol=1e-4)
    assert np.abs(applied - base).max() > 1e-2  # the adapters are in use at all


def test_merging_refuses_bfloat16(small):
    _, params, lora = small
    with pytest.raises(ValueError, match="float32"):
        merge_lora(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), lora, 1.0)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_memory_not_numbers(small, remat):
    decoder, params, lora = small
    tokens = jnp.asarray(_ragged()[0])

    def grad(decoder):
        def loss(lora):
            out, _ = decoder.apply({"params": params, "lora": lora}, tokens, _positions(tokens))
            return jnp.sum(out**2)

        return jax.jit(jax.grad(loss))(lora)

    for one, other in zip(*map(jax.tree.leaves, (grad(decoder), grad(decoder.clone(remat=remat)))), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_of_a_map_and_its_adapter_the_backward_pass_keeps_the_sum_alone():
    config = dataclasses.replace(shapes.tiny(101), n_layers=8)
    decoder, params, lora = _adapted(config)
    tokens = jnp.zeros((1, 512), jnp.int32)

    def temporaries(remat):
        def loss(lora):
            variables = {"params": params, "lora": lora}
            return decoder.clone(remat=remat).apply(variables, tokens, _positions(tokens))[0].sum()

        return jax.jit(jax.grad(loss)).lower(lora).compile().memory_analysis().temp_size_in_bytes

    kept = 2 * config.d_model + 2 * config.n_kv_heads * config.head_dim + 2 * config.d_ff  # q, o; k, v; gate, up
    kept += config.n_heads * (config.head_dim + 1)  # what was attended, and its normaliser
    assert temporaries("dots") - temporaries("full") < 1.3 * 4 * config.n_layers * tokens.size * kept


def test_new_rows_are_the_mix_of_their_sources(tmp_path):
    make_peer("llama-untied").save_pretrained(tmp_path)
    _, plain = hf.load_params(tmp_path)
    config, grown = hf.load_params(tmp_path, new_rows={96: {5: 1.0}, 97: {3: 2.0}, 98: {4: 0.5, 6: 0.25}})
    assert config.vocab_size == 99
    for table in ("embedding", "head"):
        np.testing.assert_array_equal(grown[table][:96], plain[table][:96])
        np.testing.assert_array_equal(grown[table][96], plain[table][5])  # a spare row of a padded vocabulary
        np.testing.assert_allclose(grown[table][97], 2 * plain[table][3])
        np.testing.assert_allclose(grown[table][98], plain[table][4] / 2 + plain[table][6] / 4, rtol=1e-6)
    with pytest.raises(hf.BadWeights, match="97 rows and the tokenizer adds ids"):
        hf.load_params(tmp_path, new_rows={99: {3: 1.0}})


def test_a_sharded_index_gives_the_same_model(tmp_path):
    peer = make_peer("gemma2")
    peer.save_pretrained(tmp_path / "one")
    peer.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert hf.weights_hash(hf.load_params(tmp_path / "one")[1]) == hf.weights_hash(hf.load_params(tmp_path / "many")[1])
    shards[1].unlink()
    with pytest.raises(hf.BadWeights, match=shards[1].name):
        hf.load_params(tmp_path / "many")


def test_norm_scales_stay_float32_in_a_bfloat16_model(tmp_path):
    make_peer("gemma3").save_pretrained(tmp_path)
    _, full = hf.load_params(tmp_path)
    _, half = hf.load_params(tmp_path, dtype=jnp.bfloat16)
    assert half["embedding"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(half["layers"]["q_norm"]["scale"], full["layers"]["q_norm"]["scale"])


def test_files_of_transformers_4_mean_the_same(tmp_path):
    """Gemma's own files: no layer_types, RoPE bases apart, a `hidden_act` that nobody reads."""
    make_peer("gemma3").save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    old = {k: v for k, v in new.items() if k not in ("layer_types", "rope_parameters", "tie_word_embeddings")}
    old |= {"sliding_window_pattern": 3, "rope_theta": 5e3, "rope_local_base_freq": 100.0, "hidden_act": "gelu"}
    old |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert families.from_hf(old) == families.from_hf(new)
    gemma2 = {**old, "architectures": ["Gemma2ForCausalLM"], "rope_local_base_freq": None}
    del gemma2["sliding_window_pattern"]
    assert families.from_hf(gemma2).windows == (5, 0, 5)


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_survives_its_file(name):
    peer = make_peer(name)
    config = families.from_hf({**peer.config.to_dict(), "architectures": [type(peer).__name__]})
    assert families.from_hf(families.to_hf(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_activation": "relu"}, "hidden_activation 'relu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "nearest: Gemma3ForCausalLM"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
    ],
)
def test_options_the_decoder_lacks_are_refused_by_name(tmp_path, change, message):
    make_peer("gemma3").save_pretrained(tmp_path)
    with pytest.raises(families.UnsupportedModel, match=message):
        families.from_hf(json.loads((tmp_path / "config.json").read_text()) | change)


def _edit_weights(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_damaged_models_are_refused_by_name(tmp_path):
    make_peer("llama-untied").save_pretrained(tmp_path)
    _edit_weights(tmp_path, lambda t: t.update({"model.norm.weight": np.zeros(5, np.float32)}))
    with pytest.raises(hf.BadWeights, match=r"model\.norm\.weight.*\(5,\).*\(32,\)"):
        hf.load_params(tmp_path)
    _edit_weights(tmp_path, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(hf.BadWeights, match=r"model\.norm\.weight.*missing"):
        hf.load_params(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalML"]}))
    with pytest.raises(families.UnsupportedModel, match=r"LlamaForCausalML.*nearest: LlamaForCausalLM"):
        hf.load_params(tmp_path)
    del config["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(families.UnsupportedModel, match=r"config\.json: field 'num_hidden_layers' is missing"):
        hf.load_params(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(hf.BadWeights, match=r"config\.json is not JSON"):
        hf.load_params(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        hf.load_params(tmp_path / "nowhere")


def test_a_damaged_file_is_named(tmp_path):
    make_peer("gemma2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(hf.BadWeights, match=r"model\.safetensors cannot be read"):
        hf.load_params(tmp_path)


def test_the_hash_sees_one_changed_bit(small):
    _, params, _ = small
    changed = {**params, "embedding": params["embedding"].at[5, 5].add(1e-6)}
    assert hf.weights_hash(params) == hf.weights_hash(dict(reversed(params.items())))
    assert hf.weights_hash(params) != hf.weights_hash(changed)
