"""Samples from a model: a run of this codebase, or a published checkpoint.

    python -m experiments.generate --run=runs/zero --prompt='4 *3 -5 =' --samples=4
    python -m experiments.generate --hf=/models/Qwen2.5-1.5B-Instruct --chat --prompt='Why is the sky blue?'
    python -m experiments.generate --hf=/models/Qwen2.5-1.5B --prompts_file=prompts.jsonl --json=out.jsonl

A policy that was trained with a calculator has one here too, with the same limits: results are
spliced into its completions. --tool_calls gives one to any other model, or takes it away.

A line of the prompts file is an object with `prompt` (text) or `messages` (a conversation, for
--chat); its other keys are copied to the output. Results appear batch by batch; what is drawn for a
prompt depends on the seed and its place alone, not on the batch.
"""

import dataclasses
import itertools
import json
import logging
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from research.core import checkpoint
from research.core import mesh as meshes
from research.lm import checkpoints
from research.lm.decoder import Decoder
from research.lm.sampler import Sampler, Sampling
from research.lm.tokenizer import Tokenizer
from research.rl import config as rl
from research.rl.tools import ToolConfig, Tools

_RUN = flags.DEFINE_string("run", None, "A run's directory.")
_STEP = flags.DEFINE_string(
    "step", None, "Checkpoint of the run: a step or 'best'; default: the newest."
)
_HF = flags.DEFINE_string("hf", None, "A published checkpoint's directory.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; may be repeated.")
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "JSON lines with a prompt each.")
_CHAT = flags.DEFINE_bool(
    "chat", False, "Put prompts into the model's chat template, as the user's words."
)
_SAMPLES = flags.DEFINE_integer("samples", 1, "Completions of each prompt.", 1)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Longest completion.", 1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 is greedy.", 0.0)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep the likeliest tokens up to this share.", 0.0, 1.0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Keep the k likeliest tokens; 0 keeps all.", 0)
_INT8 = flags.DEFINE_bool(
    "int8", False, "Keep the layers' matrices as int8: half the memory of bfloat16."
)
_TOOL_CALLS = flags.DEFINE_integer(
    "tool_calls", None, "Calculator calls answered in a completion; default: the run's, or none.", 0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random draws.")
_BATCH = flags.DEFINE_integer("batch", 64, "Completions sampled side by side.", 1)
_JSON = flags.DEFINE_string(
    "json", None, "Write JSON lines here ('-': standard output) instead of text."
)


def generate(
    model: Decoder,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch: int = 64,
    tools: ToolConfig = ToolConfig(),
) -> Iterator[dict[str, Any]]:
    """Completions of tokenised prompts, in order, as they are ready.

    Yields:
        `index` of the prompt, `sample`, `completion` (without the token that stopped it, with the
        results of tools in their places), `tokens` (how many, all those included), `stopped`
        (False: cut at `max_new_tokens`), `logprob` (of all tokens that the model chose, at the
        temperature, before top-k and top-p); with tools, `calls` (how many).

    Raises:
        ValueError: a prompt or setting that the model cannot take, before any work.
    """
    calculator = Tools(tools, tokenizer) if tools.calls else None
    slots = min(batch, samples * len(prompts))
    devices = min(slots, jax.device_count())
    slots = -(-slots // devices) * devices
    sampler = Sampler(
        model,
        slots=slots,
        max_prompt=max(map(len, prompts)),
        max_new_tokens=max_new_tokens,
        mesh=meshes.make({"data": devices}) if devices > 1 else None,
    )
    sampling = Sampling(
        max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop_ids=tokenizer.stop_ids,
        # Rows of the embedding that only pad it stand for no text.
        suppress_ids=tuple(range(tokenizer.vocab_size, model.config.vocab_size)),
    )
    weights, key = sampler.prepare(params), jax.random.key(seed)
    size = max(1, 4 * slots // samples)  # several fillings: slots are refilled as rows end
    for start in range(0, len(prompts), size):
        chunk = range(start, min(start + size, len(prompts)))
        session = calculator and calculator.session(len(chunk) * samples)
        out = sampler(
            weights,
            [prompts[i] for i in chunk],
            key,
            sampling,
            num_samples=samples,
            prompt_ids=chunk,
            pauses=session and session.pauses,
        )
        for row, ids in enumerate(out.sequences):
            stopped = bool(out.stopped[row])
            yield {
                "index": chunk[row // samples],
                "sample": row % samples,
                "completion": tokenizer.decode(ids[:-1] if stopped else ids),
                "tokens": len(ids),
                "stopped": stopped,
                "logprob": float(out.logprobs[row].sum()),
                **({"calls": int(session.calls[row])} if session else {}),
            }


def read_prompts(texts: Sequence[str], file: str | None) -> list[dict[str, Any]]:
    """Flags' texts, then the file's rows, each with `prompt` or `messages`.

    Raises ValueError naming file and line.
    """
    rows: list[dict[str, Any]] = [{"prompt": text} for text in texts]
    lines = [] if file is None else pathlib.Path(file).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict) or not (
            isinstance(row.get("prompt"), str) or isinstance(row.get("messages"), list)
        ):
            raise ValueError(
                f"{file}, line {number}: needs 'prompt' (a text) or 'messages' (a list)"
            )
        rows.append(row)
    if not rows:
        raise ValueError("nothing to continue: give --prompt or --prompts_file")
    return rows


def encode(
    tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]], *, chat: bool
) -> list[np.ndarray]:
    """Ids of the rows; plain prompts have the begin token the model was published with.

    Raises ValueError for an empty prompt, or a conversation without --chat.
    """
    texts = []
    for index, row in enumerate(rows):
        if "messages" in row and not chat:
            raise ValueError(f"prompt {index} is a conversation; add --chat")
        messages = row.get("messages") or [{"role": "user", "content": row.get("prompt")}]
        texts.append(tokenizer.apply_chat_template(messages) if chat else row["prompt"])
    prompts = (tokenizer.encode_batch if chat else tokenizer.encode_prompts)(texts)
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty; give it at least one token")
    return prompts


def run_from_flags() -> None:
    if (_RUN.value is None) == (_HF.value is None):
        raise ValueError("give one of --run and --hf")
    rows = read_prompts(_PROMPT.value, _PROMPTS_FILE.value)
    trained = rl.of_run(_RUN.value) if _RUN.value else None
    tools = trained.rollout.tools if trained else ToolConfig()
    if _TOOL_CALLS.value is not None:
        tools = dataclasses.replace(tools, calls=_TOOL_CALLS.value)
    step = int(_STEP.value) if (_STEP.value or "").isdigit() else _STEP.value
    model, params, tokenizer = checkpoints.load(_RUN.value or _HF.value, step, quantize=_INT8.value)
    prompts = encode(tokenizer, rows, chat=_CHAT.value)
    results = generate(
        model,
        params,
        tokenizer,
        prompts,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        samples=_SAMPLES.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        top_k=_TOP_K.value,
        seed=_SEED.value,
        batch=_BATCH.value,
        tools=tools,
    )
    first = next(results)  # settings are refused here, before the output file is touched
    to_stdout = _JSON.value in (None, "-")
    out = sys.stdout if to_stdout else open(_JSON.value, "w", encoding="utf-8")
    try:
        for result in itertools.chain([first], results):
            if _JSON.value is None:
                end = "stopped" if result["stopped"] else "cut"
                head = f"prompt {result['index']}, sample {result['sample']}"
                text = f"=== {head}, {result['tokens']} tokens, {end} ===\n{result['completion']}\n"
            else:
                text = json.dumps(rows[result["index"]] | result, ensure_ascii=False) + "\n"
            out.write(text)
            out.flush()
    finally:
        if not to_stdout:
            out.close()


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; prompts are --prompt='...'")
    logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax tells its life there
    meshes.force_cpu_devices(min(2, os.cpu_count() or 1))
    try:
        run_from_flags()
    except (ValueError, OSError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
