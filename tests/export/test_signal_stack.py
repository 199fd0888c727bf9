"""Check that a process survives signals after OpenVINO models were freed."""

import subprocess
import sys

SCRIPT = """
import gc, signal, subprocess, sys
import openvino
from openvino import opset13
from t2t_vit.export.signal_stack import keep_signal_stack

@keep_signal_stack()
def load():
    images = opset13.parameter([8, 64], float)
    model = openvino.Model([opset13.relu(images)], [images])
    return openvino.Core().compile_model(model, 'CPU')

first, second = load(), load()
del first, second
gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: None)
subprocess.run([sys.executable, '-c', ''], check=True)
print('alive')
"""


def test_process_survives_signals_after_two_openvino_models():
    done = subprocess.run([sys.executable, '-c', SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, 'alive\n'), done.stderr
