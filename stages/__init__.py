"""The pipeline. Each verb (fetch, preprocess, format, reference, train, evaluate) is one DVC stage,
run as ``python -m stages.<verb>``; every other module is a noun that stages import."""
