"""`charlm export`: a trained network for programs that have no charlm, on torch's own ops.

networks_charlm.py has the networks in plain torch, and modeling_charlm.py makes them models of transformers; both are
copied into a folder for Hugging Face. checkpoint.py brings the weights of a run into them, and hugging_face.py and
onnx.py write the files and compare their logits with charlm's.
"""

from charlm.export.checkpoint import Source
from charlm.export.hugging_face import export_hugging_face
from charlm.export.onnx import export_onnx

__all__ = ["Source", "export_hugging_face", "export_onnx"]
