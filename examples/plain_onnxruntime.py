"""Stream a bundle's graph with plain onnxruntime, without nsm: the graph's metadata describes its states.

python examples/plain_onnxruntime.py digits.nsm
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

graph = Path(sys.argv[1]) / "graphs" / "step.onnx"
session = ort.InferenceSession(str(graph))
table = json.loads(session.get_modelmeta().custom_metadata_map["nsm.states"])
states = [state for state in table if state["past"]]  # states that this graph reads
initial = np.load(graph.parent / "../state_init.npz")

feed = {}
for state in states:
    learned = state["init"] != "zeros"
    feed[state["past"]] = initial[state["init"]["key"]] if learned else np.zeros(state["shape"], state["dtype"])

names = [output.name for output in session.get_outputs()]
outputs = [name for name in names if name not in [state["present"] for state in table]]
inputs = [item for item in session.get_inputs() if item.name not in feed]  # the tokens come first
random = np.random.default_rng(0)
for step in range(8):  # a stream may be endless; this example runs eight steps
    for item in inputs:
        if item.name == "valid":  # number of valid tokens per lane
            feed["valid"] = np.full(item.shape, inputs[0].shape[1])
        elif item.type == "tensor(int64)":  # ids
            feed[item.name] = np.full(item.shape, step % 2)
        else:  # vectors
            feed[item.name] = random.standard_normal(item.shape, np.float32)
    results = dict(zip(names, session.run(None, feed), strict=True))
    feed |= {state["past"]: results[state["present"]] for state in states if state["present"]}
    print(step, *(f"{name}={results[name][0, -1].argmax()}" for name in outputs))
