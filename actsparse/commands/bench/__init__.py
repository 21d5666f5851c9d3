"""Dense against sparse decoding of one model with OpenVINO: time, memory, bandwidth."""
