"""The face models: they find and embed a face, read its attributes, and tell pictures of pictures.

Only this room imports insightface, onnxruntime and the model hub. It imports `photos` and what lies below.
"""
