"""vLLM as a rollout engine, in a process and an environment of its own, which gets the policy's weights in files."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Hashable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from rlhf_lab.data.templates import Template
from rlhf_lab.engine.generate import Sampling, check_room, rollout_from, stop_tokens
from rlhf_lab.engine.models import save_model
from rlhf_lab.engine.parameters import parameters_of
from rlhf_lab.redaction import redact
from rlhf_lab.seeds import derive
from rlhf_lab.types import PromptBatch, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCRIPT = Path(__file__).with_name("vllm_worker.py")
QUOTED = 20  # last lines of what the worker printed, in errors
LOOK_EVERY = 1.0  # seconds between two looks whether it lives
PATIENCE = 20.0  # seconds for it to end by itself
# what belongs to this environment or this process alone
OWN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_FINDS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


@cache
def check_python(python: str | None) -> str:
    """The Python that runs the worker; null is this one.

    Raises:
        ValueError: it is not there, or has no vLLM.
    """
    remedy = "install vLLM in an environment of its own (docs/scaling.md) and name its Python, or use rollout=built_in"
    if python is None:
        if find_spec("vllm") is None:
            raise ValueError(f"rollout.python=null, but this environment has no vLLM; {remedy}")
        return sys.executable
    path = shutil.which(str(Path(python).expanduser()))
    if path is None:
        raise ValueError(f"rollout.python={python} is no program that can be run; {remedy}")
    try:
        found = subprocess.run([path, "-c", _FINDS_VLLM], env=environment(), capture_output=True, timeout=60).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"rollout.python={python} does not answer ({error}); {remedy}") from error
    if found:
        raise ValueError(f"rollout.python={python} has no vLLM; {remedy}")
    return path


def environment(device: torch.device | None = None, threads: int = 1) -> dict[str, str]:
    """The variables that a worker gets: no secrets, nothing of this environment, and one GPU, that of the policy."""
    kept = {name: value for name, value in os.environ.items() if name not in OWN and redact(value) == value}
    kept |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, whose seeds are those of its responses
        "VLLM_NO_USAGE_STATS": "1",  # which it would send
        "HF_HUB_OFFLINE": "1",  # it is given all that it needs
    }
    if device is not None and device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        kept["CUDA_VISIBLE_DEVICES"] = names[device.index or 0]
    else:
        kept |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    return kept


def roomy(size: int) -> str:
    """Where a folder of `size` bytes is made: in memory if that holds it twice, else where temporary files are."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 * size:
        return str(memory)
    return tempfile.gettempdir()


class Worker:
    """A process of another Python with vLLM and the weights of one policy; it starts with the first weights.

    Args:
        options: of vLLM's `LLM`.
        start_timeout: seconds until it must have loaded the model.
        variables: of its environment.
        script: what it runs.
    """

    def __init__(
        self,
        python: str,
        options: Mapping[str, Any],
        start_timeout: float,
        variables: Mapping[str, str],
        script: Path = SCRIPT,
    ) -> None:
        self.python, self.options, self.start_timeout = python, dict(options), start_timeout
        self.variables, self.script = dict(variables), script
        self.process: subprocess.Popen[bytes] | None = None
        self.holds: Hashable = None  # of which state of the policy its weights are
        self.max_positions = 0

    def take(self, state: Hashable, size: int, write: Callable[[Path], None]) -> None:
        """Take over the weights, about `size` bytes, that `write` leaves in a folder, unless it has those of `state`.

        Raises:
            RuntimeError: it does not start in time, has ended, or cannot read them.
        """
        if self.process is not None and state == self.holds:
            return
        self.holds = None
        starts = self.process is None
        if starts:
            self._start(roomy(size))
        weights = self.folder / "policy"
        try:
            write(weights)
            if starts:
                self.max_positions = self.ask("start", self.start_timeout, path=str(weights), options=self.options)
            else:
                self.ask("load", path=str(weights))
        finally:
            shutil.rmtree(weights, ignore_errors=True)
        self.holds = state

    def ask(self, do: str, timeout: float | None = None, **said: Any) -> Any:
        """What it answers to a request.

        Raises:
            RuntimeError: it has ended, does not answer within `timeout` seconds, or could not do it.
        """
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **said}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:  # nobody reads
            self._fail("has ended")
        answer = json.loads(self._line(do, timeout))
        if "error" in answer:
            self._fail(f"could not {do}: {answer['error']}")
        return answer["answer"]

    def close(self) -> None:
        """End the process; it ends by itself when nobody can ask it any more."""
        if self.process is None:
            return
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.answers)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.process = None

    def _start(self, where: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rlhf_lab_vllm_", dir=where))
        self.answers, theirs = os.pipe()
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [self.python, str(self.script), str(theirs), str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.variables,
                pass_fds=[theirs],
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C is meant for this process, which then finishes its step
            )
        os.close(theirs)

    def _line(self, do: str, timeout: float | None) -> bytes:
        """The next line of its answers."""
        assert self.process is not None
        last = None if timeout is None else time.monotonic() + timeout
        looks, parts = select.poll(), []
        looks.register(self.answers, select.POLLIN)
        while not parts or not parts[-1].endswith(b"\n"):
            wait = LOOK_EVERY if last is None else max(0.0, min(LOOK_EVERY, last - time.monotonic()))
            if looks.poll(1000 * wait):
                parts.append(os.read(self.answers, 1 << 20))
                if not parts[-1]:
                    self._fail("has ended")
            elif self.process.poll() is not None:  # a process that it started may hold the pipe
                self._fail("has ended")
            elif last is not None and time.monotonic() >= last:
                self._fail(f"took longer than rollout.start_timeout={timeout:g} seconds to {do}")
        return b"".join(parts)

    def _fail(self, what: str) -> NoReturn:
        """Say what happened to it and what it said last, and end it."""
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            what += f", exit status {self.process.wait(0.5)}"
        lines = (self.folder / "log").read_text(errors="replace").splitlines()
        self.close()
        quoted = redact("\n".join(lines[-QUOTED:])) or "(nothing)"
        raise RuntimeError(f"vLLM's process {what}; it said last:\n{quoted}")


_workers: "weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Worker]]" = weakref.WeakKeyDictionary()


def shared(model: nn.Module, settings: Hashable, make: Callable[[], Worker]) -> Worker:
    """The worker of a model under these settings: engines that sample otherwise share it. It ends with the model."""
    known = _workers.setdefault(model, {})
    if settings not in known:
        known[settings] = worker = make()
        weakref.finalize(model, worker.close)
    return known[settings]


class VLLMEngine:
    """Samples through a worker with vLLM, whose weights follow those of the policy at `sync`."""

    def __init__(self, model: "PreTrainedModel", template: Template, sampling: Sampling, worker: Worker) -> None:
        self.model, self.template, self.sampling, self.worker = model, template, sampling, worker
        self.stops = stop_tokens(model, template)

    @torch.no_grad()
    def sync(self) -> None:
        """Hand the worker the weights that the policy has now, unless they are those that it has.

        Raises:
            RuntimeError: it does not start or cannot read them.
        """
        tensors = parameters_of(self.model).values()
        # writing in place counts a tensor's version up; not so AdamW's fused kernel, and what writes to .data
        state = tuple((tensor._version, torch.hash_tensor(tensor).item()) for tensor in tensors)
        size = sum(tensor.nbytes for tensor in tensors)
        self.worker.take(state, size, lambda folder: save_model(folder, self.model, self.template.tokenizer))

    def generate(self, prompts: PromptBatch, samples: int, seed: int) -> Rollout:
        """`samples` responses to each prompt; responses to one prompt are neighbours.

        Args:
            seed: each response has random numbers of its own, derived from this and its row.

        Raises:
            ValueError: a prompt and its response would not fit the model, or vLLM's cache.
            RuntimeError: the worker failed.
        """
        sampling = self.sampling
        check_room(prompts, sampling, self.worker.max_positions)
        written = [row[keep].tolist() for row, keep in zip(prompts.tokens, prompts.attention_mask, strict=True)]
        inputs = [tokens for tokens in written for _ in range(samples)]
        drawn = self.worker.ask(
            "generate",
            prompts=inputs,
            seeds=[derive(seed, "response", row) for row in range(len(inputs))],
            sampling={
                "max_tokens": sampling.max_new_tokens,
                "min_tokens": sampling.min_new_tokens,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "repetition_penalty": sampling.repetition_penalty,
                "stop_token_ids": self.stops,
                "stop": list(sampling.stop_strings),
                "detokenize": bool(sampling.stop_strings),
            },
        )
        lengths = torch.tensor([len(said) for said, _, _ in drawn])
        tokens = torch.full((len(drawn), sampling.max_new_tokens), self.template.pad)
        logprobs = torch.zeros(len(drawn), sampling.max_new_tokens)
        for i, (said, sure, _) in enumerate(drawn):
            tokens[i, : lengths[i]], logprobs[i, : lengths[i]] = torch.tensor(said), torch.tensor(sure)
        finished = torch.tensor([ended for _, _, ended in drawn])
        processing = sampling.processing(self.stops, records=False)
        return rollout_from(self.template, prompts, samples, tokens, logprobs, lengths, finished, processing)
