"""vLLM as a rollout engine: a server in a process and an environment of its own; weights go there by a folder."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_lab.data.templates import Template
from rlhf_lab.engine.generate import Sampling, check_room, rollout_from, stop_tokens
from rlhf_lab.seeds import derive
from rlhf_lab.types import PromptBatch, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "policy"  # under which the server knows the model
REQUESTS_AT_ONCE = 64
PATIENCE = 1800.0  # seconds for one request
LOG_TAIL = 2000  # characters of a server's log that an error shows


def _die_with_parent() -> None:
    """Of a child process on Linux: to be ended when whoever started it is gone, killed or not."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a server and its workers."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


class VllmServer:
    """`vllm serve`, started here or there already.

    Args:
        python: interpreter of vLLM's environment; the server is started with it and ends with this process.
        url: of a server that somebody else started in development mode, which lets it reload its weights.
        folder: that the server serves; None: one of its own, in the temporary folder.
        arguments: further ones of `vllm serve`.
        start_timeout: seconds.
    """

    def __init__(
        self, *, python: str | None, url: str | None, folder: str | None, arguments: Sequence[str], start_timeout: float
    ) -> None:
        self.python, self.arguments, self.start_timeout = python, list(arguments), start_timeout
        self.url = url
        if folder is None:
            scratch = tempfile.TemporaryDirectory(prefix="vllm_policy_")
            weakref.finalize(self, scratch.cleanup)
            folder = scratch.name
        self.folder = Path(folder).expanduser().resolve()

    def sync(self, model: "PreTrainedModel", template: Template, longest: int | None) -> None:
        """Leave the model's weights in the folder, and make the server read them; the first time, start it.

        Raises:
            RuntimeError: the server does not start, or does not reload.
        """
        model.save_pretrained(self.folder)
        if self.url is None:
            template.tokenizer.save_pretrained(self.folder)
            self._start(longest)
            return
        self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}})
        # what was computed with the older weights
        self.post("/reset_prefix_cache", {})

    def _start(self, longest: int | None) -> None:
        assert self.python is not None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = self.folder / "server.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [
                    *(self.python, "-m", "vllm.entrypoints.cli.main", "serve", str(self.folder)),
                    *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME),
                    *("--logprobs-mode", "processed_logprobs"),
                    *([] if longest is None else ["--max-model-len", str(longest)]),
                    *self.arguments,
                ],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with_parent,
                # its environment is another: nothing of this one's modules may be found there
                env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"VLLM_SERVER_DEV_MODE": "1"},
            )
        weakref.finalize(self, _end, process)
        url, begun = f"http://127.0.0.1:{port}", time.monotonic()
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                pass
            if process.poll() is not None or time.monotonic() - begun > self.start_timeout:
                _end(process)
                raise RuntimeError(
                    f"vLLM did not start within {self.start_timeout:.0f} s (exit {process.poll()}); its log ends with "
                    f"{log.read_text(errors='replace')[-LOG_TAIL:]}"
                )
            time.sleep(0.5)
        self.url = url

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The server's answer to a request.

        Raises:
            RuntimeError: it refuses, or is not there.
        """
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
                text = reply.read().decode()
        except urllib.error.HTTPError as error:
            hint = "; start it with VLLM_SERVER_DEV_MODE=1" if error.code == 404 else ""
            raise RuntimeError(f"vLLM at {self.url}{path}: {error.code} {error.read().decode()[:500]}{hint}") from error
        except (urllib.error.URLError, OSError) as error:
            raise RuntimeError(f"vLLM at {self.url}{path} does not answer: {error}") from error
        return json.loads(text) if text else None


class VllmClient:
    """Asks a server for responses; one request a prompt, with all of its samples, so that it is read once."""

    def __init__(self, server: VllmServer, model: "PreTrainedModel", template: Template, sampling: Sampling) -> None:
        self.server, self.model, self.template, self.sampling = server, model, template, sampling
        self.stops = stop_tokens(model, template)
        self.max_positions = getattr(model.config, "max_position_embeddings", None)

    def sync(self) -> None:
        """Hand the policy's weights to the server."""
        self.server.sync(self.model, self.template, self.max_positions)

    def drawing(self, sampling: Sampling) -> "VllmClient":
        """Another client of the same server, which draws otherwise."""
        return VllmClient(self.server, self.model, self.template, sampling)

    def generate(self, prompts: PromptBatch, samples: int, seed: int) -> Rollout:
        """`samples` responses to each prompt; responses to one prompt are neighbours.

        Raises:
            ValueError: a prompt and its response would not fit the model.
            RuntimeError: the server does not answer.
        """
        check_room(prompts, self.sampling, self.max_positions)
        written = [row[keep].tolist() for row, keep in zip(prompts.tokens, prompts.attention_mask, strict=True)]

        def ask(i: int) -> list[dict[str, Any]]:
            reply = self.server.post("/v1/completions", self._request(written[i], samples, derive(seed, "vllm", i)))
            return sorted(reply["choices"], key=lambda choice: choice["index"])

        with ThreadPoolExecutor(min(REQUESTS_AT_ONCE, len(written))) as pool:
            choices = [choice for found in pool.map(ask, range(len(written))) for choice in found]
        steps = self.sampling.max_new_tokens
        tokens = torch.full((len(choices), steps), self.template.pad)
        logprobs = torch.zeros(len(choices), steps)
        lengths = torch.zeros(len(choices), dtype=torch.int64)
        for i, choice in enumerate(choices):
            said = choice["token_ids"]
            lengths[i] = len(said)
            tokens[i, : len(said)] = torch.tensor(said)
            logprobs[i, : len(said)] = torch.tensor(choice["logprobs"]["token_logprobs"])
        finished = torch.tensor([choice["finish_reason"] == "stop" for choice in choices])
        return rollout_from(self.template, prompts, samples, tokens, logprobs, lengths, finished)

    def _request(self, prompt: list[int], samples: int, seed: int) -> dict[str, Any]:
        sampling = self.sampling
        return {
            "model": NAME,
            "prompt": prompt,
            "n": samples,
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": sampling.min_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p or 1e-9,  # 0 is the likeliest token alone, which vLLM does not take for a share
            "repetition_penalty": sampling.repetition_penalty,
            "stop": list(sampling.stop_strings),
            "stop_token_ids": self.stops,
            "seed": seed % 2**31,
            "logprobs": 0,
            "return_token_ids": True,
        }
