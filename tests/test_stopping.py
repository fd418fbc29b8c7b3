"""A request to stop is noted, and ends nothing by itself."""

import signal
import subprocess
import sys
import time

import pytest

from rlhf_lab.stopping import Stopped

PROGRAM = """
import time
from rlhf_lab import stopping
stopping.listen()
print("listening", flush=True)
while stopping.requested() is None:
    time.sleep(0.01)
print(stopping.requested(), flush=True)
stopping.forget()
print(stopping.requested(), flush=True)
"""


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM"])
def test_a_listening_process_hears_the_signal_and_lives(name):
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        time.sleep(0.1)
        process.send_signal(signal.Signals[name])
        assert process.stdout.readline() == f"{name}\n"
        assert process.stdout.readline() == "None\n"
    assert process.returncode == 0


def test_the_first_of_two_signals_is_the_reason():
    code = PROGRAM.replace(
        "while", "import os, signal\nos.kill(os.getpid(), signal.SIGUSR2)\nos.kill(os.getpid(), signal.SIGTERM)\nwhile"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.splitlines() == ["listening", "SIGUSR2", "None"]


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM"])
def test_a_process_that_is_about_to_end_is_not_killed_by_a_repeated_request(name):
    code = """
import os, time
from rlhf_lab import stopping
class Last:  # deleted when Python has taken its handlers back
    def __del__(self, write=os.write, sleep=time.sleep):
        write(1, b"ending\\n")
        sleep(1)
last = Last()
stopping.listen()
stopping.ignore()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ending\n"
        process.send_signal(signal.Signals[name])
    assert process.returncode == 0


def test_no_handler_of_failures_swallows_a_request():
    def careless() -> None:
        try:
            raise Stopped("asked")
        except Exception:
            return

    with pytest.raises(Stopped):
        careless()
