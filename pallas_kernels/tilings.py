"""Block shapes and pipeline depths of every kernel, one table per chip.

Those of TPUs were chosen by static schedules, those of the H200 by its compiler's report
(`python -m pallas_kernels.check`); `python -m pallas_kernels.bench` times others on the device.
"""

TILINGS: dict[str, dict[str, dict[str, int]]] = {
    "v5p": {
        "flash_attention": dict(queries=512, keys=1024, part=512, dq_bytes=4 << 30),
        "moe_dispatch.gmm": dict(rows=640, block=128, columns=512),
        "moe_dispatch.gmm_swiglu": dict(rows=640, block=128, columns=512),
        "moe_dispatch.tgmm": dict(rows=640, rows_out=1536, columns_out=1024),
        "lightning_forward": dict(chunk=128, heads=16, ahead=3, cores=2),
        "lightning_state": dict(chunk=128, heads=16, cores=2),
        "lightning_backward": dict(chunk=128, heads=16, ahead=3, cores=2),
        "token_logprobs_forward": dict(rows=1024, columns=512),
        "token_logprobs_backward": dict(rows=256, columns=384, hidden_rows=512, part_bytes=1 << 30),
    },
    "v6e": {
        "flash_attention": dict(queries=1024, keys=2048, part=512, dq_bytes=4 << 30),
        "moe_dispatch.gmm": dict(rows=1024, block=256, columns=512),
        "moe_dispatch.gmm_swiglu": dict(rows=1024, block=256, columns=512),
        "moe_dispatch.tgmm": dict(rows=640, rows_out=3072, columns_out=1024),
        "lightning_forward": dict(chunk=128, heads=16, ahead=3, cores=1),
        "lightning_state": dict(chunk=128, heads=16, cores=1),
        "lightning_backward": dict(chunk=128, heads=16, ahead=3, cores=1),
        "token_logprobs_forward": dict(rows=1024, columns=1024),
        "token_logprobs_backward": dict(
            rows=256, columns=768, hidden_rows=1024, part_bytes=1 << 30
        ),
    },
    "tpu7x": {
        "flash_attention": dict(queries=1024, keys=2048, part=512, dq_bytes=4 << 30),
        "moe_dispatch.gmm": dict(rows=640, block=256, columns=512),
        "moe_dispatch.gmm_swiglu": dict(rows=640, block=256, columns=512),
        "moe_dispatch.tgmm": dict(rows=640, rows_out=3072, columns_out=1024),
        "lightning_forward": dict(chunk=128, heads=16, ahead=3, cores=1),
        "lightning_state": dict(chunk=128, heads=16, cores=1),
        "lightning_backward": dict(chunk=128, heads=16, ahead=3, cores=1),
        "token_logprobs_forward": dict(rows=1024, columns=512),
        "token_logprobs_backward": dict(rows=256, columns=384, hidden_rows=512, part_bytes=1 << 30),
    },
    "h200": {
        "lightning_forward": dict(chunk=64, stages=3, programs=66),
        "lightning_state": dict(chunk=64, stages=5),
        "lightning_backward": dict(chunk=64, stages=3),
        "moe_dispatch.gmm": dict(
            block_columns=256, stages=4, places=2, band=8, blocks=132, cluster=2
        ),
        "moe_dispatch.gmm_swiglu": dict(
            block_columns=128, stages=4, places=2, band=8, blocks=132, cluster=2
        ),
        "moe_dispatch.tgmm": dict(block_columns=256, stages=3, places=4, blocks=132, cluster=2),
        "token_logprobs": dict(stages=4, band=16, blocks=132, part_bytes=1 << 30),
    },
}
TILINGS["h100"] = TILINGS["h200"]  # the same cores, and the same compiled programs
