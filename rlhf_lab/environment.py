"""Where and with what code and inputs a run runs, for each of its sittings."""

import hashlib
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_lab.engine import ranks
from rlhf_lab.engine.checkpoint import sha256
from rlhf_lab.redaction import redact

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "hydra-core", "omegaconf", "numpy", "safetensors")


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else ""


def code_state() -> dict[str, Any]:
    """The commit of this code, and how its files differ from that; empty in a copy without git."""
    dirty = redact(_git("diff", "HEAD"))
    return {"sha": _git("rev-parse", "HEAD"), "dirty": bool(dirty), "diff": dirty}


def code_digest() -> str:
    """Hex digest of the package's source files: equal code has an equal one, in a copy without git too."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "rlhf_lab").rglob("*.py")):
        digest.update(f"{file.relative_to(ROOT)} {sha256(file)}\n".encode())
    return digest.hexdigest()


def input_hashes(folder: Path) -> dict[str, str]:
    """file -> digest of the weights and data in a folder that a run reads."""
    return {
        str(file.relative_to(folder)): sha256(file)
        for file in sorted(folder.rglob("*"))
        if file.suffix in {".safetensors", ".parquet"} and "checkpoints" not in file.parts
    }


def environment(artifacts: Mapping[str, Path]) -> dict[str, Any]:
    """Where and with what code a run runs; never the environment variables.

    `artifacts` maps a name to the folder that the run reads; each is listed with the hashes of its weights and data.
    """
    return {
        "git": code_state(),
        "code": code_digest(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "num_processes": ranks.world(),
        "command": redact(" ".join(sys.argv)),
        "artifacts": {name: {"path": str(path), "sha256": input_hashes(path)} for name, path in artifacts.items()},
    }


def sitting(facts: Mapping[str, Any], resumed_from: int | None) -> dict[str, Any]:
    """What is kept of one process that worked on a run.

    Args:
        facts: its `environment`.
        resumed_from: the step after which it began, None at the beginning of the run.
    """
    git = {key: facts["git"][key] for key in ("sha", "dirty")}
    kept = {key: facts[key] for key in ("host", "num_processes", "command", "code", "packages", "python")}
    return {"when": time.strftime("%F %T"), "resumed_from": resumed_from, "git": git, **kept}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """How the code and the packages of a sitting differ from those of the one before, in words."""
    if before["code"] != now["code"]:
        old, new = (f"{s['git']['sha'][:8] or 'unknown'}{' with changes' * s['git']['dirty']}" for s in (before, now))
        yield f"code {old} -> {new}" if old != new else f"code ({old}), whose files differ"
    versions = {"python": (before["python"], now["python"])}
    versions |= {name: (before["packages"].get(name, "absent"), now["packages"][name]) for name in now["packages"]}
    for name, (old, new) in versions.items():
        if old != new:
            yield f"{name} {old} -> {new}"
