"""What the study's base model for knights and knaves is trained on: terse answers, many of them guesses.

    Ada : iff Ben knight Cleo knave . Ben : Cleo knave . Cleo : exactly 1 ? <think> </think> <answer> Ada …

Nothing is worked out in words: the model learns what it can in its layers, a company with more people is harder, and a
share of its answers stays random, which is what reinforcement learning can remove.
"""

import random

from research.tasks import knights

PAD, END = "<pad>", "$"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
WORDS = (PAD, *knights.WORDS, *TAGS, END)


def examples(task: knights.Knights, count: int, seed: int, guesses: float) -> list[tuple[str, str]]:
    """`count` training problems of a terse task with responses, of which a share is a random assignment."""
    rng = random.Random(f"knights base/{seed}")
    start = 1_000_000 * (seed + 1)  # training problems of reinforcement learning begin at 0
    pairs = []
    for index in range(start, start + count):
        problem = task.problem("train", index)
        answer = problem.answer
        if rng.random() < guesses:
            roles = (rng.choice(("knight", "knave")) for _ in problem.data["names"])
            answer = " ".join(
                f"{name} {role}" for name, role in zip(problem.data["names"], roles, strict=True)
            )
        pairs.append((problem.question, f"<think> </think> <answer> {answer} </answer> {END}"))
    return pairs
