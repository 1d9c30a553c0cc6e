"""Block shapes and pipeline depths of every kernel, one table per chip.

Those of TPUs were chosen by static schedules, those of the H200 by its compiler's report
(`python -m pallas_kernels.check`); `python -m pallas_kernels.bench` times others on the device.
"""

TILINGS: dict[str, dict[str, dict[str, int]]] = {
    "v5p": {
        "token_logprobs_forward": dict(rows=1024, columns=512),
        "token_logprobs_d_hidden": dict(rows=512, columns=384),
        "token_logprobs_d_head": dict(rows=256, columns=384),
    },
    "v6e": {
        "token_logprobs_forward": dict(rows=1024, columns=1024),
        "token_logprobs_d_hidden": dict(rows=1024, columns=512),
        "token_logprobs_d_head": dict(rows=512, columns=512),
    },
    "tpu7x": {
        "token_logprobs_forward": dict(rows=1024, columns=512),
        "token_logprobs_d_hidden": dict(rows=512, columns=384),
        "token_logprobs_d_head": dict(rows=256, columns=384),
    },
    "h200": {},
}
