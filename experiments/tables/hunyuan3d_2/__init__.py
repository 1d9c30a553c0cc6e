"""Hunyuan3D 2.0's claims about shapes: reconstruction (Table 1), grids, and generation (Table 2).

All tables read prepared shapes from --shapes, procedural ones as a rule, and keep trained VAEs in --vaes.
`cpu`: models of 10^5 to 10^6 parameters, minutes each. `gpu`: the same rows, larger, for one accelerator.
"""

from experiments.tables.hunyuan3d_2 import decoding, generation, reconstruction

TABLES = {
    "reconstruction": reconstruction.TABLE,
    "decoding": decoding.TABLE,
    "generation": generation.TABLE,
}
