"""Which implementation of an op runs, and for what machine."""

import functools
import logging
from collections.abc import Callable, Collection

import jax

from pallas_kernels import chips

logger = logging.getLogger("pallas_kernels")


def choose(
    op: str,
    implementation: str | None,
    implementations: Collection[str],
    refusal: Callable[[chips.Target], str | None],
    slower: Callable[[chips.Target], str | None] = lambda target: None,
) -> str:
    """The name of the implementation that serves this call of `op`.

    A name is taken at its word: one that does not exist, or 'pallas' where it cannot serve, raises
    ValueError with the reason. None is 'pallas' on an accelerator that the kernels know, unless
    `refusal(target)` says why they cannot serve this call there, or `slower(target)` why they had
    better not; then it is 'xla', said once for each reason. On a CPU None is 'xla', silently.

    Call it where shapes and dtypes are known, while tracing; nothing is read from arrays.
    """
    if implementation is not None and implementation not in implementations:
        raise ValueError(f"implementation {implementation!r} is none of {sorted(implementations)}")
    if implementation not in (None, "pallas"):
        return implementation
    target = chips.current()
    if implementation == "pallas":
        reason = _UNKNOWN if target is None else refusal(target)
        if reason:
            raise ValueError(f"{op}: {reason}; use implementation='xla'")
        return "pallas"
    if target is not None:
        reason = refusal(target) or slower(target)
    elif jax.default_backend() == "cpu":
        return "xla"
    else:
        reason = _UNKNOWN
    if reason:
        _say(f"{op} runs as XLA compiles it: {reason}")
    return "xla" if reason else "pallas"


_UNKNOWN = f"no TPU or GPU that the Pallas kernels know (they know {', '.join(chips.CHIPS)})"


@functools.cache
def _say(message: str) -> None:
    logger.warning(message)
