"""Rollouts: prompts and grading, metrics by hand, and packing that keeps every token exactly once."""

import jax
import numpy as np
import pytest

from research.lm.packing import pack
from research.lm.sampler import Completions, Sampling
from research.lm.tokenizer import Tokenizer
from research.rewards import RewardConfig, Rewarder, Status
from research.rl import rollout
from research.tasks import Problem

WORDS = ("<pad>", *"0123456789", "+2", "+3", "=", "what", "is", "wait", "?", "$")
TOKENIZER = Tokenizer.words(WORDS, pad="<pad>", eos="$")
STOP = TOKENIZER.eos_id


class FakeSampler:
    """Answers prompt i, sample s with `texts[i][s]`; a text without the end token was cut off."""

    def __init__(self, texts, max_prompt=8):
        self.texts, self.max_prompt, self.calls = texts, max_prompt, []

    def __call__(self, params, prompts, key, sampling, *, num_samples, prompt_ids):
        noise = jax.random.key_data(key).tolist()
        self.calls.append((prompts, list(prompt_ids), num_samples, noise))
        rows = [TOKENIZER.encode(text) for texts in self.texts for text in texts]
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.zeros((len(rows), max(lengths)), np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        logprobs = -np.arange(1, tokens.size + 1, dtype=np.float32).reshape(tokens.shape)
        stopped = np.array([row[-1] == STOP for row in rows])
        return Completions(tokens, lengths, logprobs, logprobs, stopped)


class Sums:
    """`what is 4 +2` for problems 0 to 4 of the test split; the others have no words."""

    name, isolated = "sums", None

    def size(self, split):
        return 5 if split == "test" else None

    def problem(self, split, index):
        question = f"{index % 5} +2" if split == "train" else f"what is {index} +2"
        return Problem(f"sums/{split}/{index}", question, str(index + 2), difficulty=index % 2)

    def quick(self, problem, answer):
        return self.canonical(problem, answer) == problem.answer

    verify = quick

    def canonical(self, problem, answer):
        return str(int(answer)) if answer.isdigit() else answer


def make_actor(texts, template="{question} =", max_prompt=8, **reward):
    config = RewardConfig(answer_from="text", **reward)
    return rollout.Actor(
        FakeSampler(texts, max_prompt), TOKENIZER, Rewarder(config, Sums()), template
    )


def act(actor, problems, group_size, **options):
    options = {"seed": 0, **options}
    return actor({}, problems, jax.random.key(0), Sampling(8), group_size, **options)


# Sampling and grading.


def test_responses_are_graded_without_their_end_token_and_in_their_problem_s_group():
    problems = [Sums().problem("train", i) for i in (1, 4)]
    actor = make_actor([["3 $", "4 $", "3"], ["6 $", "3 $", "? $"]])
    episodes = act(actor, problems, 3, first=10)
    ((prompts, ids, count, _),) = actor.sampler.calls
    assert [TOKENIZER.decode(p) for p in prompts] == ["1 +2 =", "4 +2 ="]
    assert (ids, count) == ([10, 11], 3)
    assert episodes.texts == ["3", "4", "3", "6", "3", "?"]
    right = [r.status == Status.RIGHT for r in episodes.rewards]
    assert right == [True, False, True, True, False, False]
    assert episodes.of_problem(right).tolist() == [[True, False, True], [True, False, False]]
    samples = episodes.samples()
    assert samples.truncated.tolist() == [[False, False, True], [False] * 3]
    assert samples.lengths.tolist() == [[2, 2, 1], [2, 2, 2]]  # with the end token


def test_metrics_of_a_rollout_by_hand():
    problems = [Sums().problem("test", 1), Sums().problem("test", 4)]
    texts = [["3 $", "wait wait 3 $"], ["6", "7 $"]]
    metrics = act(make_actor(texts), problems, 2).metrics()
    expected = {
        "reward/mean": 2 / 4,  # nothing is in format; 'wait wait 3' is no answer of the task
        "reward/accuracy": 2 / 4,
        "reward/format": 0.0,
        "status/right": 2 / 4,
        "rollout/pass@1": 2 / 4,
        "rollout/pass@2": 1.0,
        "rollout/cons@2": 0.5,
        "rollout/length": (2 + 4 + 1 + 2) / 4,
        "rollout/length/correct": 1.5,
        "rollout/length/wrong": 3.0,
        "rollout/truncated": 1 / 4,
        "rollout/reflection/words": 2 / 4,
        "rollout/reflection/wait": 1 / 4,
        "rollout/difficulty/1": 0.5,
        "rollout/difficulty/0": 0.5,
        "rollout/language": 1 / 4,  # one thought has words, all of the question's script
    }
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)
    without_words = act(make_actor(texts), [Sums().problem("train", i) for i in (1, 4)], 2)
    assert "rollout/language" not in without_words.metrics()


def test_records_hold_what_happened():
    problem = Sums().problem("test", 1)
    good, cut = act(make_actor([["3 $", "5"]]), [problem], 2).records()
    assert good["question"] == "what is 1 +2" and good["answer"] == "3"
    assert (good["response"], good["length"], good["stopped"]) == ("3", 2, True)
    assert (good["reward"], good["status"]) == (1.0, "right")
    assert (cut["response"], cut["length"], cut["stopped"], cut["status"]) == (
        "5",
        1,
        False,
        "wrong",
    )


def test_prompts_follow_the_template_and_the_chat_template():
    problem = Sums().problem("train", 1)
    assert make_actor([], "what is {question} ?").prompt(problem) == "what is 1 +2 ?"
    chat = Tokenizer.words(
        WORDS, pad="<pad>", eos="$", chat_template="{{ messages[0].content }} is wait"
    )
    actor = rollout.Actor(FakeSampler([]), chat, None, "{question} =", chat=True)
    assert actor.prompt(problem) == "1 +2 = is wait"
    with pytest.raises(ValueError, match="no '{question}' in it"):
        make_actor([], "what is it?")


def test_prompts_that_do_not_fit_are_refused_by_name():
    task = Sums()
    make_actor([], max_prompt=5).check(task, "test", 5)
    with pytest.raises(
        ValueError, match="test problem sums/test/0 has a prompt of 5 .* max_prompt is 4"
    ):
        make_actor([], max_prompt=4).check(task, "test", 5)
    make_actor([], max_prompt=3).check(task, "train")
    with pytest.raises(ValueError, match="sums has 5 test problems, 6 are asked for"):
        make_actor([]).check(task, "test", 6)


def test_evaluation_is_over_the_first_problems_with_noise_of_its_own():
    actor = make_actor([["2 $", "3 $"], ["3 $", "3 $"]])
    settings = {"problems": 2, "samples": 2, "sampling": Sampling(8)}
    figures, episodes = rollout.evaluate(actor, {}, Sums(), **settings, seed=3)
    assert figures["pass@1"] == 3 / 4 and figures["pass@2"] == 1.0
    assert [p.id for p in episodes.problems] == ["sums/test/0", "sums/test/1"]
    rollout.evaluate(actor, {"other": 1}, Sums(), **settings, seed=3)
    rollout.evaluate(actor, {}, Sums(), **settings, seed=4)
    first, again, other = (noise for *_, noise in actor.sampler.calls)
    assert first == again != other
    assert first != jax.random.key_data(jax.random.key(3)).tolist()  # which training uses
    with pytest.raises(ValueError, match="5 test problems, 6 are asked for"):
        rollout.evaluate(actor, {}, Sums(), problems=6, samples=1, sampling=Sampling(8), seed=0)


# Packing.


def random_episodes(rng, prompts, group_size, longest_prompt, longest_response):
    count = prompts * group_size
    lengths = rng.integers(1, longest_response + 1, count).astype(np.int32)
    cells = np.arange(longest_response) < lengths[:, None]
    tokens = np.where(cells, rng.integers(1, 1000, cells.shape), 0).astype(np.int32)
    logprobs = np.where(cells, -rng.random(cells.shape), 0).astype(np.float32)
    starts = [
        rng.integers(1000, 2000, rng.integers(1, longest_prompt + 1)).astype(np.int32)
        for _ in range(prompts)
    ]
    done = rng.random(count) < 0.8
    completions = Completions(tokens, lengths, logprobs, logprobs, done)
    return rollout.Episodes([], starts, completions, [], [], group_size)


def unpack(batch, device_rows):
    """Every packed sequence, as a dict of arrays with the row that it lies in."""
    found = []
    for row in range(len(batch["tokens"])):
        segments = batch["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            cells = np.flatnonzero(segments == segment)
            assert np.array_equal(cells, np.arange(cells[0], cells[-1] + 1))
            sequence = {k: v[row, cells] for k, v in batch.items() if k != "num_micro"}
            found.append(sequence | {"row": row % device_rows, "device": row // device_rows})
    return found


@pytest.mark.parametrize("devices, micro_rows", [(1, 1), (2, 3), (8, 2)])
def test_each_response_is_packed_exactly_once(devices, micro_rows):
    rng = np.random.default_rng(devices)
    for _ in range(10):
        group_size = int(rng.integers(1, 5))
        episodes = random_episodes(rng, 6, group_size, 9, 14)
        order = rng.permutation(6 * group_size)[: int(rng.integers(1, 6 * group_size + 1))]
        advantages = rng.normal(size=(6 * group_size, 14)).astype(np.float32)
        weights = rng.random(6 * group_size).astype(np.float32)
        row_length = int(rng.integers(23, 60))
        capacity = rollout.rows_needed(len(order), 23, row_length, devices, micro_rows)
        batch = rollout.minibatches(
            episodes, order, {"advantages": advantages}, weights,
            row_length=row_length, capacity=capacity, devices=devices, micro_rows=micro_rows,
        )  # fmt: skip
        assert batch["tokens"].shape == (devices * capacity, row_length)
        assert batch["num_micro"].shape == (devices,) and capacity % micro_rows == 0
        sequences = unpack(batch, capacity)
        assert len(sequences) == len(order)
        left = {
            tuple(episodes.prompts[r // group_size]) + tuple(episodes.completions.sequences[r]): r
            for r in order
        }
        for sequence in sequences:
            response = left.pop(tuple(sequence["tokens"]))
            before = len(episodes.prompts[response // group_size])
            after = len(sequence["tokens"]) - before
            assert np.array_equal(sequence["positions"], np.arange(before + after))
            logprobs = episodes.completions.logprobs[response, :after]
            for key, value in (
                ("weights", np.full(after, weights[response])),
                ("advantages", advantages[response, :after]),
                ("sampler_logprobs", logprobs),
            ):
                assert not sequence[key][:before].any()
                assert np.array_equal(sequence[key][before:], value)
            # Only the first num_micro micro-batches of a device are computed.
            assert sequence["row"] < batch["num_micro"][sequence["device"]] * micro_rows
        assert not left
        for key in ("weights", "tokens", "sampler_logprobs"):
            assert not batch[key][batch["segment_ids"] == 0].any()
        used = {(s["device"], s["row"]) for s in sequences}
        per_device = np.bincount([device for device, _ in used], minlength=devices)
        assert per_device.max() - per_device.min() <= 1  # so that no device waits


def lengths_to_pack(rng, longest):
    """Random lengths, and the ones that are hard on a bound."""
    count = int(rng.integers(1, 200))
    kinds = [
        rng.integers(1, longest + 1, count),
        np.full(count, longest),
        np.full(count, longest // 2 + 1),
        np.full(count, longest // 3 + 1),
        np.where(rng.random(count) < 0.5, longest, 1),
        np.maximum(1, (longest * rng.beta(0.3, 0.3, count)).astype(int)),
    ]
    return np.minimum(kinds[rng.integers(len(kinds))], longest)


def test_the_rows_needed_are_always_enough():
    rng = np.random.default_rng(0)
    spare = []
    for _ in range(2000):
        row_length = int(rng.integers(4, 200))
        longest = int(rng.integers(2, row_length + 1))
        lengths = lengths_to_pack(rng, longest)
        devices, micro_rows = int(rng.integers(1, 9)), int(rng.integers(1, 6))
        capacity = rollout.rows_needed(len(lengths), longest, row_length, devices, micro_rows)
        used = -(-pack(lengths, row_length).num_rows // devices)
        assert used <= capacity
        assert capacity % micro_rows == 0
        if lengths.min() == longest:  # the worst case: no more than it needs, but for rounding
            spare.append(capacity - -(-used // micro_rows) * micro_rows)
    assert max(spare) == 0 and len(spare) > 100
    with pytest.raises(ValueError, match="row_length 10 is shorter than .* 11"):
        rollout.rows_needed(4, 11, 10, 1, 1)
