"""Taking a completion apart: its reasoning, its answer, and whether it keeps to the format.

The format is DeepSeek-R1's: <think> reasoning </think> <answer> answer </answer> and nothing else.
"""

from research.tasks import Unparsed
from research.tasks.math_answers import last_boxed

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def well_formed(text: str, *, think_required: bool = True) -> bool:
    """Whether the text is one think block and then one answer block, and nothing else.

    Each tag occurs exactly once, only white space stands outside of the blocks, the answer is not
    empty, nor is the reasoning if `think_required`.
    """
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    places = [text.index(tag) for tag in TAGS]
    if places != sorted(places):
        return False
    before, think = text[: places[0]], text[places[0] + len(TAGS[0]) : places[1]]
    between, answer = text[places[1] + len(TAGS[1]) : places[2]], _answers(text)[0]
    after = text[places[3] + len(TAGS[3]) :]
    if before.strip() or between.strip() or after.strip() or not answer.strip():
        return False
    return bool(think.strip()) or not think_required


def tagged_answer(text: str) -> str | None:
    """What the <answer> block holds; None if there are different ones, which would be guessing.

    Blocks before the last </think> are reasoning and do not count.

    Raises Unparsed if there is no complete block, or one with another tag in it.
    """
    answers = {answer.strip() for answer in _answers(reply(text))}
    if not answers:
        raise Unparsed("no <answer> ... </answer>")
    if len(answers) > 1:
        return None
    (answer,) = answers
    if any(tag in answer for tag in TAGS):
        raise Unparsed(f"a tag within the answer: {answer[:60]!r}")
    return answer


def boxed_answer(text: str) -> str | None:
    r"""The last \boxed{} after the reasoning; None if there are different ones.

    Raises Unparsed if there is none.
    """
    return last_boxed(reply(text))


def reply(text: str) -> str:
    """What follows the reasoning: the text after the last </think>, or all of it without one."""
    return text.rpartition("</think>")[2]


def _answers(text: str) -> list[str]:
    blocks = text.split("<answer>")[1:]
    return [block.partition("</answer>")[0] for block in blocks if "</answer>" in block]
