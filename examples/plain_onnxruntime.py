"""Stream a bundle's graph with plain onnxruntime: nothing of nsm, only the graph and its own description of its states.

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
states = [state for state in table if state["past"]]  # those that this graph reads
initial = np.load(graph.parent / "../state_init.npz")

feed = {}
for state in states:
    learned = state["init"] != "zeros"
    feed[state["past"]] = initial[state["init"]["key"]] if learned else np.zeros(state["shape"], state["dtype"])

batch, chunk = session.get_inputs()[0].shape
inputs = [item.name for item in session.get_inputs()]
names = [output.name for output in session.get_outputs()]
for step in range(8):  # a stream has no end; this one has eight steps
    feed["tokens"] = np.full((batch, chunk), step)
    if "valid" in inputs:  # how many of the tokens count, where lanes may differ
        feed["valid"] = np.full(batch, chunk)
    results = dict(zip(names, session.run(None, feed), strict=True))
    feed |= {state["past"]: results[state["present"]] for state in states if state["present"]}
    print(step, results["outputs"][0, -1].argmax())
