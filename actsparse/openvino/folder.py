"""Folders with an OpenVINO model, as optimum-intel lays them out."""

MODEL_FILE = "openvino_model.xml"
