"""The base data for tool use: results that are true and not learned, right textbook traces, kinds in their shares."""

import re

import numpy as np
import pytest

from research.reinforce_pp import tool_data
from research.rl.calculator import ToolError, calculate
from research.tasks import make
from research.tasks.base import held_out

TOKENIZER = tool_data.tokenizer()
TASK = make("tool_arithmetic", min_difficulty=1, max_difficulty=3)
CALL = re.compile(r"<tool>(.*?)</tool><result>(.*?)</result>")


@pytest.fixture(scope="module")
def texts():
    """(prompt, response with what is not learned in square brackets) of 300 textbook and 3000 noisy examples."""
    found = []
    for example in tool_data.examples(TOKENIZER, TASK, textbook=300, noise=3000, seed=1):
        tokens, mask = example["tokens"], example["loss_mask"]
        assert tokens.dtype == mask.dtype == np.int32 and len(tokens) == len(mask)
        cuts = np.flatnonzero(np.diff(mask)) + 1
        parts = [TOKENIZER.decode(part) for part in np.split(tokens, cuts)]
        assert not mask[0] and mask[-1]
        found.append((parts[0], "".join(f"[{x}]" if i % 2 else x for i, x in enumerate(parts[1:]))))
    return found


def test_results_are_the_calculator_s_and_are_not_learned(texts):
    for prompt, response in texts:
        assert re.fullmatch(r"[0-9()+*-]+=", prompt) and response.endswith("</answer><|endoftext|>")
        assert all(part.startswith("<result>") for part in re.findall(r"\[(.*?)\]", response))
        for call, result in CALL.findall(response.replace("[", "").replace("]", "")):
            try:
                assert result == calculate(call, operations=1)
            except ToolError as error:
                assert result == f"error: {error}"
        assert (
            response.count("[<result>") == response.count("<tool>") == response.count("</result>]")
        )


def right(prompt, response):
    return f"<answer>{eval(prompt.rstrip('='))}</answer>" in response


def test_the_textbook_is_right_and_the_noise_is_seldom(texts):
    assert all(right(*pair) for pair in texts[:300])
    noise = texts[300:]
    assert 0.08 < np.mean([right(*pair) for pair in noise]) < 0.16
    shares = {
        "guess": np.mean(["<tool>" not in response for _, response in noise]),
        "refused": np.mean(["too many operations" in response for _, response in noise]),
    }
    # A third of the problems has one operation: left out, nothing remains; all at once, it is right.
    mixture = tool_data.MIXTURE
    assert shares["guess"] == pytest.approx(mixture["guess"] + mixture["unfinished"] / 3, abs=0.04)
    assert shares["refused"] == pytest.approx(mixture["all at once"] * 2 / 3, abs=0.03)
    assert sum(mixture.values()) == pytest.approx(1)


def test_no_test_problem_is_among_them_and_the_seed_decides(texts):
    assert not any(held_out(f"tool_arithmetic: {prompt.rstrip('=')}") for prompt, _ in texts)
    mine, again, other = (
        [
            example["tokens"].tolist()
            for example in tool_data.examples(TOKENIZER, TASK, textbook=9, noise=9, seed=seed)
        ]
        for seed in (1, 1, 2)
    )
    assert mine == again
    assert sum(x == y for x, y in zip(mine, other, strict=True)) < 3
