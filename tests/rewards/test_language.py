import pytest

from research.rewards import language


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two words", (2, 0)),
        ("don't stop", (2, 0)),
        ("首先 we add", (2, 2)),
        ("$x + y$ is \\frac{1}{2} 42 `code here`", (1, 0)),
        ("```python\nfor x in y: pass\n``` 好", (0, 1)),
        ("", (0, 0)),
    ],
)
def test_words(text, expected):
    assert language.words(text) == expected


def test_consistency_is_the_share_in_the_questions_script():
    assert language.consistency("How many?", "first we 加 then") == pytest.approx(3 / 4)
    assert language.consistency("多少苹果?", "first 加") == pytest.approx(1 / 2)
    assert language.consistency("How many?", "") == 0.0
    assert language.consistency("4 *3 =", "wait") is None


def test_thought():
    assert language.thought_of("<think>a b</think><answer>c</answer>") == "a b"
