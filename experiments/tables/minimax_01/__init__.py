"""MiniMax-01's claims about architecture and length, at scales where each can be tried.

`cpu`: decoders of 10^4 to 10^6 parameters on synthetic tasks, minutes each. `gpu`: the same rows, larger and longer,
for one accelerator.
"""

from experiments.tables.minimax_01 import architecture, cost, length, retrieval, scaling

TABLES = {
    "scaling": scaling.TABLE,
    "retrieval": retrieval.TABLE,
    "architecture": architecture.TABLE,
    "length": length.TABLE,
    "cost": cost.TABLE,
}
