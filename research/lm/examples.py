"""Records of text → examples of tokens: what a language model learns from a document or a pair."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from research.lm.tokenizer import Tokenizer

_THINK = "<think>"


@dataclass(frozen=True)
class Tokenize:
    """`tokenize(record) -> {'tokens': int32 [n], 'loss_mask': int32 [n]}`; picklable.

    A document ({'text'}) is learned whole, with the begin and end tokens the model was published
    with and always an end token. Special tokens written out in it stay text.

    A pair ({'prompt', 'response'}) is learned on the response and the end token after it. Prompt
    and response are tokenized apart, as in sampling, where the prompt stands before a response
    exists; a plain prompt has the begin token the model was published with. With `chat`, the prompt
    (a string, or a list of messages) goes through the tokenizer's chat template up to where the
    assistant begins; the response follows as it is, never through the template, because published
    templates drop the reasoning of an assistant's turn. Should the template have opened a <think>
    that the response opens too, it is opened once.

    Raises ValueError for a tokenizer without end token, and as the tokenizer does.
    """

    tokenizer: Tokenizer
    chat: bool = False

    def __post_init__(self):
        if self.tokenizer.eos_id is None:
            raise ValueError(
                "the tokenizer has no end token, so nothing could learn to stop; give it one (eos=)"
            )
        if self.chat and self.tokenizer.chat_template is None:
            raise ValueError("chat=True, but the tokenizer has no chat template; give it one")

    def __call__(self, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
        if "text" in record:
            tokens = self.tokenizer.encode(record["text"], allow_special=False, add_special=True)
            tokens = self._ended(tokens)
            return {"tokens": tokens, "loss_mask": np.ones(len(tokens), np.int32)}
        prompt, response = self.prompt_text(record["prompt"]), record["response"]
        if prompt.rstrip().endswith(_THINK) and response.lstrip().startswith(_THINK):
            response = response.lstrip().removeprefix(_THINK)
            if prompt.endswith("\n"):
                response = response.removeprefix("\n")
        encode = self.tokenizer.encode_batch if self.chat else self.tokenizer.encode_prompts
        (given,) = encode([prompt])
        learned = self._ended(self.tokenizer.encode(response))
        mask = np.repeat(np.asarray([0, 1], np.int32), [len(given), len(learned)])
        return {"tokens": np.concatenate([given, learned]), "loss_mask": mask}

    def prompt_text(self, prompt: str | list[Mapping[str, str]]) -> str:
        """What stands before the response."""
        if self.chat:
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            return self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        if not isinstance(prompt, str):
            raise ValueError("the prompt is a list of messages, which needs chat=True")
        return prompt

    def _ended(self, tokens: np.ndarray) -> np.ndarray:
        eos = self.tokenizer.eos_id
        if len(tokens) and tokens[-1] == eos:
            return tokens
        return np.append(tokens, np.int32(eos))
