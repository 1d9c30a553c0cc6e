"""Compiles a function for a chip that is not there, by the compiler that a machine with it would use.

Needs the environment that `make kernels-check` makes (JAX with its CUDA plugin, and libtpu), and
`environment(chip)` set before JAX is imported.
"""

import importlib.util
import pathlib

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.chips import CHIPS

# What is compiled for: one chip of those that take the same programs.
TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1", "h200": "1x1x1"}
PLUGINS = {"tpu": ("libtpu",), "gpu": ("jax_cuda13_plugin", "nvidia.cu13")}
# What the CUDA compiler asks about the device, in its own notation.
H200 = """
device_description_str: "NVIDIA H200"
platform_name: "CUDA"
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  clock_rate_ghz: 1.98
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 62914560
  memory_bandwidth: 4800000000000
  device_memory_size: 150000000000
}
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 10 }
"""


def environment(name: str, dump: pathlib.Path | None = None) -> dict[str, str]:
    """Variables of a process that compiles for a chip, writing schedules or reports into `dump`."""
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if CHIPS[name].platform == "tpu":
        variables |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        if dump:
            variables["LIBTPU_INIT_ARGS"] = (
                f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
                "--xla_jf_dump_llo_pass_label_regex=final"
            )
    elif dump:
        variables |= {"MOSAIC_GPU_DUMP_TO": str(dump), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    return variables


def missing(name: str) -> str | None:
    """Why this environment cannot compile for a chip, or None if it can."""
    for module in PLUGINS[CHIPS[name].platform]:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"compiling for {name} needs the Python module {module!r}, which is not installed here"
    return None


def devices(name: str, topology: str | None = None) -> np.ndarray:
    """Devices of a chip that is not there: the smallest slice, or e.g. 'v5p:4x4x4', '1x8x1' (H200)."""
    topology = topology or TOPOLOGIES[name]
    if CHIPS[name].platform == "tpu":
        description = topologies.get_topology_desc(topology, "tpu")
    else:
        description = topologies.get_topology_desc(
            platform="cuda", target_config=H200, topology=topology
        )
    return np.array(description.devices)


def compile_for(name: str, function, *arguments):
    """The function, or `jax.jit` of it, compiled for one chip; for more, arguments bring shardings.

    arguments: pytrees of `jax.ShapeDtypeStruct`. To be called inside `chips.target(name)`.
    """
    here = NamedSharding(Mesh(devices(name)[:1], ("device",)), PartitionSpec())

    def place(x):
        return x if x.sharding else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)

    jitted = function if hasattr(function, "trace") else jax.jit(function)
    traced = jitted.trace(*jax.tree.map(place, arguments))
    platform = "tpu" if CHIPS[name].platform == "tpu" else "cuda"
    return traced.lower(lowering_platforms=(platform,)).compile()
