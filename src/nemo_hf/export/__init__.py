"""Modules in other formats: plain transformers models and ONNX."""
