"""Parents, modules and composed models as `transformers` models: configuration, files, extraction."""
