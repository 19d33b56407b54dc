"""Text to token ids and back, with the six trace tags as single tokens, and the prompt of a task.

Two rules hold everywhere. Text that a user or a model wrote (instructions, file contents, think text) is encoded
*without* special tokens: a file that contains ``</think>`` or ``<|im_end|>`` gives ordinary text tokens, never the
special ids, so that it cannot close a block or a chat turn. And ids stand for exact bytes (`Tokenizer.token_bytes`),
because the grammar masks tokens by their bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from srl_jax.trace import STOP, TAGS, Action, StateUpdate, Trace, render_state, render_trace

if TYPE_CHECKING:
    from srl_jax.records import Task

CHAT_MARKERS = ("<|im_start|>", "<|im_end|>")
_TAG_PATTERN = re.compile("(" + "|".join(map(re.escape, TAGS)) + ")")


class TokenizerError(ValueError):
    """A tokenizer file that is missing, damaged or of a kind that cannot be used here."""


@dataclass(frozen=True)
class Special:
    """A piece of a prompt that stands for a special token (a tag or a chat marker), not for its text."""

    text: str


# ----------------------------------------------------------------------------------------------- the tokenizer


class Tokenizer:
    """A `tokenizers` tokenizer plus the six tags.

    With `atomic_tags` the tags are single ids at the end of the vocabulary (a tag the vocabulary already holds
    as an added token keeps its id); without, they are ordinary text and `tag_ids` is empty.

    Attributes:
      vocab_size: number of ids, added tags included; logits are [..., vocab_size].
      tag_ids: ids in the order of `trace.TAGS`, or () when tags are plain text.
      added_tag_ids: those of `tag_ids` that the vocabulary did not hold: the model knows nothing of them yet.
      tag_source_ids: per tag, the ids of its plain text form; a model initialises a tag's embedding row from them.
      eos_id, pad_id: padding may share the id of the end token, so mask by length, never by id.
      token_bytes: per id the bytes it stands for; None for special, control and unused ids, which never stand
        inside a trace as text.
      has_chat_markers: whether prompts are ChatML or plain text.
      fingerprint: SHA-256 hex of everything that decides the meaning of an id.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, eos_id: int, pad_id: int, atomic_tags: bool = True):
        spec = json.loads(backend.to_str())
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self._plain = _without_added_tokens(spec)
        size = max(max(backend.get_vocab(with_added_tokens=True).values()) + 1, eos_id + 1, pad_id + 1)
        self._special_ids = {marker: added[marker] for marker in CHAT_MARKERS if marker in added}
        self.has_chat_markers = len(self._special_ids) == len(CHAT_MARKERS)
        self.tag_ids: tuple[int, ...] = ()
        own = frozenset(added)
        if atomic_tags:
            for tag in TAGS:
                if tag not in added:
                    added[tag] = size
                    size += 1
                self._special_ids[tag] = added[tag]
            self.tag_ids = tuple(added[tag] for tag in TAGS)
        self.added_tag_ids = tuple(added[tag] for tag in TAGS if tag in added and tag not in own)
        self._spec = spec
        self.vocab_size = size
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.token_bytes: list[bytes | None] = _bytes_of_tokens(spec, size, hidden=set(added.values()))
        self._text_of_special = {token_id: text for text, token_id in added.items()}
        self.tag_source_ids = tuple(tuple(self.encode_text(tag)) for tag in TAGS)
        self.fingerprint = hashlib.sha256(
            json.dumps([spec, self.tag_ids, eos_id, pad_id, size], sort_keys=True).encode()
        ).hexdigest()
        _check_lossless(self)

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text` taken literally: no special ids, whatever the text spells."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode(self, text: str) -> list[int]:
        """Ids of trusted text: tags become tag ids (when atomic), the rest is literal text."""
        if not self.tag_ids:
            return self.encode_text(text)
        return self.encode_pieces(_with_tags(text))

    def encode_trace(self, trace_text: str) -> list[int]:
        """Ids of a canonical trace, `<think>` first and `</state_update>` last.

        Raises:
          ValueError: when the text does not start and end with those tags, or holds characters that this vocabulary
            cannot spell (SmolLM2 has no tokens for six control characters and for
            the bytes 0xF1 and 0xF2; its encoder drops what needs them).
        """
        if not (trace_text.startswith(TAGS[0]) and trace_text.endswith(STOP)):
            raise ValueError(f"a canonical trace starts with {TAGS[0]} and ends with {STOP}: {trace_text[:80]!r}")
        ids = self.encode(trace_text)
        if self.decode(ids) != trace_text:
            raise ValueError(f"this vocabulary cannot spell the trace {trace_text[:200]!r}")
        return ids

    def encode_pieces(self, pieces: Iterable[str | Special]) -> list[int]:
        """Ids of a mix of literal text and special tokens; neighbouring texts are joined before encoding.

        A special token that this vocabulary lacks is encoded as its text.
        """
        ids: list[int] = []
        pending = ""
        for piece in pieces:
            if isinstance(piece, str):
                pending += piece
            elif piece.text in self._special_ids:
                ids += self.encode_text(pending)
                ids.append(self._special_ids[piece.text])
                pending = ""
            else:
                pending += piece.text
        return ids + self.encode_text(pending)

    def encode_prompt(self, task: Task, *, few_shot: int = 1) -> list[int]:
        """Ids of `render_prompt(task)`, the task's own text encoded without special tokens."""
        return self.encode_pieces(prompt_pieces(task, few_shot=few_shot, chat=self.has_chat_markers))

    def encode_conversation(self, messages: Iterable[tuple[str, str]]) -> list[int]:
        """Ids of a conversation of (role, text), up to the opened assistant turn; see `conversation_pieces`."""
        return self.encode_pieces(conversation_pieces(messages, chat=self.has_chat_markers))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens as their text; bytes that are not UTF-8 become U+FFFD."""
        raw = b"".join(self._bytes_or_text(int(token_id)) for token_id in ids)
        return raw.decode("utf-8", errors="replace")

    def decode_trace(self, ids: Sequence[int]) -> str:
        """Text of a completion up to and including the first `</state_update>`, or up to the end token."""
        text = ""
        kept = list(map(int, ids))
        if self.eos_id in kept:
            kept = kept[: kept.index(self.eos_id)]
        text = self.decode(kept)
        stop = text.find(STOP)
        return text if stop < 0 else text[: stop + len(STOP)]

    def save(self, directory: Path) -> None:
        """Writes `tokenizer.json`, tags included, and `tokenizer_config.json`: what transformers loads.

        There, unlike here, a tag in any text becomes the tag's id.
        """
        texts = {token_id: text for text, token_id in self._spec["model"]["vocab"].items()} | self._text_of_special
        tags = [
            {"id": i, "content": texts[i], "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": False}
            for i in self.added_tag_ids
        ]  # fmt: skip
        text = json.dumps({**self._spec, "added_tokens": [*self._spec["added_tokens"], *tags]}, ensure_ascii=False)
        backend = tokenizers.Tokenizer.from_str(text)
        for i in self.added_tag_ids:
            if backend.token_to_id(texts[i]) != i:
                raise TokenizerError(
                    f"tag {texts[i]} has id {i}, which tokenizer.json cannot express: the vocabulary has unused ids "
                    "before it; train with model.atomic_tags=False to export this model"
                )
        names = {"eos_token": texts[self.eos_id], "pad_token": texts[self.pad_id]}
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (directory / "tokenizer.json").write_text(text, encoding="utf-8")
        (directory / "tokenizer_config.json").write_text(json.dumps(kind | names, ensure_ascii=False, indent=1))

    def _bytes_or_text(self, token_id: int) -> bytes:
        raw = self.token_bytes[token_id]
        if raw is not None:
            return raw
        return self._text_of_special.get(token_id, "").encode()


def _without_added_tokens(spec: dict) -> tokenizers.Tokenizer:
    """The same tokenizer, blind to special and added tokens: it cannot produce their ids from text."""
    bare = {**spec, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return tokenizers.Tokenizer.from_str(json.dumps(bare))


def _byte_of_character() -> dict[str, int]:
    """GPT-2's map from the printable stand-ins of byte-level BPE to bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


def _bytes_of_tokens(spec: dict, size: int, hidden: set[int]) -> list[bytes | None]:
    """Bytes of each id; None for the ids in `hidden` and for holes in the vocabulary."""
    vocab = spec["model"]["vocab"]
    if not isinstance(vocab, dict):
        raise TokenizerError(f"tokenizer model {spec['model'].get('type')!r} is not supported; BPE is")
    byte_level = "ByteLevel" in json.dumps(spec["decoder"])
    table = _byte_of_character()
    result: list[bytes | None] = [None] * size
    for token, token_id in vocab.items():
        if token_id in hidden:
            continue
        if byte_level:
            if all(character in table for character in token):
                result[token_id] = bytes(table[character] for character in token)
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            result[token_id] = bytes([int(token[3:5], 16)])
        else:
            result[token_id] = token.replace("\u2581", " ").encode()
    return result


def _check_lossless(tokenizer: Tokenizer) -> None:
    """Refuse tokenizers whose ids do not spell the exact bytes of the text (added spaces, unknown tokens)."""
    probe = 'def F(x):\n    return {"naïve": x[0] - 12}  # 🙂 <b>\\d+$</b>\ttab\n'
    spelled = tokenizer.decode(tokenizer.encode_text(probe))
    if spelled != probe:
        raise TokenizerError(
            f"tokenizer is not byte-exact: {probe!r} came back as {spelled!r}; use a byte-level BPE tokenizer"
        )


# ------------------------------------------------------------------------------------------------------ loading


def load_tokenizer(path: str | Path, *, atomic_tags: bool = True) -> Tokenizer:
    """Tokenizer of a Hugging Face directory (with `tokenizer.json`) or of a GGUF file. Needs no network, no torch.

    Raises:
      TokenizerError: naming the file, what is wrong with it and what would be right.
    """
    path = Path(path)
    if path.is_dir():
        return _load_directory(path, atomic_tags)
    if path.suffix == ".gguf" and path.is_file():
        return _load_gguf(path, atomic_tags)
    raise TokenizerError(f"{path}: expected a directory with tokenizer.json, or a .gguf file")


def _load_directory(path: Path, atomic_tags: bool) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise TokenizerError(f"{file}: not found; save the tokenizer in the fast format (tokenizer.json)")
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust extension raises bare Exception on bad files
        raise TokenizerError(f"{file}: not a tokenizer file: {error}") from error
    names = {}
    config_file = path / "tokenizer_config.json"
    if config_file.is_file():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        for field in ("eos_token", "pad_token"):
            value = config.get(field)
            names[field] = value["content"] if isinstance(value, dict) else value
    eos_token = names.get("eos_token")
    eos_id = None if eos_token is None else backend.token_to_id(eos_token)
    if eos_id is None:
        raise TokenizerError(f"{config_file}: eos_token is {eos_token!r}; name the token that ends a text")
    pad_token = names.get("pad_token")
    pad_id = None if pad_token is None else backend.token_to_id(pad_token)
    return Tokenizer(backend, eos_id=eos_id, pad_id=eos_id if pad_id is None else pad_id, atomic_tags=atomic_tags)


# How llama.cpp's names of pre-tokenizers are spelled in `tokenizers`. "smollm" splits digits one by one
# *before* GPT-2's pattern; transformers' own GGUF conversion leaves that out and differs on "  1".
_GGUF_PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
}
_GGUF_NORMAL = 1


def _load_gguf(path: Path, atomic_tags: bool) -> Tokenizer:
    import gguf  # costs 0.3 s and is needed for this format only

    try:
        fields = gguf.GGUFReader(str(path)).fields
    except (ValueError, IndexError, OSError) as error:
        raise TokenizerError(f"{path}: not a readable GGUF file: {error}") from error

    def value(key: str):
        if f"tokenizer.ggml.{key}" not in fields:
            raise TokenizerError(f"{path}: metadata tokenizer.ggml.{key} is missing")
        return fields[f"tokenizer.ggml.{key}"].contents()

    kind, pre = value("model"), value("pre")
    if kind != "gpt2" or pre not in _GGUF_PRE_TOKENIZERS:
        raise TokenizerError(
            f"{path}: GGUF tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported (gpt2 with "
            f"{sorted(_GGUF_PRE_TOKENIZERS)} is); load the model from a directory with tokenizer.json"
        )
    tokens = value("tokens")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in value("merges")],
        )
    )
    backend.pre_tokenizer = _GGUF_PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, value("token_type"), strict=True) if kind != _GGUF_NORMAL]
    backend.add_special_tokens(special)
    eos_id = int(value("eos_token_id"))
    pad_key = "tokenizer.ggml.padding_token_id"
    pad_id = int(fields[pad_key].contents()) if pad_key in fields else eos_id
    return Tokenizer(backend, eos_id=eos_id, pad_id=pad_id, atomic_tags=atomic_tags)


# ------------------------------------------------------------------------------------------------------ prompts

_SYSTEM = (
    "Write one ast-grep rule: <think>why</think> <action>JSON</action> <state_update>JSON</state_update>. "
    "$X matches one node, $$$ARGS many."
)


@dataclass(frozen=True)
class _Example:
    """What differs between the worked examples: names as the language spells them."""

    path: str
    old: str
    new: str
    code: str


_EXAMPLES = {
    "python": _Example("db.py", "get_row", "load_row", "row = get_row(key)"),
    "javascript": _Example("db.js", "getRow", "loadRow", "row = getRow(key);"),
    "typescript": _Example("db.ts", "getRow", "loadRow", "row = getRow(key);"),
    "tsx": _Example("db.tsx", "getRow", "loadRow", "row = getRow(key);"),
    "java": _Example("Db.java", "getRow", "loadRow", "row = getRow(key);"),
}


def _worked_example(language: str) -> tuple[str, list[str | Special]]:
    """The request and the answer of the one example, which moves the state on as every step should."""
    if language not in _EXAMPLES:
        raise ValueError(f"no prompt example for language {language!r}; known: {', '.join(_EXAMPLES)}")
    example = _EXAMPLES[language]
    path, old, new = example.path, example.old, example.new
    before = StateUpdate((), (), (), (f"edit {path}", "run tests"))
    after = StateUpdate((f"rename {old} to {new}",), (), (), ("run tests",))
    action = Action(language, f"{old}($X)", f"{new}($X)", (path,))
    think = f"{old} became {new}; keep the argument."
    answer = render_trace(Trace(think, action, after))
    request = _request(language, f"Rename `{old}` to `{new}`", before, [(path, example.code)])
    return request, _with_tags(answer)


def _with_tags(text: str) -> list[str | Special]:
    """Trusted text with its tags as special tokens."""
    return [Special(part) if part in TAGS else part for part in _TAG_PATTERN.split(text)]


def _request(language: str, instruction: str, state: StateUpdate, files: Iterable[tuple[str, str]]) -> str:
    shown = "".join(f"\n{path}:\n{text.strip(chr(10))}" for path, text in files)
    filled = {name: items for name, items in json.loads(render_state(state)).items() if items}
    state_json = json.dumps(filled, ensure_ascii=False, separators=(",", ":"))
    return f"Task ({language}): {instruction.strip()}\nState: {state_json}{shown}"


def prompt_pieces(task: Task, *, few_shot: int = 1, chat: bool = True) -> list[str | Special]:
    """The prompt as literal text and special tokens; see `render_prompt`."""
    if few_shot not in (0, 1):
        raise ValueError(f"few_shot must be 0 or 1, not {few_shot}")

    turn = partial(_turn, chat)
    pieces = turn("system", *_with_tags(_SYSTEM))
    if few_shot:
        request, answer = _worked_example(task.language)
        pieces += turn("user", request) + turn("assistant", *answer)
    files = [(file.path, file.text) for file in task.context]
    pieces += turn("user", _request(task.language, task.instruction, task.prior_state, files))
    return pieces + _opening(chat)


def conversation_pieces(messages: Iterable[tuple[str, str]], *, chat: bool = True) -> list[str | Special]:
    """(role, text) turns as `prompt_pieces` renders its own: tags are special but in what a user says."""
    pieces: list[str | Special] = []
    for role, text in messages:
        pieces += _turn(chat, role, *([text] if role == "user" else _with_tags(text)))
    return pieces + _opening(chat)


def _turn(chat: bool, role: str, *content: str | Special) -> list[str | Special]:
    if chat:
        return [Special("<|im_start|>"), f"{role}\n", *content, Special("<|im_end|>"), "\n"]
    return [f"{role.capitalize()}: ", *content, "\n\n"]


def _opening(chat: bool) -> list[str | Special]:
    """The assistant's turn, to be written."""
    return [Special("<|im_start|>"), "assistant\n"] if chat else ["Assistant: "]


def render_prompt(task: Task, *, few_shot: int = 1, chat: bool = True) -> str:
    """The prompt's text: what to answer, `few_shot` (0 or 1) worked examples, instruction, prior state, excerpts.

    ChatML, ending with the opened assistant turn; with `chat=False` plain text turns for other vocabularies.
    """
    return "".join(
        piece if isinstance(piece, str) else piece.text for piece in prompt_pieces(task, few_shot=few_shot, chat=chat)
    )
