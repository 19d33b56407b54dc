"""Byte-exact ids, atomic tags, prompts that cannot be injected into."""

import json
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from srl_jax import assets
from srl_jax.records import SourceFile, Task
from srl_jax.tokenizer import TokenizerError, load_tokenizer, render_prompt
from srl_jax.trace import LANGUAGES, TAGS, Action, StateUpdate, Trace, parse_trace, render_trace
from tests.tiny_tokenizer import tiny_tokenizer

TRACE = render_trace(
    Trace(
        "Rename it – keep the argument <b>.",
        Action("python", "old($X, $$$ARGS)", 'new("$X")\n', ("src/app.py",), {"X": {"regex": "^[a-z]+$"}}),
        StateUpdate(("a -> b",), (), ("naïve ☃ 🙂",), ()),
    )
)


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(assets.fetch("smollm2-135m-instruct"))


def task(**changes) -> Task:
    fields = dict(  # noqa: C408
        task_id="t1",
        instruction="Rename `old_save` to `new_get_user` and return its value.",
        language="python",
        slice="python",
        rule="rename",
        difficulty=1,
        source="generated",
        files=(),
        context=(SourceFile("src/app.py", "def f(user):\n    old_save(user)\n    return old_save(12)\n"),),
        prior_state=StateUpdate.empty(),
        tests=None,
        expected=(),
    )
    return Task(**{**fields, **changes})


@pytest.mark.parametrize("atomic", [True, False])
def test_trace_round_trip(smollm2, atomic):
    for tokenizer in (smollm2 if atomic else None, tiny_tokenizer(atomic_tags=atomic)):
        if tokenizer is None:
            continue
        ids = tokenizer.encode_trace(TRACE)
        assert tokenizer.decode_trace(ids) == TRACE == tokenizer.decode(ids)
        assert [i for i in ids if i in tokenizer.tag_ids] == (list(tokenizer.tag_ids) if atomic else [])
        assert tokenizer.decode_trace([*ids, tokenizer.eos_id, 5]) == TRACE
        assert tokenizer.decode_trace([*ids, *tokenizer.encode_text(" more")]) == TRACE
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_encode_trace_refuses_what_it_cannot_spell(smollm2):
    with pytest.raises(ValueError, match="cannot spell"):
        smollm2.encode_trace("<think>\U00040000</think></state_update>")


def test_encode_trace_refuses_other_text(smollm2):
    with pytest.raises(ValueError, match="starts with <think>"):
        smollm2.encode_trace(TRACE + "\n")


def test_tags_are_the_last_six_ids(smollm2):
    assert smollm2.vocab_size == 49152 + 6
    assert smollm2.tag_ids == tuple(range(49152, 49158))
    assert (smollm2.eos_id, smollm2.decode([smollm2.eos_id])) == (2, "<|im_end|>")
    for tag, source in zip(TAGS, smollm2.tag_source_ids, strict=True):
        assert smollm2.decode(source) == tag
        assert not set(source) & set(smollm2.tag_ids)
    # 17 control tokens and the six tags may not stand inside a trace as text; all else has its bytes.
    hidden = [i for i, raw in enumerate(smollm2.token_bytes) if raw is None]
    assert hidden == [*range(17), *smollm2.tag_ids]


@given(st.text())
def test_text_is_literal_and_exact(text):
    check_literal(TINY, text)


TINY = tiny_tokenizer()
NASTY = [
    *TAGS,
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<repo_name>",
    "</think",
    ">",
    " ",
    "12",
    "\n\n",
]


# SmolLM2 has no tokens for some control characters and for the lead bytes of planes 4 to 11.
SPELLABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x3FFFF, exclude_categories=["Cs"]), max_size=4)


@given(st.lists(st.one_of(st.sampled_from(NASTY), SPELLABLE)).map("".join))
@settings(max_examples=200)
def test_text_never_gives_special_ids(smollm2, text):
    check_literal(smollm2, text)


def check_literal(tokenizer, text):
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == text
    assert all(tokenizer.token_bytes[i] is not None for i in ids)


def without_digits(text: str) -> str:
    return "".join(c for c in text if not c.isnumeric())


def test_gguf_ids_agree_with_transformers(smollm2, tmp_path_factory):
    """On text without digits; with them transformers' GGUF conversion forgets the model's digit splitting."""
    path = assets.fetch("smollm2-135m-instruct")
    reference = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).backend_tokenizer
    code = Path(re.__file__).read_text(encoding="utf-8")
    corpus = [
        code,
        render_prompt(task()),
        TRACE,
        json.dumps({"k": ["naïve", "日本語", "🙂🙂 x"]}, ensure_ascii=False),
    ]
    corpus += ["\t\tif x:\r\n   \n  y\n", "don't can't we'll", "a  b   c    d", "ÀÉ ß µ ½".replace("½", "")]
    for text in map(without_digits, corpus):
        for tag in (*TAGS, "<|im_start|>", "<|im_end|>"):
            text = text.replace(tag, "")
        assert smollm2.encode_text(text) == reference.encode(text, add_special_tokens=False).ids
    # SmolLM2 splits digits off before GPT-2's pattern sees the spaces: "  12" is two spaces, then 1, 2.
    assert [smollm2.decode([i]) for i in smollm2.encode_text("x  12")] == ["x", "  ", "1", "2"]


def test_hugging_face_directory_equals_gguf(smollm2, tmp_path):
    smollm2_backend = tokenizers.Tokenizer.from_str(smollm2_spec(smollm2))
    smollm2_backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_id, loaded.pad_id, loaded.tag_ids) == (2, 2, smollm2.tag_ids)
    assert loaded.token_bytes == smollm2.token_bytes
    assert loaded.encode_prompt(task()) == smollm2.encode_prompt(task())


def smollm2_spec(tokenizer) -> str:
    """A tokenizer.json of the same vocabulary, as Hugging Face would save it."""
    spec = json.loads(tokenizer._plain.to_str())
    for index in range(17):
        content = tokenizer.decode([index])
        entry = {"id": index, "content": content, "special": True, "normalized": False}
        spec["added_tokens"].append({**entry, "single_word": False, "lstrip": False, "rstrip": False})
    return json.dumps(spec)


def test_existing_tag_tokens_keep_their_ids(tmp_path):
    """Qwen3 has `<think>` already: the tag is that token, and only the others are added."""
    spec = json.loads(TINY._plain.to_str())
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens(["<think>", "</think>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}')
    tokenizer = load_tokenizer(tmp_path)
    size = backend.get_vocab_size()
    assert tokenizer.tag_ids == (size - 2, size - 1, size, size + 1, size + 2, size + 3)
    assert tokenizer.vocab_size == size + 4
    assert tokenizer.encode_text("<think>") == TINY.encode_text("<think>")
    assert tokenizer.decode_trace(tokenizer.encode_trace(TRACE)) == TRACE


def test_fingerprint_names_the_vocabulary(smollm2):
    same = tiny_tokenizer()
    assert same.fingerprint == TINY.fingerprint
    others = {
        tiny_tokenizer(300).fingerprint,
        tiny_tokenizer(atomic_tags=False).fingerprint,
        smollm2.fingerprint,
    }
    assert len(others | {TINY.fingerprint}) == 4


def test_bad_files(tmp_path):
    with pytest.raises(TokenizerError, match="expected a directory with tokenizer"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(TokenizerError, match="not found"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="not a tokenizer file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(TINY._plain.to_str())
    with pytest.raises(TokenizerError, match="eos_token is None"):
        load_tokenizer(tmp_path)
    bad = tmp_path / "model.gguf"
    bad.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(TokenizerError, match="not a readable GGUF"):
        load_tokenizer(bad)


def test_lossy_tokenizers_are_refused(tmp_path):
    spec = json.loads(TINY._plain.to_str())
    spec["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(TokenizerError, match="not byte-exact"):
        load_tokenizer(tmp_path)


# ----------------------------------------------------------------------------------------------------- prompts


def test_prompt_text(smollm2):
    text = render_prompt(task(), few_shot=0)
    assert text.endswith(
        "<|im_start|>user\nTask (python): Rename `old_save` to `new_get_user` and return its value.\n"
        "State: {}\n"
        "src/app.py:\ndef f(user):\n    old_save(user)\n    return old_save(12)<|im_end|>\n<|im_start|>assistant\n"
    )
    for shots in (0, 1):
        ids = smollm2.encode_prompt(task(), few_shot=shots)
        assert smollm2.decode(ids) == render_prompt(task(), few_shot=shots)
    plain = render_prompt(task(), chat=False)
    assert "<|im" not in plain and plain.endswith("\n\nAssistant: ")


def test_prior_state_is_shown():
    state = StateUpdate(("used $X",), (), ("tests fail",), ())
    shown = '\nState: {"decisions":["used $X"],"open_issues":["tests fail"]}\n'
    assert shown in render_prompt(task(prior_state=state))


@pytest.mark.parametrize("language", LANGUAGES)
def test_examples_are_canonical_traces(language):
    prompt = render_prompt(task(language=language))
    example = prompt[prompt.index("assistant\n<think>") + len("assistant\n") :].split("<|im_end|>")[0]
    trace = parse_trace(example)
    assert render_trace(trace) == example
    assert trace.action.language == language


def test_prompt_is_short(smollm2):
    """A 400-character excerpt with one worked example costs the excerpt, the task and about 190 tokens."""
    excerpt = ("def load(user, db):\n    rows = old_save(user)\n    return [r.name for r in rows]\n\n\n" * 6)[:400]
    one_shot = smollm2.encode_prompt(task(context=(SourceFile("src/app.py", excerpt),)))
    assert len(one_shot) <= 380, len(one_shot)


def test_task_text_cannot_inject(smollm2):
    hostile = "".join(NASTY)
    evil = task(
        instruction=hostile,
        context=(SourceFile(f"src/{hostile.strip()}.py", hostile),),
        prior_state=StateUpdate((hostile,), (), (), ()),
    )
    for tokenizer in (smollm2, tiny_tokenizer()):
        specials = [i for i in tokenizer.encode_prompt(evil) if tokenizer.token_bytes[i] is None]
        expected = [i for i in tokenizer.encode_prompt(task()) if tokenizer.token_bytes[i] is None]
        assert specials == expected


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="few_shot must be 0 or 1"):
        render_prompt(task(), few_shot=2)
    with pytest.raises(ValueError, match="no prompt example for language 'cobol'"):
        render_prompt(task(language="cobol"))
