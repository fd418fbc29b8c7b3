"""A judge at the server that comes with transformers: somebody else's idea of the same protocol."""

import json
import os
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.judges.pairs import comparisons

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant: "


@pytest.fixture
def tiny_model(tmp_path):
    """A folder with a model of random weights that reads and writes bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([*letters, "<end>"])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = TEMPLATE
    end = len(letters)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=end + 1,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=4096,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_replies_of_another_server_are_kept_read_or_counted_and_replayed(tiny_model, judge_at, tmp_path):
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi and uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "transformers.cli.transformers", "serve", str(tiny_model), "--host", "127.0.0.1"]
    log = (tmp_path / "server.txt").open("w")
    server = subprocess.Popen(
        [sys.executable, *command, "--port", str(port), "--device", "cpu"],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server)
        settings = {
            "base_url": f"http://127.0.0.1:{port}/v1",
            "model": str(tiny_model),
            "max_tokens": 8,
            "timeout": 60.0,
            "concurrency": 2,
            "rereads": 1,
        }
        judge = judge_at(None, **settings)
        judge.check(["funny"])
        verdicts = judge.compare(comparisons(2), "funny")
    finally:
        server.terminate()
        server.wait(20)
        log.close()
    assert [verdict.wins for verdict in verdicts] == [None, None]  # random weights write no verdict
    assert (judge.account["judge/calls"], judge.account["judge/unreadable"]) == (8, 2)
    lines = [json.loads(line) for line in next((tmp_path / "judgements").iterdir()).read_text().splitlines()]
    replies = [line for line in lines if "key" in line]
    assert all(reply["text"] and reply["prompt_tokens"] > 500 for reply in replies)
    assert judge_at(None, **settings | {"replay": "only"}).compare(comparisons(2), "funny") == verdicts


def _wait_for(address, server):
    until = time.monotonic() + 300
    while True:
        try:
            with urlopen(address, timeout=5):
                return
        except (URLError, OSError):
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.5)
