"""The sentence encoder in a process of its own: the same vectors, plain words when it fails, and no process left behind."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from agent_generation.encoder_process import EncoderProcess
from dataset_builders.stickers.encoder import PACKAGED, TextEncoder


TEXTS = ["a gentle hug", "I lost my keys again and it rains", "so it goes"]


def test_its_vectors_are_the_encoders_to_the_last_bit():
    encode = EncoderProcess(PACKAGED, steady=True)
    found = [encode(TEXTS), encode(TEXTS[:1])]
    encode.close()
    expected = TextEncoder(steady=True)(TEXTS)
    assert np.array_equal(found[0], expected) and np.array_equal(found[1], expected[:1])
    assert encode.process.exitcode == 0


def test_it_says_what_went_wrong(tmp_path):
    encode = EncoderProcess(str(tmp_path / "nosuch"))
    with pytest.raises(RuntimeError, match="nosuch"):
        encode(TEXTS)
    os.kill(encode.process.pid, signal.SIGKILL)
    encode.process.join()
    with pytest.raises(RuntimeError, match="has ended"):
        encode(TEXTS)


SCRIPT = """
import time
from agent_generation.encoder_process import EncoderProcess
if __name__ == "__main__":
    encode = EncoderProcess("all-MiniLM-L6-v2")
    encode(["so"])
    print("ready", flush=True)
    time.sleep(600)
"""


def test_it_ends_with_its_parent_however_that_ends(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    ) as parent:
        parent.stdout.readline()
        parent.kill()
        parent.communicate(timeout=30)  # the encoder's process holds the other end too
