"""Gradients of lightning attention on Hopper GPUs: three sweeps of the forward kernel.

With A_ij = g^(i-j) (do_i . v_j), P_ij = g^(i-j) (q_i . k_j) where i >= j, the state S_i after token
i, and the gradient G_j = sum_(i>=j) g^(i-j) q_i^T do_i (and the final state's, decayed),

    dq_i = sum_(j<=i) A_ij k_j = do_i S_i^T          forward in time: sweep(do, v, k), state S^T
    dv_j = sum_(i>=j) P_ij do_i = k_j G_j            in reverse: sweep(k, q, do), state G
    dk_j = sum_(i>=j) A_ij q_i = v_j G_j^T           in reverse: sweep(v, do, q), state G^T

and the gradient of the initial state is g G_0, what the sweep for dv ends with. States are computed
again, not saved. One sweep for both dk and dv would need G and G^T in registers, twice what there is;
instead the two run side by side in neighbouring blocks, so that q and do come from memory once and
from the L2 cache the second time: 4 + 6 arrays move, as many as in two sweeps.
"""

from pallas_kernels.lightning_attention.gpu import Job, sweep


def backward(
    q, k, v, slopes_H, initial, positions, lengths, do, d_final, *, tiling, interpret=False
):
    """dq, dk, dv, bfloat16 [B, T, H, 128], and d_initial, float32 [B, H, K, V].

    q, k, v, do: bfloat16 [B, T, H, 128], T a multiple of 64; initial, d_final: float32 [B, H, K, V]
    or None for zero; positions: int32 [B, T] or None; lengths: int32 [B] or None.
    """
    common = slopes_H, positions, lengths, tiling, interpret
    name = "lightning_gpu_backward"
    dq_job = Job(do, v, k, initial, flipped=True, final=False)
    ((dq, _),) = sweep([dq_job], *common, name=f"{name}_dq")
    dv_job = Job(k, q, do, d_final)
    dk_job = Job(v, do, q, d_final, flipped=True, final=False)
    (dv, d_initial), (dk, _) = sweep([dv_job, dk_job], *common, name=f"{name}_dkdv", reverse=True)
    return dq, dk, dv, d_initial
