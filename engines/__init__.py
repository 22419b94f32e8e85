"""The face models: they find and embed a face, and tell coverings and pictures of pictures.

Only this room imports insightface, onnxruntime and the model hub. It imports `photos` and what lies below.
"""
