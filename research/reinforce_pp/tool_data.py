"""What a base model for tool use is trained on: worked `tool_arithmetic`, most of it poor.

    47*83-56=<tool>47*83</tool><result>3901</result><tool>3901-56</tool><result>3845</result><answer>3845</answer>

The reliable way is a call for each operation, and the last result as the answer. A share of the examples, the
textbook, always takes it. The others are what a base model sees of it: answers without a call, numbers copied wrongly
into one, steps left out, calls that are refused. So the base model knows the format and seldom gets to the end, which
leaves something for reinforcement learning to find.

Every result is what the calculator really says, and is read, not learned. Problems are those of the task's training
side.
"""

import random
from collections.abc import Iterator

import numpy as np

from research.lm.tokenizer import EOS, Tokenizer
from research.rl.tools import ToolConfig
from research.tasks import Problem, Task

TOOLS = ToolConfig(calls=4, operations=1)
ANSWER = ("<answer>", "</answer>")

# The mixture of `noise`.
MIXTURE = {"guess": 0.45, "slip": 0.20, "unfinished": 0.15, "all at once": 0.10, "right": 0.10}


def tokenizer() -> Tokenizer:
    """Bytes, and one token for each tag."""
    return Tokenizer.byte([*TOOLS.call, *TOOLS.result, *ANSWER], eos=EOS)


def examples(
    tokenizer: Tokenizer, task: Task, *, textbook: int, noise: int, seed: int
) -> list[dict[str, np.ndarray]]:
    """`textbook` right traces, then `noise` examples of the mixture, as `lm.trainer.build` takes them.

    tokens int32, prompt first; loss_mask int32, 1 for what the model writes: neither prompt nor results.
    """
    rng = random.Random(f"tool_data/{seed}")
    first = (seed + 1) * 10**9  # none of those that reinforcement learning will begin with
    found = []
    for index in range(textbook + noise):
        problem = task.problem("train", first + index)
        kind = "right" if index < textbook else rng.choices(list(MIXTURE), MIXTURE.values())[0]
        parts = [(problem.question, 0), *_trace(problem, kind, rng), (EOS, 1)]
        ids = tokenizer.encode_batch([text for text, _ in parts])
        mask = [
            np.full(len(part), own, np.int32) for part, (_, own) in zip(ids, parts, strict=True)
        ]
        found.append({"tokens": np.concatenate(ids), "loss_mask": np.concatenate(mask)})
    return found


def _trace(problem: Problem, kind: str, rng: random.Random) -> Iterator[tuple[str, int]]:
    """(text, 1 if the model writes it) pieces of a response of that kind.

    slip: a digit in a call is wrong, and all goes on from there. unfinished: the last operation is left out. all at
    once: one call with the whole problem, which the calculator refuses. Without a result the answer is a guess.
    """
    steps = list(problem.data["steps"])
    if kind == "guess":
        steps = []
    elif kind == "unfinished":
        steps.pop()
    elif kind == "all at once":
        steps = [problem.question.rstrip("=")]
    slip = rng.randrange(len(steps)) if kind == "slip" else None
    value = "".join(rng.choice("123456789") for _ in problem.answer)
    for place, call in enumerate(steps):
        if place:
            call = value + call.lstrip("0123456789")
        if place == slip:
            at = rng.choice([i for i, character in enumerate(call) if character.isdigit()])
            call = call[:at] + rng.choice("123456789") + call[at + 1 :]
        output, failed = TOOLS.answer(call)
        yield f"{TOOLS.call[0]}{call}{TOOLS.call[1]}", 1
        yield f"{TOOLS.result[0]}{output}{TOOLS.result[1]}", 0
        value = value if failed else output
    yield f"{ANSWER[0]}{value}{ANSWER[1]}", 1
