"""Documents and pairs as tokens: what is learned, what stands before it, what ends it."""

import numpy as np
import pytest

from research.lm.examples import Tokenize
from research.lm.tokenizer import EOS, Tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def parts(tokenizer, example):
    """(text not learned, text learned); the one must come before the other."""
    mask = example["loss_mask"]
    assert (np.diff(mask) >= 0).all() and example["tokens"].dtype == mask.dtype == np.int32
    split = int((mask == 0).sum())
    return tuple(tokenizer.decode(example["tokens"][s]) for s in (slice(split), slice(split, None)))


def test_documents_are_learned_whole_and_ended():
    tokenizer = Tokenizer.byte()
    tokenize = Tokenize(tokenizer)
    assert parts(tokenizer, tokenize({"text": "hello"})) == ("", "hello" + EOS)
    literal = tokenize({"text": "a" + EOS})  # written out in a text, it is text
    assert len(literal["tokens"]) == 1 + len(EOS) + 1
    assert (literal["tokens"] == tokenizer.eos_id).sum() == 1


def test_responses_are_learned_and_prompts_are_not():
    tokenizer = Tokenizer.byte(["<think>", "</think>"])
    example = Tokenize(tokenizer)({"prompt": "1 + 1 = ", "response": "<think>easy</think>2"})
    assert parts(tokenizer, example) == ("1 + 1 = ", "<think>easy</think>2" + EOS)
    assert tokenizer.token_id("<think>") in example["tokens"]
    ended = Tokenize(tokenizer)({"prompt": "q", "response": "a" + EOS})
    assert parts(tokenizer, ended) == ("q", "a" + EOS)  # not twice


def test_chat_prompts_go_through_the_template_and_reasoning_survives_it():
    tokenizer = Tokenizer.byte(chat_template=TEMPLATE)
    tokenize = Tokenize(tokenizer, chat=True)
    record = {"prompt": "1 + 1?", "response": "<think>easy</think>2"}
    assert parts(tokenizer, tokenize(record)) == (
        f"<user>1 + 1?{EOS}<assistant>",
        f"<think>easy</think>2{EOS}",
    )
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>easy</think>4"},
        {"role": "user", "content": "Sure?"},
    ]
    given, learned = parts(tokenizer, tokenize({"prompt": turns, "response": "Yes"}))
    assert given == (
        f"<system>Be brief.{EOS}<user>2 + 2?{EOS}<assistant>4{EOS}<user>Sure?{EOS}<assistant>"
    )
    assert learned == f"Yes{EOS}"


@pytest.mark.parametrize("opening", ["<think>", "<think>\n"])
def test_a_think_that_the_template_opens_is_opened_once(opening):
    template = TEMPLATE.replace("<assistant>", "<assistant>" + opening)
    tokenizer = Tokenizer.byte(chat_template=template)
    tokenize = Tokenize(tokenizer, chat=True)
    example = tokenize({"prompt": "q", "response": "<think>\nhm</think>a"})
    given, learned = parts(tokenizer, example)
    assert (given + learned).count("<think>") == 1
    assert given + learned == f"<user>q{EOS}<assistant><think>\nhm</think>a{EOS}"


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="no end token"):
        Tokenize(Tokenizer.byte(eos=None))
    with pytest.raises(ValueError, match="no chat template"):
        Tokenize(Tokenizer.byte(), chat=True)
    with pytest.raises(ValueError, match="needs chat=True"):
        Tokenize(Tokenizer.byte())({"prompt": [{"role": "user", "content": "q"}], "response": ""})
