"""Test settings: eight CPU devices, a persistent compilation cache, parsed flags."""

import gc
import os
import pathlib
import socket
import subprocess
import sys

# Half of the time of programs as tiny as these would be LLVM's optimiser's. Programs that tests start run with it,
# unless they compute for long.
QUICK_COMPILE = "--xla_backend_optimization_level=0"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {QUICK_COMPILE}")
# Two programs with collectives in flight at once can wait for each other on few cores.
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")
_CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
# Most programs are tiny, and many alike.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()  # Grain's worker processes read flags
# Tracing makes many objects that live on; by default a twentieth of the time goes into collections.
gc.set_threshold(20_000)

_PROCESS = """
import importlib, pathlib, sys
address, index, file, arguments = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4:]
import jax
from research.core import mesh
mesh.force_cpu_devices(2)
jax.distributed.initialize(address, num_processes=2, process_id=index)
sys.path.insert(0, str(file.parent))
importlib.import_module(file.stem).{function}(*arguments)
jax.distributed.shutdown()
"""


@pytest.fixture(scope="session")
def in_two_processes():
    """`in_two_processes(function, *texts)` calls a test module's function in each of two processes with two devices.

    Returns what either printed. They have found each other when they begin; `jax.process_index()` tells them apart.
    """

    def run(function, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        program = _PROCESS.format(function=function.__name__)
        rest = [sys.modules[function.__module__].__file__, *map(str, arguments)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, address, str(index), *rest],
                env=os.environ | {"XLA_FLAGS": QUICK_COMPILE},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]
        try:
            said = [process.communicate(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, (_, errors) in zip(processes, said, strict=True):
            assert process.returncode == 0, errors[-3000:]
        return [out for out, _ in said]

    return run
