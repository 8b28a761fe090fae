"""Settings of PyTorch's training step, of which a benchmark takes the fastest as its baseline, and
of the process that runs both sides."""

import os
import shutil

import jax

# One kernel for AdamW, and torch.compile, which needs a C++ compiler on a CPU.
SETTINGS: dict[str, dict[str, bool]] = {
    "eager": {"fused": False, "compiled": False},
    "eager, fused AdamW": {"fused": True, "compiled": False},
    "torch.compile, fused AdamW": {"fused": True, "compiled": True},
}

# How memory is allocated, which on a CPU is a fifth of a step on either side.
ALLOCATOR = ("LD_PRELOAD", "MALLOC_CONF", "GLIBC_TUNABLES")
# How PyTorch's threads wait and where they run.
THREADS = ("OMP_WAIT_POLICY", "KMP_AFFINITY", "KMP_BLOCKTIME")


def process_settings() -> dict[str, str]:
    """What is set of the environment that both sides share and that their times depend on."""
    names = (*ALLOCATOR, *THREADS)
    return {name: os.environ[name] for name in names if name in os.environ}


def require_cpu() -> None:
    """Ends the command where JAX would run on an accelerator: PyTorch is on the CPU here."""
    platform = jax.default_backend()
    if platform != "cpu":
        raise SystemExit(
            f"JAX runs on {platform!r} and PyTorch on the CPU, expected both on the CPU: their "
            "times would say nothing about the programs. Set JAX_PLATFORMS=cpu."
        )


def usable_settings() -> list[str]:
    """Names of SETTINGS that this machine can run."""
    compiler = any(map(shutil.which, ("c++", "g++", "clang++")))
    return [name for name, setting in SETTINGS.items() if compiler or not setting["compiled"]]
