"""Test settings: eight CPU devices, a persistent compilation cache, parsed flags."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Half of the time of programs as tiny as these would be LLVM's optimiser's. Programs that tests start run with it.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
# Two programs with collectives in flight at once can wait for each other on few cores.
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")
_CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()  # Grain's worker processes read flags
