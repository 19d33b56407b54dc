"""The student, loaded: decoder, base weights, tokenizer and grammar, placed on a mesh.

Everything that needs the policy (training, evaluation, the rewrite tool) starts here, so that tokenizer, tag rows and
grammar always belong together.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from srl_jax import assets, grammar, sharding
from srl_jax.config import ConfigError, TrainConfig
from srl_jax.model import flash, hf, quantize
from srl_jax.model.decoder import Decoder, init_lora, merge_lora, mergeable
from srl_jax.model.shapes import SHAPES
from srl_jax.sampling import SamplingConfig
from srl_jax.tokenizer import Tokenizer, load_tokenizer

_WIDTH_STEP = 128  # tokens


@dataclasses.dataclass(frozen=True)
class Student:
    """A frozen base model ready to be adapted, sampled and scored."""

    decoder: Decoder
    params: dict
    tokenizer: Tokenizer
    automaton: grammar.TokenAutomaton
    mesh: Mesh
    sampling: SamplingConfig
    base_hash: str

    def fresh_lora(self, seed: int) -> dict:
        """New adapters (B = 0), placed on the mesh."""
        return self.place_lora(jax.tree.map(np.asarray, init_lora(self.decoder, jax.random.key(seed))))

    def place_lora(self, lora: dict) -> dict:
        """Adapters on the mesh; from host arrays, which every process of a multi-host run can place its part of."""
        return jax.device_put(lora, sharding.variable_shardings(self.mesh, self.decoder)["lora"])

    def sampling_variables(self, lora: dict | None) -> dict:
        """The variables to sample with: adapters merged where that is exact enough, else applied beside the base.

        In float32 merging costs a copy of the layers and saves two small products per linear map and token.
        In bfloat16 or a quantised base a merged sum would round the adapters away, so they stay apart.
        """
        if lora is None:
            return {"params": self.params}
        if not mergeable(self.params):
            return {"params": self.params, "lora": lora}
        return {"params": _merge(self.params, lora, scale=self.decoder.lora_alpha / self.decoder.lora_rank)}

    @property
    def cache_is_rounded(self) -> bool:
        """Whether the sampler keeps keys and values in a narrower type than it computes them in."""
        return self.sampling.cache_dtype not in ("model", str(self.params["embedding"].dtype))

    def without_grammar(self) -> "Student":
        """The same model, sampled over its whole vocabulary until the end of a trace."""
        free = grammar.free_automaton(self.tokenizer, vocab_size=self.decoder.config.vocab_size)
        return dataclasses.replace(self, automaton=jax.device_put(free, sharding.replicated(self.mesh)))


_merge = jax.jit(merge_lora, static_argnames=("scale",))


def load_student(config: TrainConfig, mesh: Mesh) -> Student:
    """Loads what `config.model` names, each weight straight to its place on `mesh`.

    Raises:
      ConfigError: naming `model.source` when it is none of the four forms.
      FileNotFoundError, UnsupportedModel, BadWeights, TokenizerError, AssetError: each naming the file at fault.
    """
    path, tokenizer, new_rows, decoder = _describe(config, mesh)
    dtype, shardings = jnp.dtype(config.model.dtype), sharding.variable_shardings(mesh, decoder)["params"]
    stored = {"dtype": dtype, "quantize": decoder.quantize}
    stored["place"] = lambda leaf, array: jax.device_put(array, _at(shardings, leaf))
    if path is None:
        params = hf.random_params(decoder.config, seed=0, **stored)
    else:
        _, params = hf.load_params(path, new_rows=new_rows, **stored)
    return _assemble(config, mesh, tokenizer, decoder, params, hf.weights_hash(params))


def plan_student(config: TrainConfig, mesh: Mesh) -> Student:
    """`load_student` with `jax.ShapeDtypeStruct`s in place of weights: for compiling without running. No hash."""
    _, tokenizer, _, decoder = _describe(config, mesh)
    dtype, shardings = jnp.dtype(config.model.dtype), sharding.variable_shardings(mesh, decoder)["params"]
    params: dict = {}
    for leaf, shape in hf.expected_shapes(decoder.config).items():
        node = params
        for key in leaf[:-1]:
            node = node.setdefault(key, {})
        abstract = jax.ShapeDtypeStruct(shape, hf.leaf_dtype(leaf, dtype))
        if leaf[-1] == "kernel" and decoder.quantize != "none":
            abstract = quantize.abstract(abstract, decoder.quantize, dtype)
        node[leaf[-1]] = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            abstract,
            _at(shardings, leaf),
        )
    return _assemble(config, mesh, tokenizer, decoder, params, "")


# How a tag's new row is mixed, set where the untrained SmolLM2 closes `<think>` as often as it does with plain-text
# tags (`launch/benchmark.py --parts=tags`; reports/benchmarks.md).
_OWN_SHARE, _LEAD = 0.25, 1.0625


def tag_rows(tokenizer: Tokenizer) -> dict[int, dict[int, float]]:
    """What the embedding row of each tag that the vocabulary lacks is mixed from: {tag id: {source id: weight}}.

    The first piece of a tag's text ("</" of "</think>") is the token whose probability decides whether a block is
    closed, so the row starts from that piece's; a mean over all pieces closes 80 times too seldom. What tells one tag
    from another is a share of its other pieces ("think", ">"), less what these are on average over the tags: without
    it all closing tags would be one row, which no training of the layers below could tell apart. The lead lifts the
    tag above the piece it copies, which a greedy tie would choose instead.
    """
    average = [piece for ids in tokenizer.tag_source_ids for piece in ids[1:]]
    rows: dict[int, dict[int, float]] = {}
    for tag, ids in zip(tokenizer.tag_ids, tokenizer.tag_source_ids, strict=False):
        if tag not in tokenizer.added_tag_ids:
            continue
        mix = rows[tag] = dict.fromkeys((ids[0], *average), 0.0)
        mix[ids[0]] += _LEAD
        for pieces, sign in ((ids[1:], 1.0), (average, -1.0)):
            for piece in pieces:
                mix[piece] += sign * _LEAD * _OWN_SHARE / len(pieces)
    return rows


def _at(tree: dict, leaf: tuple[str, ...]):
    for key in leaf:
        tree = tree[key]
    return tree


def _platform(mesh: Mesh) -> str:
    """ "cuda", "tpu", "cpu" or what else the mesh is made of; JAX calls GPUs of every maker "gpu"."""
    device = mesh.devices.flat[0]
    return "cuda" if device.platform == "gpu" and "cuda" in device.client.platform_version else device.platform


def _describe(config: TrainConfig, mesh: Mesh) -> tuple[Path | None, Tokenizer, hf.NewRows, Decoder]:
    """The weights' file (None: random), tokenizer, sources of the tags' rows, and the decoder, which fits `mesh`."""
    source = config.model.source
    shape = SHAPES.get(source.removeprefix(assets.RANDOM)) if source.startswith(assets.RANDOM) else None
    if source.startswith(assets.RANDOM) and shape is None:
        names = ", ".join(assets.RANDOM + name for name in SHAPES)
        raise ConfigError("model.source", source, f"the random models are {names}")
    path = assets.model_path(source)
    if not path.exists():
        raise ConfigError("model.source", source, "no such file or directory; give asset:NAME, a directory or a .gguf")
    tokenizer = load_tokenizer(path, atomic_tags=config.model.atomic_tags)
    new_rows = tag_rows(tokenizer)
    if shape:
        model = dataclasses.replace(shape, vocab_size=max(shape.vocab_size, tokenizer.vocab_size))
    else:
        model = hf.read_config(path, new_rows=new_rows)
    if model.vocab_size < tokenizer.vocab_size:
        raise hf.BadWeights(
            f"{path}: the embedding has {model.vocab_size} rows, the tokenizer {tokenizer.vocab_size} ids; "
            "they do not belong together"
        )
    attention = config.model.attention
    if attention == "auto":
        attention = flash.choose(_platform(mesh), model, jnp.dtype(config.model.dtype))
    decoder = Decoder(
        model, config.lora.rank, config.lora.alpha, config.model.remat, config.model.quantize, attention, mesh
    )
    quantize.check(model, decoder.quantize)
    for prompts in (config.grpo.micro_batch, config.sampling.slots):
        sharding.check_divisible(mesh, decoder, prompts)
    return None if shape else path, tokenizer, new_rows, decoder


def _assemble(
    config: TrainConfig, mesh: Mesh, tokenizer: Tokenizer, decoder: Decoder, params: dict, base_hash: str
) -> Student:
    model = decoder.config
    if config.sampling.constrained:
        automaton = grammar.compile_grammar(tokenizer, vocab_size=model.vocab_size)
        try:
            grammar.check_budget(automaton, config.sampling.max_new_tokens, config.sampling.max_think_tokens)
        except ValueError as error:
            raise ConfigError("sampling", dataclasses.asdict(config.sampling), str(error)) from None
    else:
        automaton = grammar.free_automaton(tokenizer, vocab_size=model.vocab_size)
    settings = SamplingConfig(
        config.sampling.max_new_tokens,
        config.sampling.max_think_tokens,
        config.sampling.temperature,
        config.sampling.drafts,
        config.sampling.top_k,
        config.sampling.top_p,
        config.sampling.cache_dtype,
    )
    automaton = jax.device_put(automaton, sharding.replicated(mesh))
    return Student(decoder, params, tokenizer, automaton, mesh, settings, base_hash)


def prompt_width(prompts: Sequence[Sequence[int]], limit: int) -> int:
    """The width to pad `prompts` to, at most `limit` tokens: one of four or fewer, since each is compiled for itself.

    They are multiples of 128, as attention kernels like them, and `limit` itself.
    """
    step = -(-limit // (4 * _WIDTH_STEP)) * _WIDTH_STEP
    return min(limit, -(-max(map(len, prompts)) // step) * step)


def pad_prompts(prompts: list[list[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded prompts [P, length] and their lengths [P], int32."""
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    return tokens, np.asarray([len(ids) for ids in prompts], np.int32)
