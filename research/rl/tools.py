"""Tool calls inside a response: what the policy writes, and what it is given to read.

    <tool>12*34</tool><result>408</result>

The policy writes the first half; as soon as it has closed the tag, the second is spliced in behind it, and it goes on.
What stands between the result's tags is never read as special tokens. A call that has no result gets
`<result>error: ...</result>`, and so do calls beyond the limit.

A result is no action: sampled tokens stay the ids that were sampled, and `Completions.sampled` says which those are.
"""

import dataclasses

import numpy as np

from research.lm.sampler import Pauses
from research.lm.tokenizer import Tokenizer
from research.rl.calculator import MAX_WRITTEN, ToolError, calculate


@dataclasses.dataclass(frozen=True)
class ToolConfig:
    """A calculator that the policy may call in the middle of a response.

    calls: most calls in one response that are answered (0: there is no calculator).
    operations: most operations in one call (0: any number); with 1, what takes two steps takes two calls.
    call, result: opening and closing tag of either; single tokens or not, as the tokenizer has it.
    """

    calls: int = 0
    operations: int = 0
    call: tuple[str, str] = ("<tool>", "</tool>")
    result: tuple[str, str] = ("<result>", "</result>")

    def __post_init__(self):
        if self.calls < 0 or self.operations < 0:
            raise ValueError(
                f"calls={self.calls} and operations={self.operations} must not be negative"
            )
        for name in ("call", "result"):
            tags = getattr(self, name)
            if len(tags) != 2 or not all(tags) or tags[0] == tags[1]:
                raise ValueError(f"{name}={tags}: it must be an opening and another, closing tag")

    def answer(self, call: str) -> tuple[str, bool]:
        """(what the policy is told, whether the call failed) of what stands between the tags of a call."""
        try:
            return calculate(call, operations=self.operations), False
        except ToolError as error:
            return f"error: {error}", True


class Tools:
    """The calls and results of a tokenizer's text.

    Raises ValueError for a tokenizer that cannot write results.
    """

    def __init__(self, config: ToolConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        try:
            self._open, self._close = (tokenizer.encode(tag) for tag in config.result)
            for text in ("-12.5", "error: division by zero"):
                tokenizer.encode(text, allow_special=False)
            self.pause_ids = self._closing_ids()
        except ValueError as error:
            raise ValueError(
                f"this tokenizer cannot write calls of a tool and their results: {error}"
            ) from error

    @property
    def room(self) -> int:
        """Most tokens of a result: no token writes less than a character of it."""
        return len(self._open) + MAX_WRITTEN + len(self._close)

    def _closing_ids(self) -> tuple[int, ...]:
        """Tokens with which a call may be complete: the closing tag's own, or else all that may hold its end."""
        tag, tokenizer = self.config.call[1], self.tokenizer
        ids = tokenizer.encode(tag)
        if len(ids) == 1:
            return (int(ids[0]),)
        ends = tuple(tag[i:] for i in range(len(tag)))
        texts = tokenizer.decode_batch([[i] for i in range(tokenizer.vocab_size)])
        return tuple(
            i for i, text in enumerate(texts) if text.lstrip().startswith(ends) or tag in text
        )

    def session(self, responses: int) -> "Session":
        return Session(self, responses)

    def splice(self, output: str) -> np.ndarray:
        """Ids of a result that says `output`."""
        body = self.tokenizer.encode(output, allow_special=False)
        return np.concatenate([self._open, body, self._close])


class Session:
    """The calls of `responses` responses that are sampled together.

    calls, failed: int [N], calls of each response, and those of them that got an error.
    """

    def __init__(self, tools: Tools, responses: int):
        self._tools = tools
        self._turn = np.zeros(responses, np.int64)  # tokens up to the end of the last result
        self.calls = np.zeros(responses, np.int64)
        self.failed = np.zeros(responses, np.int64)

    @property
    def pauses(self) -> Pauses:
        return Pauses(self._tools.pause_ids, self.reply, self._tools.room)

    def reply(self, row: int, tokens: np.ndarray) -> np.ndarray:
        """The tokens to put behind those of response `row`; none if no call is complete."""
        config = self._tools.config
        text = self._tools.tokenizer.decode(tokens[self._turn[row] :])
        before, closed, _ = text.rpartition(config.call[1])
        if not closed:
            return np.zeros(0, np.int32)
        self.calls[row] += 1
        _, opened, call = before.rpartition(config.call[0])
        if self.calls[row] > config.calls:
            output, failed = "error: no calls left", True
        elif not opened:
            output, failed = f"error: no {config.call[0]}", True
        else:
            output, failed = config.answer(call)
        self.failed[row] += failed
        given = self._tools.splice(output)
        self._turn[row] = len(tokens) + len(given)
        return given
