"""The process that holds vLLM. The Python of vLLM's environment runs it by its path: it imports nothing of rlhf_lab.

python vllm_worker.py DESCRIPTOR FOLDER

A line of JSON on standard input is a request, {"do": start | load | generate, …}; DESCRIPTOR gets one line in answer
to each, {"answer": …} or {"error": …}. The other streams are left to what vLLM prints. When standard input ends, so
does this process, whatever it is busy with, and removes FOLDER, in which it was handed weights.
"""

import json
import os
import queue
import shutil
import signal
import sys
import threading
import traceback
from typing import Any


class Engine:
    """One vLLM engine, and what can be asked of it."""

    llm: Any

    def start(self, path: str, options: dict[str, Any]) -> int:
        """Load the model in a folder. How many tokens a prompt and its response may have together."""
        from vllm import LLM  # pyright: ignore  only its environment has it

        self.llm = LLM(
            path,
            # of the distribution that is sampled, not of the logits before temperature and restrictions
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # the model's own holds defaults of sampling that nobody asked for
            enable_prefix_caching=True,  # samples of one prompt share it
            seed=0,
            **options,
        )
        return self.llm.llm_engine.model_config.max_model_len

    def load(self, path: str) -> None:
        """Take over the weights in a folder, of the same shapes."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        self.llm.apply_model(repack_shared)

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: dict[str, Any]
    ) -> list[tuple[list[int], list[float], bool]]:
        """Tokens, their log-probabilities, and whether it ended by itself, of one response to each prompt."""
        from vllm import SamplingParams  # pyright: ignore

        # keys and values of other weights; and what is read from a cache would differ in its last digits from what is
        # computed, so that a response would depend on what was sampled before it
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its cache of prefixes, which holds what older weights computed")
        found = self.llm.generate(
            [{"prompt_token_ids": tokens} for tokens in prompts],
            [SamplingParams(seed=seed, logprobs=0, ignore_eos=True, **sampling) for seed in seeds],
            use_tqdm=False,
        )
        drawn = []
        for request in found:
            (response,) = request.outputs
            tokens = list(response.token_ids)
            logprobs = [at[token].logprob for at, token in zip(response.logprobs, tokens)]  # noqa: B905  a spare may follow
            drawn.append((tokens, logprobs, response.finish_reason == "stop"))
        return drawn


def repack_shared(model: Any) -> None:
    """Have layers that share a weight pack it again: vLLM 0.32 repacks the one that it loads.

    On a CPU a head tied to the embeddings would go on with a packed copy of their first weights.
    """
    layers: dict[int, list[Any]] = {}
    for layer in model.modules():
        if hasattr(layer, "quant_method") and getattr(layer, "weight", None) is not None:
            layers.setdefault(id(layer.weight), []).append(layer)
    for layer in (one for sharing in layers.values() if len(sharing) > 1 for one in sharing):
        layer.quant_method.process_weights_after_loading(layer)


def read(requests: "queue.SimpleQueue[str]", folder: str) -> None:
    """Hand on the lines of standard input, and end this process with them."""
    for line in sys.stdin:
        requests.put(line)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # not even for a generation under way: nobody waits for it, and it holds the GPU's memory


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the parent, which ends in order, and this one with it
        signal.signal(number, signal.SIG_IGN)
    descriptor, folder = int(sys.argv[1]), sys.argv[2]
    os.set_inheritable(descriptor, False)
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))  # the vllm.py beside this file is not vLLM
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=read, args=(requests, folder), daemon=True).start()
    engine = Engine()
    with os.fdopen(descriptor, "w") as answers:
        while True:
            request = json.loads(requests.get())
            try:
                answer = {"answer": getattr(engine, request.pop("do"))(**request)}
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(f"{json.dumps(answer)}\n")
            answers.flush()


if __name__ == "__main__":
    main()
