"""Format and extraction, above all what is not well formed."""

import pytest

from research.rewards import completion
from research.tasks import Unparsed

GOOD = "<think> 2 and 2 </think> <answer> 4 </answer>"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "<think>x</think><answer>y</answer>",
        "\n<think>\na\nb\n</think>\n\n<answer>\n4\n</answer>\n",
        "<think>a < b, <b>bold</b> \\boxed{5}</think><answer>\\boxed{4}</answer>",
    ],
)
def test_well_formed(text):
    assert completion.well_formed(text)
    assert completion.well_formed(text, think_required=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "<answer> 4 </answer>",
        "<think> x </think> 4",
        "<think> x <answer> 4 </answer>",
        "<think> x </think> <answer> 4",
        "<think> x </think> 4 </answer>",
        "x </think> <answer> 4 </answer>",
        GOOD + " so 4",
        GOOD + GOOD,
        "Sure! " + GOOD,
        "<think> x </think> and so <answer> 4 </answer>",
        "<answer> 4 </answer> <think> x </think>",
        "</think> x <think> <answer> 4 </answer>",
        "<think> x <answer> 4 </answer> </think>",
        "<think> x <think> y </think> </think> <answer> 4 </answer>",
        "<think> x </think> <answer> <answer> 4 </answer> </answer>",
        "<think> x </think> <answer> 4 </answer> </answer>",
        "<think> x </think> <answer> 4 </answer> <answer> 5 </answer>",
        "<think> x </think> <answer> <think> 4 </answer>",
        "<think> x <answer> </think> 4 </answer>",
        "<think> x </think> <answer>  </answer>",
        "<Think> x </Think> <answer> 4 </answer>",
        "<think > x </think> <answer> 4 </answer>",
    ],
)
def test_out_of_format(text):
    assert not completion.well_formed(text)
    assert not completion.well_formed(text, think_required=False)


def test_empty_reasoning_counts_only_if_it_is_not_required():
    for text in ("<think></think><answer>4</answer>", "<think> \n </think> <answer> 4 </answer>"):
        assert not completion.well_formed(text)
        assert completion.well_formed(text, think_required=False)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (GOOD, "4"),
        ("<answer>4</answer>", "4"),
        ("<think> <answer>5</answer> </think> <answer>4</answer>", "4"),
        ("<think> a </think> b </think> <answer> 4 </answer> and more", "4"),
        ("<answer>4</answer> <answer> 4 </answer>", "4"),
        ("<answer>4</answer> <answer>5", "4"),
        ("<answer> <answer> 4 </answer> </answer>", "4"),
        ("<answer>4</answer> <answer>5</answer>", None),
        ("<answer>3</answer> 4 <answer>5</answer> <answer>3</answer>", None),
        ("<answer></answer>", ""),
    ],
)
def test_the_answer_is_in_the_answer_block(text, answer):
    assert completion.tagged_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "<answer> 4",
        "4 </answer>",
        "<think> <answer>4</answer> </think>",
        "<answer> <think> 4 </answer>",
        "</answer> 4 <answer>",
    ],
)
def test_there_is_no_answer(text):
    with pytest.raises(Unparsed):
        completion.tagged_answer(text)


def test_boxes_in_the_reasoning_do_not_count():
    text = r"<think> \boxed{1}, \boxed{2}? </think> It is \boxed{3}."
    assert completion.boxed_answer(text) == "3"
    assert completion.boxed_answer(r"\boxed{1} or \boxed{2}") is None
    with pytest.raises(Unparsed):
        completion.boxed_answer(r"<think> \boxed{1} </think> 1")
