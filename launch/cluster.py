"""The site file: what a cluster asks of every job, whoever's run it is. Imports no torch.

`slurm/site.yaml` is read where `stepdown submit` is not given another.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from data.config import Section
from launch.config import WORD, checked, read_yaml

SLURM_FOLDER = Path(__file__).resolve().parents[1] / "slurm"
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?$", re.IGNORECASE)
_Option = Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=[^\s\"'\\]+)?$")]
_Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class SiteConfig(Section):
    """A cluster."""

    partition: str | None = Field(None, pattern=WORD, description="Partition where launch.slurm.partition is left out.")
    account: str | None = Field(None, pattern=WORD, description="Account that the jobs are charged to.")
    qos: str | None = Field(None, pattern=WORD, description="Quality of service.")
    cpus_per_node: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Cores of a job on all GPUs of a node; one on a single GPU takes its share. Left out: Slurm's default."
    )
    sbatch_options: tuple[_Option, ...] = Field((), description="More options for each sbatch, such as --mem=0 or --constraint=ib.")
    srun_options: tuple[_Option, ...] = Field((), description="More options for each srun, such as pyxis's --container-image=FILE.")
    container: tuple[str, ...] = Field(
        (), description="Words in front of Python on every node, such as apptainer, exec, --nv, /images/stepdown.sif."
    )
    python: str | None = Field(None, description="Python within the container; left out: the one that submits.")
    environment: dict[_Variable, str] = Field(
        default_factory=dict,
        description="Variables of each job, such as NCCL's. No secrets: jobs inherit those from the shell that submits.",
    )
    setup: str = Field("", description="Shell lines at the start of each job, such as module load.")

    @model_validator(mode="after")
    def _can_be_written(self) -> Self:
        if self.python is not None and not self.is_contained:
            raise ValueError("python has no effect without container or srun_options: remove it, or submit with that Python")
        secret = next((name for name in self.environment if _SECRET.search(name)), None)
        if secret is not None:
            raise ValueError(
                f"environment.{secret} would be written into every job script: remove it and export {secret} in the shell that submits, "
                "whose environment the jobs inherit"
            )
        if any("\0" in text for text in (*self.environment.values(), *self.container, self.setup)):
            raise ValueError("environment, container and setup cannot hold a NUL byte, which no program takes: remove it")
        return self

    @property
    def is_contained(self) -> bool:
        """The workers' Python need not be the one that submits."""
        return bool(self.container or self.srun_options)


def load_site(path: Path | None) -> SiteConfig:
    """The site file.

    Args:
        path: None for the repository's.

    Raises:
        ValueError: if it is missing, broken, or a key is unknown or has no effect.
    """
    chosen = SLURM_FOLDER / "site.yaml" if path is None else path
    if not chosen.is_file():
        raise ValueError(f"site file {chosen} does not exist: copy the repository's slurm/site.yaml and edit it, or name another by --site")
    return checked(SiteConfig, read_yaml(chosen, f"site file {chosen}") or {}, str(chosen))
