"""Settings of PyTorch's training step, of which a benchmark takes the fastest as its baseline."""

import shutil

import jax

# One kernel for AdamW, and torch.compile, which needs a C++ compiler on a CPU.
SETTINGS: dict[str, dict[str, bool]] = {
    "eager": {"fused": False, "compiled": False},
    "eager, fused AdamW": {"fused": True, "compiled": False},
    "torch.compile, fused AdamW": {"fused": True, "compiled": True},
}


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
