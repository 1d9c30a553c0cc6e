"""Block shapes and pipeline depths of every kernel, one table per chip.

Those of TPUs were chosen by static schedules, those of the H200 by its compiler's report
(`python -m pallas_kernels.check`); `python -m pallas_kernels.bench` times others on the device.
"""

TILINGS: dict[str, dict[str, dict[str, int]]] = {
    "v5p": {},
    "v6e": {},
    "tpu7x": {},
    "h200": {},
}
