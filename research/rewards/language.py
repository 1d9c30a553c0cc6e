"""Language consistency of a chain of thought: the share of its words in the question's language.

DeepSeek-R1's R_lang (v2 eq. 7) is #words in the target language / #words; the paper does not say what a word is. Here a
CJK character is a word, and so is a run of letters of the Latin script; code, formulas and numerals are no words.
"""

import re

_NO_WORDS = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\[a-zA-Z]+|<[^<>\n]*>",
    re.S,
)
_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]+(?:['\u2019-][A-Za-z\u00c0-\u024f]+)*")


def words(text: str) -> tuple[int, int]:
    """(words in Latin script, words in CJK characters) of a text."""
    text = _NO_WORDS.sub(" ", text)
    return len(_LATIN.findall(text)), len(_CJK.findall(text))


def consistency(question: str, thought: str) -> float | None:
    """Share of the thought's words that are in the question's script, 0 to 1.

    0 for a thought without words; None if the question has no words, and so no language.
    """
    latin, cjk = words(question)
    if latin + cjk == 0:
        return None
    thought_latin, thought_cjk = words(thought)
    total = thought_latin + thought_cjk
    if total == 0:
        return 0.0
    return (thought_latin if latin >= cjk else thought_cjk) / total


def thought_of(completion: str) -> str:
    """What stands before `</think>`, or the whole text without one; tags left out."""
    return completion.partition("</think>")[0].replace("<think>", "")
