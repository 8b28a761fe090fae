"""What every launcher starts, and what it tells the cloud to call it."""

import hashlib
import re

from experiments.sweeps.runs import Run
from tpo_jax.training.config import ConfigError


def train_command(run: Run, python: str = "python") -> list[str]:
    """Trains or resumes a run from the config.json in its workdir."""
    return [
        python, "-m", "tpo_jax.train", f"--config={run.config_path}", f"--workdir={run.workdir}",
    ]  # fmt: skip


def resource_name(run: Run, longest: int) -> str:
    """A name of [a-z0-9-] for a cloud resource; two runs never share one."""
    digest = hashlib.sha256(str(run.workdir).encode()).hexdigest()[:6]
    words = re.sub(r"[^a-z0-9]+", "-", f"{run.workdir.parent.name}-{run.name}".lower())
    return f"{words.strip('-')[: longest - 7].rstrip('-') or 'run'}-{digest}".lstrip("0123456789-")


def require(launcher: str, **options: object) -> None:
    """Raises ConfigError for options of --launch that were not given."""
    missing = [f"{name}=..." for name, value in options.items() if value == ""]
    if missing:
        raise ConfigError(
            f"launcher {launcher}: --launch={','.join(missing)} is needed; see docs/sweeps.md"
        )


def require_shared(launcher: str, run: Run) -> None:
    """Raises ConfigError where the workdir cannot be seen from the machines of a cloud."""
    if not str(run.workdir).startswith("gs://"):
        raise ConfigError(
            f"launcher {launcher}: --out={run.workdir.parent} is not seen from there; "
            "give a gs:// folder"
        )
