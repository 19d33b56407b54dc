"""Ways through episodes: each its own files and state, returns against the group's, and a batch of fixed shape."""

import contextlib
import dataclasses
import itertools
import shutil
import sys
import warnings
from collections import Counter
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

import launch.train as entry
from data_pipeline.load import make_episodes
from data_pipeline.tasks.catalogue import rule_named
from data_pipeline.tasks.generated import generate
from srl_jax import chains, grpo
from srl_jax import run as run_module
from srl_jax.chains import EpisodeTooLong, collect_episodes, walk
from srl_jax.compiles import count_compiles
from srl_jax.config import ConfigError, read_config, validate
from srl_jax.episodes import Chain
from srl_jax.groups import Groups
from srl_jax.metrics import is_timing
from srl_jax.rollout import NOT_ASKED, executable_only
from srl_jax.run import Run
from srl_jax.sandbox import Sandbox, SandboxConfig, SandboxCrash
from srl_jax.sandbox.service import RewardService
from srl_jax.steps import step_settings, take_step
from srl_jax.student import Student
from srl_jax.trace import StateUpdate, parse_trace, render_trace
from srl_jax.train_step import TrainState, current_scores, make_optimizer, train_step
from tests.data_load_episodes_test import generated_episodes, record, write_data
from tests.episodes_test import an_episode, state, trace
from tests.fakes import HashEmbedder, perturbed, tiny_config
from tests.rollout_test import MALFORMED, UNSCORED, Scripted
from tests.train_test import saved, trajectory
from tests.updates_test import rows as flat

P, G, S, WIDTH = 2, 2, 3, 384


def config_of(**grpo):
    """Two ways through each of two episodes of at most three steps."""
    config = tiny_config()
    config.data.prompts_per_step, config.data.max_prompt_tokens = P, WIDTH
    config.grpo.group_size, config.grpo.micro_batch, config.grpo.episode_steps = G, 2, S
    config.grpo.returns, config.grpo.kl_coef, config.grpo.dynamic_sampling_min_std = "episode", 0.0, 0.0
    for name, value in grpo.items():
        setattr(config.grpo, name, value)
    validate(config)
    return config


def episodes():
    """Of three steps and of two, for ever."""
    return itertools.cycle([an_episode("long"), an_episode("short", steps=2)])


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(SandboxConfig(slots=2)) as opened:
        yield opened


def collect(student, lora, service, sandbox, config=None, **options):
    config = config or config_of()
    return collect_episodes(
        student, lora, episodes(), jax.random.key(3), service, sandbox, config, step_settings(config), **options
    )


class Given(Scripted):
    """These scores, one after the other: of each step's ways in the order of rows."""

    size = 1

    def __init__(self, *scores):
        super().__init__(lambda number: (scores[number],))


def by_place(array):
    """[S, G, P] of an array in the order of rows."""
    return np.asarray(array).reshape(S, G, P)


def scripted(said, asked):
    """Stands for `sample_groups`: way i answers step n as `said[i][n]`; `asked` gets the records and prompts."""

    def sample(student, variables, records, prompts, key, service, *, asked_rows, number, **options):
        asked.append((records, prompts))
        texts = [said[i][number] for i in range(len(records))]
        scores = [UNSCORED if live else NOT_ASKED for live in asked_rows]
        return Groups(records, [[text] for text in texts], [[score] for score in scores], {})

    steps = itertools.count()
    return lambda *given, asked, **options: sample(*given, asked_rows=asked, number=next(steps), **options)


def go(student, sandbox, monkeypatch, said, config=None):
    """Each way's own answers through an episode of three steps; the chains, what came of them, what was asked."""
    asked = []
    monkeypatch.setattr(chains, "sample_groups", scripted(said, asked))
    config = config or config_of()
    ways = [Chain.begin(an_episode()) for _ in said]
    key, settings = jax.random.key(0), step_settings(config)
    return ways, walk(student, student.fresh_lora(0), ways, key, None, sandbox, config, settings, Counter()), asked


def forgetful(step):
    return dataclasses.replace(parse_trace(trace(step)), state=StateUpdate(("I forgot",), (), (), ()))


def test_every_way_goes_on_from_its_own_files_and_state(student, sandbox, monkeypatch):
    teacher = [trace(step) for step in (1, 2, 3)]
    broad = render_trace(forgetful(1)).replace("src/m1.py", "src/*.py")
    said = [teacher, ["no trace", *teacher[1:]], [broad, *teacher[1:]], [trace(1, pattern="gone($X)"), *teacher[1:]]]
    _, walked, asked = go(student, sandbox, monkeypatch, said)
    tasks = [record.task for record in asked[1][0]]
    given = [record.task for record in an_episode()]
    files = [{file.path: file.text for file in task.files} for task in tasks]
    start = {file.path: file.text for file in given[0].files}
    right = {file.path: file.text for file in given[1].files}
    assert files[0] == right and files[1] == files[3] == start, "what does not apply leaves the files"
    assert all("return new(1)" in files[2][f"src/m{n}.py"] for n in (1, 2, 3))
    assert tasks[2].context[0].text != given[1].context[0].text, "and the prompt shows it"
    assert [task.prior_state for task in tasks] == [
        state(1),
        state(0),
        StateUpdate(("I forgot",), (), (), ()),
        state(1),
    ]
    for records, prompts in asked:
        assert prompts == [student.tokenizer.encode_prompt(record.task, few_shot=0) for record in records]
    assert len({tuple(prompt) for prompt in asked[1][1]}) == 3 and len({tuple(prompt) for prompt in asked[0][1]}) == 1
    assert walked.asked.all() and walked.lost == 0
    # Of the eight that a step follows, the malformed one, the strange pattern and the broad way's second did not.
    assert walked.applied == pytest.approx(5 / 8)


def test_a_sampled_state_comes_back_in_the_next_prompt(student, lora, sandbox):
    with RewardService(HashEmbedder(), lambda text: len(text.split())) as service:
        config = config_of()
        ways = [Chain.begin(steps) for _ in range(G) for steps in itertools.islice(episodes(), P)]
        walked = walk(
            student, lora, ways, jax.random.key(1), service, sandbox, config, step_settings(config), Counter()
        )
    assert walked.applied == 0.0, "the tiny model changes no file"
    for number, way in itertools.product((1, 2), range(G * P)):
        if number < len(ways[way].steps):
            own = parse_trace(walked.texts[number - 1][way]).state
            task = dataclasses.replace(ways[way].steps[number].task, prior_state=own)
            ids = student.tokenizer.encode_prompt(task, few_shot=0)
            length = walked.arrays[number]["prompt_lengths"][way]
            assert walked.arrays[number]["prompt_tokens"][way, :length].tolist() == ids
    assert walked.asked.tolist() == [[True] * 4, [True] * 4, [True, False] * 2]
    assert walked.scores[2][1] == NOT_ASKED and not walked.arrays[2]["mask"][1].any()
    assert len(set(walked.texts[0])) == 4, "ways through one episode draw differently"


class Breaking:
    """Fails to apply what the first way says to its first step, whatever is tried; `apply` of the real one is above."""

    config = SandboxConfig(slots=2)

    def __init__(self, real):
        self.real, self.tries = real, 0

    def apply(self, action, files, **options):
        if action.pattern == "return odd($X)":
            self.tries += 1
            raise SandboxCrash("killed from outside")
        return self.real.apply(action, files, **options)


def test_a_way_that_cannot_go_on_ends_there(student, sandbox, monkeypatch):
    breaking = Breaking(sandbox)
    long = dataclasses.replace(
        parse_trace(trace(1)), state=StateUpdate(tuple(f"{n} " + "word " * 50 for n in range(9)), (), (), ())
    )
    rest = [trace(2), trace(3)]
    said = [[trace(1, pattern="return odd($X)"), *rest], [render_trace(long), *rest], [trace(1), *rest]]
    _, walked, _ = go(student, breaking, monkeypatch, said)
    assert breaking.tries == 3 and walked.lost == 2
    assert walked.asked.tolist() == [[True] * 3, [False, False, True], [False, False, True]]
    everyone = [[render_trace(long)] * 3] * 2
    assert go(student, sandbox, monkeypatch, everyone)[1].asked.shape == (1, 2), "nothing is sampled for nobody"


# Rewards by step, each of long and short for the first way, then for the second; the last step is of long alone.
REWARDS = (0.1, 0.5, 0.3, 0.6, 0.2, 0.5, 0.2, 0.5, 0.4, 0.0)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        # long: returns (.3, .4, .4) and (.4, .2, 0); short: (.75, .5) and (.85, .5), whose last step is tied.
        ({"discount": 0.5}, [[-0.05, 0.05], [0.1, -0.1], [0.2, -0.2], [-0.05, 0.05], [0, 0]]),
        ({"discount": 0.5, "returns": "n"}, [[-0.1, 0.1], [0.1, -0.1], [0.2, -0.2], [-0.05, 0.05], [0, 0]]),
        ({}, [[0.1, -0.1], [0.2, -0.2], [0.2, -0.2], [-0.05, 0.05], [0, 0]]),
        ({"discount": 0.5, "scale": "std"}, [[-1, 1], [1, -1], [1, -1], [-1, 1], [0, 0]]),
        ({"discount": 0.0, "baseline": "none"}, [[0.1, 0.3], [0.2, 0.2], [0.4, 0.0], [0.5, 0.6], [0.5, 0.5]]),
    ],
)
def test_a_step_has_the_credit_of_what_follows(student, lora, sandbox, settings, wanted):
    rollout = collect(student, lora, Given(*REWARDS), sandbox, config_of(**settings))
    got = by_place(rollout.batch.advantages[:, 0])
    long, short = got[:, :, 0], got[:2, :, 1]
    np.testing.assert_allclose(np.concatenate([long, short]), wanted, atol=1e-6)
    live = by_place(np.asarray(rollout.batch.completion_mask).any(axis=(1, 2)))
    assert not live[2, :, 1].any() and live[:, :, 0].all(), "the short episode has no third step"
    metrics = rollout.metrics
    assert [metrics[f"reward/step{n}"] for n in (1, 2, 3)] == pytest.approx([0.375, 0.35, 0.2])
    assert metrics["episode/steps"] == 2.5 and metrics["groups_drawn"] == 5 and metrics["return/unknown"] == 0
    assert metrics["reward/total"] == pytest.approx(sum(REWARDS) / 10) and metrics["unscored"] == 0
    if settings == {"discount": 0.5}:
        returns = (0.3, 0.4, 0.4, 0.4, 0.2, 0.0, 0.75, 0.5, 0.85, 0.5)
        assert metrics["return/mean"] == pytest.approx(sum(returns) / 10)
        assert metrics["return/group_std"] == pytest.approx((0.05 + 0.1 + 0.2 + 0.05 + 0.0) / 5)
        assert metrics["kept_groups"] == 0.8, "tied returns teach nothing"


KL_COEF, DISCOUNT, HORIZON, CAP = 0.3, 0.5, 2, 1.02


@pytest.fixture(scope="module")
def walked(student, lora, sandbox):
    """Ways through both episodes, gone by a sampler that has forgotten the adapters, so that it is not the trainer."""
    kept = []
    real = chains.walk
    forgetful = mock.patch.object(Student, "sampling_variables", lambda self, lora: {"params": self.params})
    with forgetful, mock.patch.object(chains, "walk", lambda *given: kept.append(real(*given)) or kept[0]):
        collect(student, lora, Given(*REWARDS), sandbox)
    return kept[0]


@pytest.fixture(scope="module")
def moved(lora):
    """Another policy than the one at the start of the update, so that ratios show."""
    return perturbed(lora, scale=0.3, seed=4)


def returns_by_hand(kind):
    """Returns and the steps that are trained on, [S, G, P]: P is the long episode and the short one of two steps."""
    given = iter(REWARDS)
    rewards = np.array([[[next(given) if s < (3, 2)[p] else np.nan for p in range(P)] for _ in range(G)]
                        for s in range(S)])  # fmt: skip
    returns = np.zeros_like(rewards)
    for s in range(S):
        for k in range(HORIZON if kind == "n" else S):
            if s + k < S:
                returns[s] += DISCOUNT**k * np.nan_to_num(rewards[s + k])
    differ = np.abs(returns[:, :1] - returns[:, 1:]) > 1e-6  # of two members; tied ones teach nothing
    return returns, ~np.isnan(rewards) & differ


def scores(student, adapters, batch):
    """Log-probs of a policy, the reference's, and the exact KL, [rows, T], 0 where nothing is trained."""
    bare = batch._replace(token_weights=None, ref_logprobs=None)
    settings = step_settings(config_of())
    found = current_scores(student.decoder, student.params, adapters, student.automaton, bare, settings=settings)
    names = {"logprobs": found.logprobs, "ref": found.ref_logprobs, "kl": found.kl}
    return {name: np.where(flat(batch.completion_mask), flat(values), 0.0) for name, values in names.items()}


def divergence(kind, scores, d, ratio=1.0):
    estimates = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}
    return scores["kl"] if kind == "exact" else ratio * estimates[kind]


@pytest.mark.parametrize(
    ("returns", "kind", "placement", "cap"),
    [
        ("episode", "exact", "reward", 0.0),
        ("n", "exact", "reward", CAP),
        ("episode", "k2", "reward", CAP),
        ("n", "k3", "loss", CAP),
        ("episode", "exact", "loss", 0.0),
    ],
)
def test_the_loss_of_episodes_by_hand(student, lora, moved, walked, monkeypatch, returns, kind, placement, cap):
    """Returns, advantages, weights and the loss again in plain numpy, from the arrays that the model gives."""
    config = config_of(
        returns=returns, discount=DISCOUNT, horizon=HORIZON, kl_coef=KL_COEF, kl_estimator=kind, kl_placement=placement,
        importance_cap=cap,
    )  # fmt: skip
    monkeypatch.setattr(chains, "walk", lambda *given: walked)
    batch = collect(student, lora, None, None, config).batch
    expected, live = returns_by_hand(returns)
    mask, each = flat(batch.completion_mask), lambda x: np.asarray(x).reshape(S, G, P)
    np.testing.assert_array_equal(each(mask.any(-1)), live)

    at_start = scores(student, lora, batch)
    sampler = at_start["ref"]  # the base sampled
    old = at_start["logprobs"] if cap else sampler
    weights = np.minimum(np.exp(at_start["logprobs"] - sampler), cap) if cap else np.ones_like(sampler)
    advantages = expected - expected.mean(axis=1, keepdims=True)
    if placement == "reward":
        values = divergence(kind, at_start, old - at_start["ref"])
        k = each((values * mask).sum(-1) / np.maximum(mask.sum(-1), 1))
        advantages = advantages - KL_COEF * (k - k.mean(axis=1, keepdims=True))
        assert np.ptp(k) > 1e-3
    advantages = np.where(live, advantages, 0.0)
    np.testing.assert_allclose(each(batch.advantages), advantages, atol=2e-5)
    np.testing.assert_allclose(flat(batch.old_logprobs)[mask], old[mask], atol=2e-5)
    if cap:
        np.testing.assert_allclose(flat(batch.token_weights)[mask], weights[mask], atol=2e-5)
        assert (weights[mask] == cap).any() and (weights[mask] < cap).any(), "some weights are cut and some are not"
    assert (batch.token_weights is None) == (not cap)
    if placement == "reward":  # whose loss is the usual surrogate of these
        return

    now = scores(student, moved, batch)
    ratio, gain = np.exp(now["logprobs"] - old), advantages.reshape(-1, 1)
    surrogate = np.minimum(ratio * gain, np.clip(ratio, 0.8, 1.2) * gain) * weights
    # As elsewhere the weights are the surrogate's alone.
    kl = divergence(kind, now, now["logprobs"] - at_start["ref"], ratio)
    optimizer, _ = make_optimizer(1e-2, steps=10, schedule="constant")
    placed = student.place_lora(jax.tree.map(np.asarray, moved))
    state = TrainState(jnp.int32(0), placed, optimizer.init(placed), jax.random.key_data(jax.random.key(0)))
    _, metrics = train_step(
        state, student.params, student.automaton, batch, jnp.float32(KL_COEF),
        decoder=student.decoder, optimizer=optimizer, settings=step_settings(config),
    )  # fmt: skip
    assert float(metrics["kl_loss"]) == pytest.approx(kl[mask].mean(), abs=5e-5) and kl[mask].mean() > 1e-3
    assert float(metrics["loss"]) == pytest.approx((KL_COEF * kl - surrogate)[mask].mean(), abs=5e-5)
    assert metrics["grad_norm"] > 0 and metrics["skipped"] == 0


@pytest.mark.parametrize("cap", [0.5, 0.99])
def test_a_cap_under_every_weight_is_refused(cap):
    with pytest.raises(ConfigError, match=r"config.grpo.importance_cap = .*: must be 0 \(off\) or at least 1"):
        config_of(importance_cap=cap)
    config_of(importance_cap=1.0)


def test_what_is_not_known_of_a_return_is_not_trained_on(student, lora, sandbox):
    # The second way's second step of the long episode has no reward: its first step reaches it, its third does not.
    rewards = [*REWARDS[:6], UNSCORED, *REWARDS[7:]]
    rollout = collect(student, lora, Given(*rewards), sandbox, config_of(discount=0.5, baseline="none"))
    live = by_place(np.asarray(rollout.batch.completion_mask).any(axis=(1, 2)))
    assert live[:, 1, 0].tolist() == [False, False, True] and live[:, 0, 0].all() and live[:2, :, 1].all()
    assert rollout.metrics["return/unknown"] == 2 and rollout.metrics["unscored"] == 1
    near = collect(student, lora, Given(*rewards), sandbox, config_of(discount=0.0, baseline="none"))
    live = by_place(np.asarray(near.batch.completion_mask).any(axis=(1, 2)))
    assert live[:, 1, 0].tolist() == [True, False, True], "a discount of 0 reaches nothing"


def test_a_malformed_step_counts_for_those_before_it_and_is_not_pushed_itself(student, lora, sandbox):
    rewards = [*REWARDS[:6], MALFORMED, *REWARDS[7:]]
    rollout = collect(student, lora, Given(*rewards), sandbox, config_of())
    got = by_place(rollout.batch.advantages[:, 0])[:, :, 0]
    # Returns (.7, .6, .4) and (.1, -.2, 0).
    np.testing.assert_allclose(got, [[0.3, -0.3], [0.4, 0.0], [0.2, -0.2]], atol=1e-6)


def test_episodes_of_one_step_are_steps(student, lora, sandbox):
    rewards = np.asarray([[0.1, 0.7], [0.2, 0.4]], np.float32)  # of two prompts, two members each
    alone = (an_episode(name, steps=1) for name in ("a", "b"))
    config = config_of(episode_steps=1)
    key, settings = jax.random.key(0), step_settings(config)
    ways = collect_episodes(student, lora, alone, key, Given(*rewards.T.ravel().tolist()), sandbox, config, settings)
    np.testing.assert_array_equal(ways.batch.advantages.reshape(G, P).T, grpo.group_advantages(rewards))
    assert ways.metrics["return/group_std"] == pytest.approx(ways.metrics["reward/group_std"])


def test_room_for_more_steps_changes_nothing(student, lora, sandbox):
    found = [
        collect(student, lora, Given(*REWARDS), sandbox, config_of(episode_steps=steps)).batch for steps in (S, S + 2)
    ]
    rows = found[0].completions.shape[0]
    assert found[1].completions.shape[0] == rows + 2 * G * P and not np.asarray(found[1].completion_mask)[rows:].any()
    for few, many in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(few, many[:rows])


def test_episodes_that_do_not_fit_are_left_out(student):
    config = config_of(episode_steps=2)
    drawn, skipped = chains.take_episodes(student, episodes(), config)
    assert [len(steps) for steps in drawn] == [2, 2] and skipped == 2
    with pytest.raises(
        EpisodeTooLong, match=r"the last: 3 steps.*raise grpo.episode_steps=2 or data.max_prompt_tokens"
    ):
        chains.take_episodes(student, itertools.repeat(an_episode()), config)
    needs_node = [dataclasses.replace(record, task=dataclasses.replace(record.task, tests=dataclasses.replace(
        record.task.tests, runner="node"))) for record in an_episode()]  # fmt: skip
    mixed = itertools.cycle([needs_node, an_episode("ours")])
    taken = list(itertools.islice(executable_only(mixed, frozenset({"unittest"}), list), 2))
    assert [steps[0].task.episode.episode_id for steps in taken] == ["ours", "ours"]


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("grpo.baseline", "value", "must be 'group' or 'none' with grpo.returns='episode', or grpo.returns='step'"),
        ("grpo.scale", "components", "must be 'none' or 'std' with"),
        ("grpo.credit", "blocks", "must be 'trace' with"),
        ("grpo.teacher_in_group", True, "must be False with"),
        ("grpo.max_extra_rollouts", 1, "must be 0 with"),
        ("grpo.micro_batch", 3, r"must divide data.prompts_per_step \* grpo.group_size = 6: one of \[1, 2, 3, 6\]"),
        ("replay.record", True, "must be 'step' with replay.record"),
        ("method", "sft", "must be 'step' with method 'sft'"),
        ("method", "replay", "must be 'step' with method 'replay'"),
        ("grpo.discount", 1.5, "at most 1"),
        ("grpo.horizon", 0, "at least 1"),
        ("grpo.returns", "all", "one of step, n, episode"),
    ],
)
def test_what_does_not_go_with_episodes_is_refused(field, value, remedy):
    config = config_of()
    config.grpo.group_size = 3
    config.grpo.micro_batch = 6
    *section, name = field.split(".")
    setattr(config.__dict__[section[0]] if section else config, name, 4 if name == "micro_batch" else value)
    with pytest.raises(ConfigError, match=remedy):
        validate(config)


@contextlib.contextmanager
def parts_at_hand(student):
    """Spares a run loading its model, which is this module's, and the embedder; `train_test` loads both."""
    load = lambda config, mesh: student
    with mock.patch.multiple(run_module, load_embedder=HashEmbedder, load_student=load):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, student):
    """Two steps of `launch/train.py` on generated episodes, in the real sandbox; the data's directory and the run's."""
    folder = tmp_path_factory.mktemp("episodes")
    made = generated_episodes(6)
    held_out = [record(generate(rule_named("python-rename-method"), 0, 0, 180))]
    rows = [row for steps in made for row in steps]
    write_data(folder / "data", {"train": {"python/episodes": rows}, "test": {"python/generated": held_out}})
    settings = {
        "grpo.returns": "episode", "grpo.discount": 0.9, "grpo.episode_steps": S, "grpo.group_size": G,
        "grpo.dynamic_sampling_min_std": 0.0, "data.dir": folder / "data", "data.prompts_per_step": P,
        "data.max_prompt_tokens": WIDTH, "sampling.max_new_tokens": 72, "sampling.max_think_tokens": 8, "steps": 2,
        "optim.learning_rate": 0.01, "eval.max_tasks": 1, "eval.batch_size": 1, "checkpoint.every": 1, "mesh.data": 1,
        "lora.alpha": 8.0,
    }  # fmt: skip
    arguments = ["--config=configs/tiny.py", *(f"--config.{name}={value}" for name, value in settings.items())]
    command = ["launch/train.py", *arguments, f"--workdir={folder / 'run'}"]
    with warnings.catch_warnings(), mock.patch.object(sys, "argv", command):  # ml_collections looks there for overrides
        warnings.filterwarnings("ignore", "the load_module")  # and reads recipes so
        flags.FLAGS(command)
        with parts_at_hand(student):
            assert entry.main() == 0
    return folder / "data", folder / "run"


def test_a_run_on_episodes_trains(trained):
    steps = trajectory(trained[1])
    assert [step["step"] for step in steps] == [1, 2] and all(step["skipped"] == 0 for step in steps)
    for step in steps:
        assert 2 <= step["episode/steps"] <= S and step["episode/applied"] is not None and step["unscored"] == 0
        assert step["reward/step1"] is not None and step["return/mean"] > step["reward/total"]
        assert step["logprob_gap"] < 1e-4 and step["parse_rate"] == 1.0 and step["episode/lost"] == 0
    assert abs(steps[0]["kl"]) < 1e-5 < abs(steps[1]["kl"])
    assert (trained[1] / "report.md").exists()


@pytest.fixture
def resumed(trained, student, tmp_path):
    """The run as its first checkpoint left it, and the stream where it was then."""
    data, whole = trained
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    config = read_config(whole)
    with parts_at_hand(student), Run(config, tmp_path / "run") as run:
        step, position = run.resume()
        assert step == 1
        stream = make_episodes(data, "train", seed=config.seed, batch_size=P)
        stream.set_state(position)
        yield run, stream


def test_it_goes_on_bit_for_bit_and_empty_rows_do_not_matter(trained, resumed):
    run, stream = resumed
    config, student = run.config, run.student
    metrics = take_step(run, stream, 1, None).metrics
    untimed = {name: value for name, value in metrics.items() if not is_timing(name)}
    assert untimed == {name: trajectory(trained[1])[1][name] for name in untimed}
    run.save(2, stream.get_state())
    run.wait()
    ours, theirs = saved(run.workdir, 2), saved(trained[1], 2)
    assert ours.keys() == theirs.keys() and len(ours) > 40
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)

    settings = step_settings(config)
    ways = iter([an_episode("a"), an_episode("b", steps=2), an_episode("c", steps=1), an_episode("d", steps=2)])
    given = (student, run.state.lora, ways, jax.random.key(5), run.rewards, run.sandbox, config, settings)
    batch = collect_episodes(*given).batch
    with count_compiles() as compiled:
        collect_episodes(*given)
    assert compiled.count == 0, "episodes of other lengths have the same shapes"
    empty = ~np.asarray(batch.completion_mask).any(axis=(1, 2))
    assert by_place(empty).tolist() == [[[False] * P] * G] * 2 + [[[False, True]] * G]
    told = []
    for other in (False, True):
        rows = np.where(other & empty, 0, np.arange(len(empty)))  # those of the first row in their place
        changed = batch._replace(
            completions=batch.completions[rows], old_logprobs=batch.old_logprobs[rows],
            prompt_tokens=batch.prompt_tokens[rows], prompt_lengths=batch.prompt_lengths[rows],
        )  # fmt: skip
        state = jax.tree.map(lambda x: x.copy(), run.state)
        after, metrics = train_step(
            state, student.params, student.automaton, changed, jnp.float32(0.0),
            decoder=student.decoder, optimizer=run.optimizer, settings=settings,
        )  # fmt: skip
        told.append((after.lora, float(metrics["loss"]), float(metrics["grad_norm"])))
    assert told[0][1:] == told[1][1:] and told[0][2] > 0
    for one, two in zip(jax.tree.leaves(told[0][0]), jax.tree.leaves(told[1][0]), strict=True):
        np.testing.assert_array_equal(one, two)
