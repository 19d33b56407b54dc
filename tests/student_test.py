"""What the student starts from: the rows of its new tokens."""

import jax
import numpy as np
import pytest

from data_pipeline.tasks.catalogue import CATALOGUE
from data_pipeline.tasks.generated import generate
from srl_jax import assets
from srl_jax.bench.tags import closing_chance
from srl_jax.model import hf
from srl_jax.model.decoder import Decoder
from srl_jax.sampling import sample
from srl_jax.student import pad_prompts, prompt_width, tag_rows
from srl_jax.tokenizer import load_tokenizer
from tests.tiny_tokenizer import tiny_tokenizer


def test_a_tags_row_is_its_first_piece_and_a_share_of_its_own_name():
    tokenizer = tiny_tokenizer()
    rows = tag_rows(tokenizer)
    assert set(rows) == set(tokenizer.added_tag_ids) == set(tokenizer.tag_ids)
    others = [piece for ids in tokenizer.tag_source_ids for piece in ids[1:]]
    for tag, ids in zip(tokenizer.tag_ids, tokenizer.tag_source_ids, strict=True):
        assert sum(rows[tag].values()) == pytest.approx(1.0625)
        for piece in set(ids) | set(others):
            own = ids[1:].count(piece) / len(ids[1:]) - others.count(piece) / len(others)
            assert rows[tag][piece] == pytest.approx(1.0625 * ((piece == ids[0]) + 0.25 * own))
    assert len({tuple(sorted(mix.items())) for mix in rows.values()}) == 6


def test_a_tag_the_vocabulary_knows_keeps_its_row():
    class Known:
        tag_ids, added_tag_ids = (7, 8), (8,)
        tag_source_ids = ((1, 2), (3, 4))

    assert tag_rows(Known()) == {8: {3: 1.0625, 2: pytest.approx(-0.1328125), 4: pytest.approx(0.1328125)}}


def test_the_untrained_model_closes_its_thought_with_the_tag_as_with_the_text():
    path = assets.fetch("smollm2-135m-instruct")
    drafts = [generate(rule, 0, seed=0, max_excerpt=400) for rule in CATALOGUE[::8]]
    chances = {}
    for atomic in (True, False):
        tokenizer = load_tokenizer(path, atomic_tags=atomic)
        config, params = hf.load_params(path, new_rows=tag_rows(tokenizer))
        cases = [(tokenizer.encode_prompt(draft.task), draft.think) for draft in drafts]
        chances[atomic], greedy = closing_chance(Decoder(config), params, tokenizer, cases)
        if atomic:
            assert greedy.mean() > 0.5, "greedy decoding must close with the tag, not spell it"
    assert 0.5 < chances[True].mean() / chances[False].mean() < 2.0, chances


@pytest.mark.parametrize("limit", [1, 100, 128, 192, 384, 600, 1000, 1024, 4096])
def test_prompts_are_padded_to_one_of_few_widths(limit):
    widths = [prompt_width([[0], [0] * length], limit) for length in range(1, limit + 1)]
    assert len(set(widths)) <= 4 and widths == sorted(widths)
    assert all(length <= width <= limit for length, width in enumerate(widths, start=1))
    assert all(width % 128 == 0 or width == limit for width in widths)
    assert max(width - length for length, width in enumerate(widths, start=1)) < limit / 4 + 128


def test_a_shorter_width_changes_no_token(student, lora):
    """What lies behind a prompt is not seen, so the same prompts padded to 128 and to 192 are answered alike."""
    prompts = [[5 + i, 7, 11 * i, 13][: 2 + i % 3] for i in range(4)]
    drawn = []
    for width in (128, 192):
        tokens, lengths = pad_prompts(prompts, width, student.tokenizer.pad_id)
        drawn.append(
            sample(
                student.decoder, student.sampling_variables(lora), student.automaton, tokens, lengths,
                jax.random.key(0), group_size=2, settings=student.sampling, pad_id=student.tokenizer.pad_id,
            )
        )  # fmt: skip
    np.testing.assert_array_equal(drawn[0].tokens, drawn[1].tokens)
    np.testing.assert_allclose(drawn[0].logprobs, drawn[1].logprobs, atol=1e-5)
